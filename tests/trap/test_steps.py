"""One instruction is let through at a time: how often the guest exits for it, what is recorded, what it may touch."""

from __future__ import annotations

import pytest
import tiny
from tiny import CODE, DATA, PAGE, STACK, map_page

from vmm.exits import ExceptionExit, ExitReason
from vmm.guest.manifest import Policy
from vmm.machine import RunOptions
from vmm.trap.policy import READ_OFTEN

#: Two code pages next to each other at linear addresses, in frames that are not; and a page that is not mapped.
FIRST, SECOND = 0x4000_0000, 0x4000_1000
FRAME_1, FRAME_2 = 0x21000, 0x30000
TARGETS = (map_page(FIRST, FRAME_1), map_page(SECOND, FRAME_2))
EDGE = SECOND - 4
WRITE, READ = 2, 1


def run(code, *, contents=b"\x90" * PAGE, **rest):
    """A guest whose two target frames hold NOPs, with the result of its run."""
    made = tiny.build(
        {CODE: code + f"\nxor eax, eax\n{tiny.END}", FRAME_1: contents, FRAME_2: contents}, maps=TARGETS, **rest
    )
    assert made.run().reason == "port"
    made.machine.verify()
    return made


def changes(made):
    return [(record.gva, record.old, record.new) for record in made.modifications]


def stores(made):
    return [violation for violation in made.violations if violation.qualification & WRITE]


class TestRepetition:
    @pytest.mark.parametrize(("suffix", "size"), [("b", 1), ("w", 2), ("d", 4), ("q", 8)])
    def test_rep_stos_is_one_boundary_and_one_record_an_iteration(self, suffix, size):
        made = run(f"mov edi, {FIRST}; mov ecx, 5; mov rax, 0x1122334455667788; rep stos{suffix}")
        value = bytes.fromhex("8877665544332211")[:size]
        assert changes(made) == [(FIRST + i * size, b"\x90" * size, value) for i in range(5)]
        assert len({record.instruction for record in made.modifications}) == 5
        assert len(stores(made)) == made.count(ExitReason.MTF) == 5

    def test_rep_movs_from_code_to_code_opens_both_frames_each_time(self):
        made = run(f"mov esi, {FIRST}; mov edi, {SECOND}; mov ecx, 3; rep movsb")
        assert changes(made) == [(SECOND + i, b"\x90", b"\x90") for i in range(3)]
        kinds = [violation.qualification & 3 for violation in made.violations]
        assert kinds == [READ, WRITE] * 3
        assert made.count(ExitReason.MTF) == 3

    def test_rep_that_walks_backwards_across_frames(self):
        made = run(f"std; mov edi, {SECOND + 1}; mov ecx, 4; mov al, 7; rep stosb; cld")
        assert [gva for gva, _, _ in changes(made)] == [SECOND + 1, SECOND, SECOND - 1, SECOND - 2]

    def test_rep_with_a_count_of_zero_writes_nothing(self):
        made = run(f"mov edi, {FIRST}; xor ecx, ecx; rep stosb")
        assert made.modifications == []

    def test_rep_from_data_into_code(self):
        made = run(f"mov esi, {CODE}; mov edi, {EDGE + 2}; mov ecx, 2; rep movsq")
        code = made.machine.read(CODE, 16)
        records = made.modifications
        assert b"".join(record.new for record in records) == code
        assert [len(record.new) for record in records] == [2, 6, 8]
        assert [record.instruction for record in records] == [1, 1, 2]

    def test_ins_into_code_reads_the_port_once(self):
        class Counter:
            exact, reads = False, 0

            def read(self, port, size):
                self.reads += 1
                return 0x40 + self.reads

        counter = Counter()
        made = tiny.build(
            {
                CODE: f"mov edi, {FIRST}; mov edx, 0x300; mov ecx, 3; rep insb; xor eax, eax\n{tiny.END}",
                FRAME_1: bytes(16),
            },
            maps=TARGETS,
        )
        made.machine.ports.attach(counter, 0x300)
        made.run()
        assert counter.reads == 3
        assert changes(made) == [(FIRST + i, b"\0", bytes([0x41 + i])) for i in range(3)]


