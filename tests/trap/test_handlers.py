"""What handlers and observers may do: raise, decide, write memory, change mappings.

The very next instruction sees it.
"""

from __future__ import annotations

import pytest
import tiny
from tiny import CODE, DATA, PAGE, map_page

from vmm.cpu.events import Event, EventType, Vector
from vmm.ept import Permission
from vmm.errors import OptionError
from vmm.exits import Cpuid, EptViolation, ExceptionExit, ExitReason, IoInstruction, Mtf, Rdtsc, Vmcall
from vmm.machine import RunOptions
from vmm.memory.frames import FrameState
from vmm.records import BlockEvent, Modification

TARGET, FRAME = 0x4000_0000, 0x20000
SPARE = 0x80000
MAPS = (map_page(TARGET, FRAME), map_page(SPARE, SPARE))
NOPS = b"\x90" * 64

WAYS = pytest.mark.parametrize("single_step", [False, True], ids=["free", "stepped"])


def build(code: str, *, single_step: bool = False, contents: bytes = NOPS, acts: bool = False, **rest):
    return tiny.build(
        {CODE: code, FRAME: contents},
        maps=MAPS,
        acts=acts,
        options=RunOptions(check=True, audit=not single_step, single_step=single_step, block_events=True),
        **rest,
    )


class Boom(Exception):
    pass


def boom(_record):
    raise Boom


STORE = f"mov ebx, {TARGET}; mov dword ptr [rbx], 0x11223344; xor eax, eax\n{tiny.END}"


@WAYS
class TestRaising:
    """What a handler raises comes out of ``run``, and the machine is at a boundary, with all rules kept."""

    @pytest.mark.parametrize("kind", [EptViolation, Mtf, Modification])
    def test_in_a_trapped_store(self, kind, single_step):
        made = build(STORE, single_step=single_step)
        made.machine.observe(lambda record: boom(record) if isinstance(record, kind) else None, acts=True)
        with pytest.raises(Boom):
            made.run()
        machine = made.machine
        machine.verify()
        assert machine.frames.at(FRAME).state is FrameState.CODE
        assert str(machine.ept.entry(FRAME).permissions) == "--x"
        done = machine.read(FRAME, 4) != NOPS[:4]
        assert done == (kind is not EptViolation)
        assert machine.vcpu.context.rip == CODE + 5 + (6 if done else 0)
        # Whatever was written is on record.
        assert len(made.modifications) == done

    @pytest.mark.parametrize(
        ("kind", "text"),
        [
            (Cpuid, "cpuid"),
            (Rdtsc, "rdtsc"),
            (Vmcall, "vmcall"),
            (IoInstruction, "in al, 0x60"),
            (IoInstruction, "out 0x60, al"),
        ],
    )
    def test_at_an_instruction_leaves_the_guest_in_front_of_it(self, kind, text, single_step):
        made = build(f"nop; nop; {text}; mov ecx, 7; xor eax, eax\n{tiny.END}", single_step=single_step)
        made.machine.on(kind)(boom)
        with pytest.raises(Boom):
            made.run()
        assert made.machine.vcpu.context.rip == CODE + 2
        assert made.machine.register("rcx") == 0
        made.machine.verify()

    def test_a_port_that_raises_in_a_string_store_leaves_memory_alone(self, single_step):
        class Broken:
            exact = True
            read = write = staticmethod(lambda *_arguments: boom(None))

        made = build(f"mov edi, {TARGET}; mov edx, 0x300; insb; hlt", single_step=single_step)
        made.machine.ports.attach(Broken(), 0x300)
        with pytest.raises(Boom):
            made.run()
        assert made.machine.read(FRAME, 64) == NOPS
        assert made.machine.vcpu.context.rip == CODE + 10
        made.machine.verify()

    def test_in_an_output_from_a_code_frame(self, single_step):
        made = build(f"mov esi, {TARGET}; mov edx, 0x60; outsb; hlt", single_step=single_step)
        made.machine.on(IoInstruction)(boom)
        with pytest.raises(Boom):
            made.run()
        assert str(made.machine.ept.entry(FRAME).permissions) == "--x"
        assert made.machine.vcpu.context.rip == CODE + 10

    def test_memory_that_does_not_exist_ends_the_run_with_all_frames_closed(self, single_step):
        """The first half of the store opens a code frame; behind the second there is no memory."""
        made = tiny.build(
            {CODE: f"mov ebx, {TARGET + PAGE - 4}; mov [rbx], rax; hlt", FRAME: b"\x90" * PAGE},
            maps=[map_page(TARGET, FRAME), map_page(TARGET + PAGE, SPARE)],
            options=RunOptions(check=True, single_step=single_step),
        )
        made.machine.ept.unmap(SPARE)
        assert made.run().reason == "unmapped memory"
        assert str(made.machine.ept.entry(FRAME).permissions) == "--x"
        assert made.machine.read(FRAME, PAGE) == b"\x90" * PAGE


