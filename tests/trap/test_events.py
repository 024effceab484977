"""Events that the host injects and interrupts that it raises, at boundaries, in shadows, at HLT, in a trapped step."""

from __future__ import annotations

import pytest
import tiny
from tiny import CODE, DATA, PAGE, STACK, map_page

from vmm.cpu.events import Event, EventType, Vector
from vmm.exits import Cpuid, EptViolation, ExceptionExit, ExitReason, ExternalInterrupt, Hlt, Mtf
from vmm.guest.manifest import Limits
from vmm.machine import RunOptions
from vmm.records import Injection, Modification

TARGET = 0x20000
VECTOR = 0x40
HANDLERS = CODE + 0x400
COUNT = DATA + 0x800

WAYS = pytest.mark.parametrize("single_step", [False, True], ids=["free", "stepped"])


def gate(address: int) -> bytes:
    return (address & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (address >> 16 & 0xFFFF) << 48).to_bytes(16, "little")


def build(code: str, *, single_step: bool = False, **rest):
    """A guest whose interrupt handler counts at ``COUNT`` and keeps the address it returns to in r12."""
    return tiny.build(
        {
            CODE: code,
            HANDLERS: tiny.assemble(
                f"push rbx; mov ebx, {COUNT}; inc dword ptr [rbx]; pop rbx; mov r12, [rsp]; iretq", HANDLERS
            ),
            DATA: bytes(16 * VECTOR) + 3 * gate(HANDLERS),
            TARGET: b"\x90" * 64 + b"\x10\0",
        },
        maps=[map_page(TARGET, TARGET)],
        options=RunOptions(check=True, audit=not single_step, single_step=single_step),
        code=(CODE, HANDLERS, TARGET),
        idt=DATA,
        **rest,
    )


def taken(made) -> int:
    return int.from_bytes(made.machine.read(COUNT, 4), "little")


@WAYS
class TestInterrupts:
    def test_is_taken_at_the_next_boundary_if_if_is_set(self, single_step):
        made = build(f"sti; nop; nop; cpuid; nop; xor eax, eax\n{tiny.END}", single_step=single_step)
        made.machine.on(Cpuid)(lambda _exit: made.machine.interrupt(VECTOR))
        made.run()
        assert taken(made) == 1
        (cpuid,) = made.of(Cpuid)
        assert made.machine.register("r12") == cpuid.rip + 2
        assert [record.vector for record in made.of(ExternalInterrupt)] == [VECTOR]
        assert made.count(ExitReason.EXTERNAL_INTERRUPT) == 1

    def test_waits_while_if_is_clear(self, single_step):
        made = build(f"cli; cpuid; nop; nop; sti; nop; nop; xor eax, eax\n{tiny.END}", single_step=single_step)
        made.machine.on(Cpuid)(lambda _exit: made.machine.interrupt(VECTOR))
        made.run()
        (cpuid,) = made.of(Cpuid)
        # cpuid, nop, nop, sti, and the one instruction in its shadow.
        assert made.machine.register("r12") == cpuid.rip + 2 + 2 + 1 + 1
        assert taken(made) == 1

    def test_never_comes_if_if_stays_clear(self, single_step):
        made = build(f"cli; cpuid; nop; xor eax, eax\n{tiny.END}", single_step=single_step)
        made.machine.on(Cpuid)(lambda _exit: made.machine.interrupt(VECTOR))
        assert made.run().reason == "port"
        assert taken(made) == 0

    def test_waits_behind_a_load_of_ss(self, single_step):
        """Raised in the middle of it: its operand lies in a code frame."""
        made = build(
            f"sti; nop; mov ebx, {TARGET + 0x40}; mov ss, [rbx]; nop; xor eax, eax\n{tiny.END}", single_step=single_step
        )
        made.machine.on(EptViolation)(lambda _exit: made.machine.interrupt(VECTOR))
        made.run()
        load = next(record.rip for record in made.violations)
        assert taken(made) == 1
        assert made.machine.register("r12") - load == 2 + 1

    def test_several_are_taken_one_after_the_other_the_highest_first(self, single_step):
        made = build(f"sti; nop; cpuid; nop; nop; xor eax, eax\n{tiny.END}", single_step=single_step)
        vectors = [VECTOR + 1, VECTOR + 2, VECTOR]
        made.machine.on(Cpuid)(lambda _exit: [made.machine.interrupt(vector) for vector in vectors] and None)
        made.run()
        assert taken(made) == 3
        assert [record.vector for record in made.of(ExternalInterrupt)] == sorted(vectors, reverse=True)

    def test_one_vector_is_pending_or_not(self, single_step):
        made = build(f"sti; nop; cpuid; nop; nop; xor eax, eax\n{tiny.END}", single_step=single_step)
        made.machine.on(Cpuid)(lambda _exit: [made.machine.interrupt(VECTOR) for _ in range(3)] and None)
        made.run()
        assert taken(made) == 1

    def test_hlt_waits_for_one_that_is_due(self, single_step):
        made = build(f"cli; cpuid; sti; hlt; xor eax, eax\n{tiny.END}", single_step=single_step)
        made.machine.on(Cpuid)(lambda _exit: made.machine.interrupt(VECTOR))
        assert made.run().reason == "port"
        assert taken(made) == 1
        (hlt,) = made.of(Hlt)
        assert made.machine.register("r12") == hlt.rip + 1

    def test_hlt_with_if_clear_is_the_end(self, single_step):
        made = build("cli; cpuid; hlt; nop", single_step=single_step)
        made.machine.on(Cpuid)(lambda _exit: made.machine.interrupt(VECTOR))
        assert made.run().reason == "halt"
        assert made.count(ExitReason.HLT) == 1

    def test_hlt_handler_may_wake_the_guest(self, single_step):
        made = build(f"sti; hlt; xor eax, eax\n{tiny.END}", single_step=single_step)
        made.machine.on(Hlt)(lambda _exit: made.machine.interrupt(VECTOR))
        assert made.run().reason == "port"
        assert taken(made) == 1

    def test_comes_before_the_store_that_was_refused_and_after_it_is_done(self, single_step):
        """Raised in the middle of a trapped store: the store completes first, exactly once."""
        made = build(
            f"sti; nop; mov ebx, {TARGET}; inc dword ptr [rbx]; nop; xor eax, eax\n{tiny.END}", single_step=single_step
        )
        made.machine.on(EptViolation)(lambda _exit: made.machine.interrupt(VECTOR))
        made.run()
        assert taken(made) >= 1
        assert [record.new for record in made.modifications] == [b"\x91\x90\x90\x90"]
        order = [type(record) for record in made.of(Modification, ExternalInterrupt)]
        assert order[0] is Modification