class TestExactlyOnce:
    @pytest.mark.parametrize("lock", ["", "lock "])
    @pytest.mark.parametrize(
        ("text", "new"),
        [
            ("add dword ptr [rbp], 5", 0x15),
            ("inc dword ptr [rbp]", 0x11),
            ("xadd dword ptr [rbp], ecx", 0x13),
            ("neg dword ptr [rbp]", -0x10),
            ("bts dword ptr [rbp], 8", 0x110),
            ("btc dword ptr [rbp], 4", 0),
            ("cmpxchg dword ptr [rbp], ecx", 3),
            ("cmpxchg8b qword ptr [rbp]", 0x77),
        ],
    )
    def test_read_modify_write(self, lock, text, new):
        contents = (0x10).to_bytes(4, "little") + bytes(28)
        size = 8 if "8b" in text else 4
        operands = f"mov eax, 0x10; xor edx, edx; mov ebx, 0x77; mov ecx, {3 if size == 4 else 0}"
        made = run(f"mov ebp, {FIRST}; {operands}; {lock}{text}", contents=contents)
        (record,) = made.modifications
        assert record.new == (new & (1 << 8 * size) - 1).to_bytes(size, "little")
        assert made.count(ExitReason.MTF) == 1
        assert stores(made)

    def test_one_exit_is_enough_for_a_read_modify_write(self):
        made = run(f"mov ebx, {FIRST}; lock inc dword ptr [rbx]")
        assert [violation.qualification & 3 for violation in made.violations] in ([WRITE], [READ | WRITE])

    def test_xchg_16_bytes(self):
        made = run(f"mov ebp, {FIRST}; mov rax, -1; mov rdx, -1; lock cmpxchg16b xmmword ptr [rbp]")
        (record,) = made.modifications
        assert record.old == record.new == b"\x90" * 16  # a failed compare writes what was there
        assert record.blocks == ()

    def test_a_compare_that_fails_is_recorded_as_the_store_that_it_is(self):
        made = run(f"mov ebx, {FIRST}; xor eax, eax; mov ecx, 7; lock cmpxchg dword ptr [rbx], ecx")
        (record,) = made.modifications
        assert record.old == record.new


class TestSeveralFrames:
    def test_straddling_store(self):
        made = run(f"mov ebx, {EDGE}; mov rax, 0x1122334455667788; mov [rbx], rax")
        first, second = made.modifications
        assert (first.gpa, first.gva, first.new) == (FRAME_1 + PAGE - 4, EDGE, bytes.fromhex("88776655"))
        assert (second.gpa, second.gva, second.new) == (FRAME_2, SECOND, bytes.fromhex("44332211"))
        assert first.instruction == second.instruction
        assert len(stores(made)) == 2
        assert made.count(ExitReason.MTF) == 1

    def test_straddling_read_modify_write(self):
        made = run(f"mov ebx, {SECOND - 1}; lock add word ptr [rbx], 0x7071")
        assert changes(made) == [(SECOND - 1, b"\x90", b"\x01"), (SECOND, b"\x90", b"\x01")]
        assert made.count(ExitReason.MTF) == 1

    def test_adjacent_frames_give_one_record(self):
        made = tiny.build(
            {
                CODE: f"mov ebx, {0x20FFC}; mov rax, -1; mov [rbx], rax; xor eax, eax\n{tiny.END}",
                0x20000: bytes(2 * PAGE),
            },
            maps=[map_page(0x20000, 0x20000, pages=2)],
        )
        made.run()
        (record,) = made.modifications
        assert (record.gpa, len(record.new)) == (0x20FFC, 8)

    def test_push_from_code_onto_a_code_stack(self):
        made = run(f"mov rbp, rsp; mov esp, {SECOND + 0x100}; mov ebx, {FIRST}; push [rbx]; mov rsp, rbp")
        assert changes(made) == [(SECOND + 0xF8, b"\x90" * 8, b"\x90" * 8)]
        assert sorted(violation.qualification & 3 for violation in made.violations) == [READ, WRITE]
        assert made.count(ExitReason.MTF) == 1

    def test_an_instruction_that_straddles_and_stores_into_both_its_frames(self):
        """``mov [rbx], rax`` with one byte in the first frame, writing over itself and its successor."""
        store = tiny.assemble("mov [rbx], rax")
        first = b"\x90" * (PAGE - 1) + store[:1]
        second = store[1:] + bytes.fromhex("0fb6 c0 c3") + b"\x90" * 32  # movzx eax, al; ret
        made = tiny.build(
            {
                CODE: f"""
                    mov ebx, {SECOND + 2}
                    mov rax, {int.from_bytes(bytes.fromhex("b02a c3 9090909090"), "little")}
                    mov ecx, {SECOND - 1}
                    call rcx
                    {tiny.END}
                """,
                FRAME_1: first,
                FRAME_2: second,
            },
            maps=TARGETS,
        )
        assert made.run().detail["value"] == 0x2A
        assert len(stores(made)) == made.count(ExitReason.MTF) == 1

    def test_a_store_into_itself_runs_to_its_end(self):
        made = tiny.build(f"""
            mov ebx, {CODE + 10}
            mov eax, 0x0b0f
            mov word ptr [rbx], ax
            xor eax, eax
            {tiny.END}
        """)
        assert made.run().reason == "port"
        assert [record.gva == record.rip for record in made.modifications] == [True]

    def test_all_frames_are_closed_again(self):
        made = run(f"mov ebx, {EDGE}; mov [rbx], rsp; mov esi, {FIRST}; mov edi, {SECOND}; movsq")
        for frame in (FRAME_1, FRAME_2):
            assert str(made.machine.ept.entry(frame).permissions) == "--x"