@WAYS
class TestDeciding:
    def test_an_event_is_delivered_instead(self, single_step):
        made = build(STORE, single_step=single_step)
        made.machine.on(EptViolation)(lambda _exit: Event(Vector.GP, EventType.HARDWARE_EXCEPTION, 0))
        assert made.run().reason == "triple fault"  # this guest has no IDT
        assert made.machine.read(FRAME, 4) == NOPS[:4]
        assert made.modifications == []

    def test_true_means_that_it_is_dealt_with(self, single_step):
        made = build(STORE, single_step=single_step)

        @made.machine.on(EptViolation)
        def skip(_exit):
            made.machine.vcpu.context.rip += 6
            return True

        assert made.run().reason == "port"
        assert made.machine.read(FRAME, 4) == NOPS[:4]
        assert made.modifications == []

    def test_nothing_leaves_the_default_answer(self, single_step):
        made = build(STORE, single_step=single_step)
        made.machine.on(EptViolation)(lambda _exit: None)
        assert made.run().reason == "port"
        assert made.machine.read(FRAME, 4) == bytes.fromhex("44332211")

    def test_an_exception_may_be_swallowed(self, single_step):
        made = build(f"ud2; xor eax, eax\n{tiny.END}", single_step=single_step)

        @made.machine.on(ExceptionExit)
        def skip(_exit):
            made.machine.vcpu.context.rip += 2
            return True

        assert made.run().reason == "port"


#: Instructions at which a handler or observer may write, and their lengths.
PLACES = [(Cpuid, "cpuid", 2), (Rdtsc, "rdtsc", 2), (Vmcall, "vmcall", 3), (IoInstruction, "out 0x60, al", 2)]