@WAYS
class TestInjection:
    def test_ignores_the_interrupt_flag(self, single_step):
        made = build(f"cli; cpuid; nop; xor eax, eax\n{tiny.END}", single_step=single_step)
        event = Event(VECTOR, EventType.EXTERNAL_INTERRUPT)
        made.machine.on(Cpuid)(lambda _exit: made.machine.inject(event))
        made.run()
        assert taken(made) == 1
        assert [record.vector for record in made.of(Injection)] == [VECTOR]

    def test_before_the_run_comes_before_the_first_instruction(self, single_step):
        made = build(f"xor eax, eax\n{tiny.END}", single_step=single_step)
        made.machine.inject(Event(VECTOR, EventType.EXTERNAL_INTERRUPT))
        made.run()
        assert made.machine.register("r12") == CODE

    def test_at_mtf_comes_behind_the_store(self, single_step):
        made = build(
            f"mov ebx, {TARGET}; mov byte ptr [rbx], 1; nop; xor eax, eax\n{tiny.END}", single_step=single_step
        )
        made.machine.on(Mtf)(lambda _exit: made.machine.inject(Event(VECTOR, EventType.EXTERNAL_INTERRUPT)))
        made.run()
        (mtf,) = made.of(Mtf)
        assert made.machine.register("r12") == mtf.rip
        assert len(made.modifications) == 1

    def test_without_a_gate_it_is_the_guests_death(self, single_step):
        made = build(f"cpuid; xor eax, eax\n{tiny.END}", single_step=single_step)
        made.machine.inject(Event(Vector.GP, EventType.HARDWARE_EXCEPTION, 0))
        assert made.run().reason == "triple fault"
        assert made.count(ExitReason.TRIPLE_FAULT) == 1


@WAYS
def test_a_frame_pushed_into_code_goes_through_the_door(single_step):
    """The stack of the handler is a code frame: what delivery pushes is recorded and kills what it hits."""
    code = f"""
        mov esp, {TARGET + 0x40}
        mov ebx, {TARGET + 0x20}
        mov byte ptr [rbx], 0xc3
        call rbx
        cpuid
        xor eax, eax
        {tiny.END}
    """
    made = build(code, single_step=single_step)
    made.machine.on(Cpuid)(lambda _exit: made.machine.inject(Event(VECTOR, EventType.EXTERNAL_INTERRUPT)))
    made.run()
    pushed = [record for record in made.modifications if record.cause == "event delivery"]
    assert pushed
    assert {(record.gva, record.rip) for record in pushed} == {(None, None)}
    assert b"".join(record.new for record in pushed)[-8:] == (0x10).to_bytes(8, "little")  # SS is highest
    if not single_step:
        assert [len(record.blocks) for record in pushed] == [1]


class TestBudget:
    @WAYS
    @pytest.mark.parametrize("limit", [1, 2, 7])
    def test_the_run_ends_behind_the_last_exit_it_may_take(self, limit, single_step):
        code = f"mov ebx, {TARGET}; again: mov byte ptr [rbx], 1; jmp again"
        made = build(code, single_step=single_step, limits=Limits(exits=limit, seconds=30.0))
        end = made.run()
        assert end.reason == "exits"
        assert made.machine.reporter.total >= limit
        made.machine.verify()

    def test_time_ends_a_loop_without_exits(self):
        made = build("again: jmp again", limits=Limits(exits=10, seconds=0.3))
        assert made.run().reason == "time"

    def test_stop_ends_it_at_the_next_boundary(self):
        made = build("again: cpuid; jmp again")
        made.machine.on(Cpuid)(lambda _exit: made.machine.stop())
        assert made.run().reason == "stopped"
        assert len(made.of(Cpuid)) == 1


def test_an_exception_exit_shows_what_is_then_delivered():
    made = build("ud2")
    made.run()
    kinds = [type(record) for record in made.records if isinstance(record, (ExceptionExit, Injection))]
    assert kinds[0] is ExceptionExit
    assert STACK - PAGE < made.machine.register("rsp") <= STACK