#: (instruction, bytes that it stores): all from the address in RBX, or below the stack pointer that is there.
IMPLICIT = [
    ("push rax", 8),
    ("push 5", 8),
    ("pushfq", 8),
    ("call next; next:", 8),
    ("enter 16, 0", 8),
    ("enter 0, 2", 24),
]
EXPLICIT = [
    ("movups [rbx], xmm1", 16),
    ("movnti [rbx], eax", 4),
    ("fld1; fstp tbyte ptr [rbx]", 10),
    ("fld1; fistp qword ptr [rbx]", 8),
    ("fld1; fbstp tbyte ptr [rbx]", 10),
    ("fnstcw word ptr [rbx]", 2),
    ("stmxcsr dword ptr [rbx]", 4),
    ("setne byte ptr [rbx]", 1),
    ("mov word ptr [rbx], ds", 2),
    ("sgdt [rbx]", 10),
    ("movhps qword ptr [rbx], xmm1", 8),
    ("pextrd dword ptr [rbx], xmm1, 0", 4),
]


class TestEveryKindOfStore:
    @pytest.mark.parametrize(("text", "size"), IMPLICIT)
    def test_stack(self, text, size):
        made = run(f"mov rbp, rsp; mov r12, rsp; mov esp, {FIRST + 0x100}; {text}\nmov rsp, r12")
        records = made.modifications
        assert {record.instruction for record in records} == {1}
        assert sum(len(record.new) for record in records) == size
        assert records[-1].gva + len(records[-1].new) == FIRST + 0x100

    @pytest.mark.parametrize(("text", "size"), EXPLICIT)
    def test_memory(self, text, size):
        made = run(f"mov ebx, {FIRST + 0x10}; {text}")
        assert [(record.gva, len(record.new)) for record in made.modifications] == [(FIRST + 0x10, size)]
        assert made.count(ExitReason.MTF) == 1

    @pytest.mark.parametrize(("text", "size"), [cell for cell in EXPLICIT if cell[1] > 1])
    def test_memory_across_frames(self, text, size):
        made = run(f"mov ebx, {SECOND - 1}; {text}")
        assert [(record.gva, len(record.new)) for record in made.modifications] == [(SECOND - 1, 1), (SECOND, size - 1)]
        assert len({record.instruction for record in made.modifications}) == 1

    def test_fxsave_is_one_instruction(self):
        made = run(f"mov ebx, {FIRST + 0x40}; fxsave [rbx]")
        assert len({record.instruction for record in made.modifications}) == 1
        assert made.machine.read(FRAME_1 + 0x40, 2) == b"\x7f\x03"
        assert made.count(ExitReason.MTF) == 1

    def test_a_stack_of_code_frames(self):
        made = run(f"mov r12, rsp; mov esp, {FIRST + 8}; call over; over: pop rax; mov rsp, r12")
        (record,) = made.modifications
        assert (record.gva, len(record.new)) == (FIRST, 8)