@WAYS
class TestHostWrites:
    """``mov bl, 1`` follows right behind the exit: the host makes it ``mov bl, 2``."""

    @pytest.mark.parametrize(("kind", "text", "length"), PLACES)
    @pytest.mark.parametrize("by", ["handler", "observer"])
    def test_the_next_instruction_is_the_new_one(self, kind, text, length, by, single_step):
        made = build(f"nop; {text}; mov bl, 1; mov al, bl\n{tiny.END}", single_step=single_step)

        def patch(record):
            if isinstance(record, kind) and not made.modifications:
                made.machine.write(CODE + 1 + length + 1, b"\x02")

        if by == "handler":
            made.machine.on(kind)(patch)
        else:
            made.machine.observe(patch, acts=True)
        assert made.run().detail["value"] == 2
        (record,) = made.modifications
        assert (record.cause, record.old, record.new, record.gva, record.rip) == ("host", b"\x01", b"\x02", None, None)

    @pytest.mark.parametrize("kind", [EptViolation, Mtf, Modification])
    def test_in_the_middle_of_a_trapped_store(self, kind, single_step):
        code = f"mov ebx, {TARGET}; mov byte ptr [rbx], 1; mov cl, 1; mov al, cl\n{tiny.END}"
        made = build(code, single_step=single_step)

        def patch(record):
            if isinstance(record, kind) and made.machine.read(CODE + 9, 1) != b"\x02":
                made.machine.write(CODE + 9, b"\x02")

        made.machine.observe(patch, acts=True)
        assert made.run().detail["value"] == 2
        assert sorted(record.cause for record in made.modifications) == ["host", "store"]

    @pytest.mark.parametrize("kind", [EptViolation, Mtf, Modification])
    def test_to_the_very_bytes_that_are_being_stored(self, kind, single_step):
        """Records stay a journal: replayed in order of their numbers, they give what memory holds."""
        made = build(
            f"mov ebx, {TARGET}; mov word ptr [rbx], 0x0101; xor eax, eax\n{tiny.END}", single_step=single_step
        )
        done = []

        def patch(record):
            if isinstance(record, kind) and not done:
                done.append(record)
                made.machine.write(FRAME + 1, b"\x07\x08")

        made.machine.observe(patch, acts=True)
        made.run()
        shadow = bytearray(NOPS)
        for record in sorted(made.modifications, key=lambda record: record.instruction):
            at = record.gpa - FRAME
            assert shadow[at : at + len(record.old)] == record.old
            shadow[at : at + len(record.new)] = record.new
        assert shadow == made.machine.read(FRAME, 64)
        assert shadow[:3] == (b"\x01\x01\x08" if kind is EptViolation else b"\x01\x07\x08")

    def test_over_a_page_end_is_one_operation(self, single_step):
        made = build(f"xor eax, eax\n{tiny.END}", single_step=single_step)
        made.machine.alias(SPARE, FRAME, PAGE)
        made.machine.alias(SPARE + PAGE, CODE, PAGE)
        made.machine.write(SPARE + PAGE - 1, bytes.fromhex("c331c0"))
        first, second = made.modifications
        assert first.instruction == second.instruction
        assert (first.gpa, second.gpa) == (SPARE + PAGE - 1, SPARE + PAGE)
        assert second.blocks == ()
        assert made.run().detail["value"] == 0


def test_a_write_at_the_creation_of_a_block_reaches_that_block():
    """The engine has just translated the block and is about to enter it."""
    made = build(f"jmp next; next: mov al, 1\n{tiny.END}", acts=True)

    def patch(record):
        if (
            isinstance(record, BlockEvent)
            and record.event == "created"
            and record.gva == CODE + 2
            and not made.modifications
        ):
            made.machine.write(CODE + 3, b"\x02")

    made.machine.observe(patch, acts=True)
    assert made.run().detail["value"] == 2


@WAYS
class TestMappings:
    def test_an_alias_made_in_the_middle_of_a_step_breaks_no_rule(self, single_step):
        made = build(STORE, single_step=single_step)
        made.machine.on(EptViolation)(lambda _exit: made.machine.alias(SPARE, FRAME, PAGE))
        made.machine.on(Mtf)(lambda _exit: made.machine.alias(SPARE + PAGE, FRAME, PAGE))
        assert made.run().reason == "port"
        for gpa in (FRAME, SPARE, SPARE + PAGE):
            assert str(made.machine.ept.entry(gpa).permissions) == "--x"

    def test_a_frame_without_any_address_left(self, single_step):
        made = build(
            f"mov ebx, {TARGET}; call rbx; xor eax, eax\n{tiny.END}", contents=b"\xc3" * 64, single_step=single_step
        )
        made.machine.alias(FRAME, DATA, PAGE)
        made.machine.alias(FRAME, FRAME + PAGE, PAGE)
        made.machine.verify()
        made.machine.write(FRAME, b"\xc3")
        assert made.run().reason == "port"

    def test_a_sealed_frame_may_be_sealed_in_the_middle_of_a_store_to_it(self, single_step):
        made = build(STORE, single_step=single_step)
        made.machine.on(EptViolation)(lambda _exit: made.machine.seal(FRAME, PAGE))
        made.run()
        assert made.machine.read(FRAME, 4) == NOPS[:4]
        assert made.machine.frames.at(FRAME).state is FrameState.SEALED
        assert [(record.vector, record.rip) for record in made.of(ExceptionExit)] == [(13, CODE + 5)]

    def test_memory_appears_at_the_first_access(self, single_step):
        """A handler that maps what is missing: demand paging by the host."""
        made = build(f"mov ebx, {SPARE}; mov dword ptr [rbx], 5; mov al, [rbx]\n{tiny.END}", single_step=single_step)
        made.machine.ept.unmap(SPARE)

        @made.machine.on(EptViolation)
        def provide(record):
            made.machine.alias(record.gpa & -PAGE, DATA, PAGE)
            return True

        assert made.run().detail["value"] == 5


class TestProtect:
    @pytest.mark.parametrize("access", [Permission.R, Permission.NONE])
    def test_a_store_to_restricted_data_exits_once_and_is_no_modification_of_code(self, access):
        made = build(f"mov ebx, {DATA}; mov byte ptr [rbx], 7; mov byte ptr [rbx], 8; mov al, [rbx]\n{tiny.END}")
        made.machine.protect(DATA, PAGE, access)
        assert made.run().detail["value"] == 8
        assert made.modifications == []
        assert made.violations[0].gpa == DATA
        assert made.machine.frames.at(DATA).state is FrameState.DATA

    def test_writable_and_executable_is_refused(self):
        made = build("hlt")
        with pytest.raises(OptionError, match="never both"):
            made.machine.protect(FRAME, PAGE, Permission(7))

    @pytest.mark.parametrize("second", [SPARE, SPARE + PAGE])
    def test_one_address_of_several_cannot_break_the_rule(self, second):
        made = build(f"mov ebx, {TARGET}; call rbx; xor eax, eax\n{tiny.END}", contents=b"\xc3" * 8)
        made.machine.alias(second, FRAME, PAGE)
        made.machine.protect(second, PAGE, Permission.R | Permission.W)
        made.machine.verify()
        made.machine.protect(FRAME, PAGE, Permission.X)
        made.machine.verify()
        assert made.run().reason == "port"

    def test_host_writes_reach_code_that_only_a_permission_made_code(self):
        made = tiny.build(
            {
                CODE: f"mov ebx, {FRAME}; call rbx; mov r15, rax; cpuid; mov ebx, {FRAME}; call rbx\n{tiny.END}",
                FRAME: bytes.fromhex("b001c3"),
            },
            maps=[map_page(FRAME, FRAME)],
            code=(CODE,),
        )
        machine = made.machine
        machine.protect(FRAME, PAGE, Permission.X)
        machine.on(Cpuid)(lambda _exit: machine.write(FRAME + 1, b"\x02"))
        assert made.run().detail["value"] == 2
        assert [record.cause for record in made.modifications] == ["host"]


class TestNoMemory:
    @pytest.mark.parametrize(("gpa", "size"), [(tiny.MEMORY, 1), (tiny.MEMORY - 1, 2), (-1, 1), (1 << 60, 1)])
    def test_reads_and_writes_outside_of_ram_are_refused(self, gpa, size):
        made = build("hlt")
        with pytest.raises(OptionError, match="has no memory"):
            made.machine.read(gpa, size)
        before = made.machine.read(tiny.MEMORY - PAGE, PAGE)
        with pytest.raises(OptionError, match="has no memory"):
            made.machine.write(gpa, bytes([1] * size))
        assert made.machine.read(tiny.MEMORY - PAGE, PAGE) == before


@WAYS
def test_a_hlt_whose_fetch_is_tried_again_has_not_been_executed(single_step):
    made = tiny.build(
        {CODE: f"mov eax, {FRAME}; jmp rax", FRAME: "hlt"},
        maps=[map_page(FRAME, FRAME)],
        code=(CODE,),
        options=RunOptions(check=True, single_step=single_step),
    )
    answers = [True, None]
    made.machine.on(EptViolation)(lambda _exit: answers.pop(0))
    assert made.run().reason == "halt"
    assert (len(made.violations), made.count(ExitReason.HLT), made.machine.register("rip")) == (2, 1, FRAME + 1)