@pytest.mark.parametrize("options", [tiny.STRICT, RunOptions(check=True, single_step=True)], ids=["free", "stepped"])
class TestFaultInTheMiddle:
    """A store whose second page is not present: nothing is written, and the guest gets its page fault."""

    STORES = (
        "mov [rbx], rax",
        "movups [rbx], xmm1",
        "add [rbx], rax",
        "lock xadd [rbx], rax",
        "push rax",
        "fxsave [rbx]",
    )

    @pytest.mark.parametrize("store", STORES)
    def test_nothing_is_written(self, store, options):
        offset = 16 if store.startswith("fx") else 4
        edge = FIRST + PAGE - offset
        made = tiny.build(
            {CODE: f"mov ebx, {edge}; mov esp, {edge + 8}; {store}; hlt", FRAME_1: bytes(range(256)) * 16},
            maps=[map_page(FIRST, FRAME_1)],
            options=options,
        )
        made.machine.on(ExceptionExit)(lambda _exit: made.machine.stop() or True)
        assert made.run().reason == "stopped"
        (fault,) = made.of(ExceptionExit)
        assert (fault.vector, fault.error_code & ~1, fault.address) == (14, 2, SECOND)
        assert made.machine.read(FRAME_1, PAGE) == bytes(range(256)) * 16
        assert made.modifications == []
        made.machine.verify()

    def test_the_handler_repairs_it_and_the_store_happens_once(self, options):
        """The handler moves RBX to where there is room; the store then runs as if nothing had been."""
        gate = handler_gate(CODE + 0x200)
        made = tiny.build(
            {
                CODE: f"mov ebx, {SECOND - 4}; lock inc qword ptr [rbx]; xor eax, eax\n{tiny.END}",
                CODE + 0x200: f"mov ebx, {FIRST}; add rsp, 8; iretq",
                DATA: bytes(14 * 16) + gate,
                FRAME_1: bytes(16),
            },
            maps=[map_page(FIRST, FRAME_1)],
            options=options,
            idt=DATA,
            code=(CODE, CODE + 0x200, FRAME_1),
        )
        assert made.run().reason == "port"
        assert made.machine.read(FRAME_1, 8) == (1).to_bytes(8, "little")
        assert [record.gva for record in made.modifications] == [FIRST]


def handler_gate(address: int) -> bytes:
    """A 64-bit interrupt gate to ring 0."""
    low = address & 0xFFFF | 0x08 << 16 | 0x8E00 << 32 | (address >> 16 & 0xFFFF) << 48
    return low.to_bytes(8, "little") + (address >> 32).to_bytes(8, "little")


class TestReads:
    def test_a_read_is_let_through_by_default(self):
        made = run(f"mov ebx, {FIRST}; mov eax, [rbx]; mov ecx, [rbx]")
        assert [violation.qualification & 7 for violation in made.violations] == [READ, READ]
        assert made.count(ExitReason.MTF) == 2
        assert made.modifications == []

    def test_or_the_frame_becomes_readable_for_good(self):
        made = run(f"mov ebx, {FIRST}; mov eax, [rbx]; mov ecx, [rbx]", policy=Policy(reads="grant", code="load"))
        assert len(made.violations) == 1
        assert made.count(ExitReason.MTF) == 0
        assert str(made.machine.ept.entry(FRAME_1).permissions) == "r-x"

    def test_or_it_does_once_it_is_read_often(self):
        source = f"mov ebx, {FIRST}; mov ecx, 40; again: mov eax, [rbx]; dec ecx; jnz again"
        made = run(source, policy=Policy(reads="adaptive", code="load"))
        assert made.count(ExitReason.MTF) == READ_OFTEN
        assert len(made.violations) == READ_OFTEN + 1
        assert str(made.machine.ept.entry(FRAME_1).permissions) == "r-x"

    def test_a_granted_frame_still_traps_stores(self):
        made = run(
            f"mov ebx, {FIRST}; mov eax, [rbx]; mov dword ptr [rbx], 5", policy=Policy(reads="grant", code="load")
        )
        assert len(made.modifications) == 1
        assert str(made.machine.ept.entry(FRAME_1).permissions) == "r-x"


@pytest.mark.parametrize(("mode", "rest"), [("protected", {"paging": False}), ("real", {"paging": False})])
def test_other_modes(mode, rest):
    entry = CODE if mode == "protected" else 0x1000
    code = "mov byte ptr [0x2000], 0x42; mov al, byte ptr [0x2000]; out 0xf4, al"
    made = tiny.build({entry: code, 0x2000: b"\xc3"}, mode=mode, entry=entry, registers={"rsp": 0x8000}, **rest)
    assert made.run().detail["value"] == 0x42
    (record,) = made.modifications
    assert (record.gva, record.gpa, record.old, record.new) == (0x2000, 0x2000, b"\xc3", b"\x42")


def test_a_stack_page_is_data_all_along():
    made = run("push rax; pop rax")
    assert made.violations == []
    assert str(made.machine.ept.entry(STACK - PAGE).permissions) == "rw-"
