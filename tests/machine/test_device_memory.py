"""Devices in guest-physical memory: any instruction reaches them, exactly once, and every access is on record.

The device of these tests is the local APIC: TPR keeps a byte that has no effect while nothing interrupts.
"""

from __future__ import annotations

import pc_guests
import pytest
from pc_guests import DATA, END, STACK

from vmm.exits import EptViolation, ExitReason
from vmm.machine import RunOptions
from vmm.memory.frames import FrameState
from vmm.records import DeviceAccess

APIC = 0xFEE00000
TPR, LDR = APIC + 0x80, APIC + 0xD0
#: A linear page that is not mapped to itself, and the one behind it; the page table that maps them.
ALIAS, TABLE = 0x2000000, DATA + 0x1000
WAYS = pytest.mark.parametrize(
    "options",
    [
        RunOptions(check=True),
        RunOptions(check=True, audit=True),
        RunOptions(check=True, capacity=4),
        RunOptions(single_step=True),
    ],
    ids=["free", "audited", "four blocks", "stepped"],
)


def build(folder, source: str, **rest):
    """A PC that runs ``source`` with a stack, RDI at the local APIC and RBX at TPR."""
    return pc_guests.build(folder, f"mov esp, {STACK}; mov edi, {APIC}; mov ebx, {TPR}; {source} {END}", **rest)


def map_alias(first: int, second: int) -> str:
    """Map two pages at ALIAS, to physical addresses."""
    return f"""
        mov edx, {TABLE}; mov eax, {first | 3}; mov [rdx], rax; mov eax, {second | 3}; mov [rdx + 8], rax
        mov edx, 0x12080; mov qword ptr [rdx], {TABLE | 3}; mov rdx, cr3; mov cr3, rdx; mov edx, {ALIAS};"""


def accesses(made) -> list[tuple[str, int, int, int]]:
    return [(each.direction, each.gpa, each.size, each.value) for each in made.of(DeviceAccess)]


@WAYS
@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ("mov dword ptr [rbx], 0x21", [("write", TPR, 4, 0x21)]),
        ("mov eax, [rbx]; mov al, [rbx]; movzx eax, word ptr [rbx + 2]",
         [("read", TPR, 4, 0), ("read", TPR, 1, 0), ("read", TPR + 2, 2, 0)]),
        ("or dword ptr [rbx], 0x40", [("read", TPR, 4, 0), ("write", TPR, 4, 0x40)]),
        ("mov eax, 0x33; xchg [rbx], eax", [("read", TPR, 4, 0), ("write", TPR, 4, 0x33)]),
        ("xor eax, eax; mov ecx, 0x44; lock cmpxchg [rbx], ecx", [("read", TPR, 4, 0), ("write", TPR, 4, 0x44)]),
        ("mov qword ptr [rbx], 0x55", [("write", TPR, 4, 0x55), ("write", TPR + 4, 4, 0)]),
        ("mov eax, 0x66; mov rdi, rbx; stosd", [("write", TPR, 4, 0x66)]),
        ("push [rbx]; pop rax", [("read", TPR, 4, 0), ("read", TPR + 4, 4, 0)]),
        ("mov eax, 7; mov rdi, rbx; mov ecx, 2; rep stosd", [("write", TPR, 4, 7), ("write", TPR + 4, 4, 7)]),
        ("lea rsi, [rbx + 0x50]; mov rdi, rbx; movsb", [("read", LDR, 1, 0), ("write", TPR, 1, 0)]),
        ("movd xmm0, [rbx]; movd [rbx], xmm0", [("read", TPR, 4, 0), ("write", TPR, 4, 0)]),
    ],
)  # fmt: skip
def test_any_instruction_reaches_a_device_once(tmp_path, options, instructions, expected):
    made = build(tmp_path, f"{instructions};", options=options)
    assert made.run().reason == "port"
    assert accesses(made) == expected


@WAYS
def test_a_load_gets_what_the_device_says_and_a_store_stays(tmp_path, options):
    source = """
        mov eax, [rdi + 0x30]; mov r8d, eax
        mov dword ptr [rbx], 0x20; add dword ptr [rbx], 3; mov r9d, [rbx]
        cmp dword ptr [rbx], 0x23; sete r10b"""
    made = build(tmp_path, f"xor r10d, r10d; {source};", options=options)
    made.run()
    registers = [made.machine.register(name) for name in ("r8", "r9", "r10")]
    assert registers == [0x50014, 0x23, 1]


def test_an_access_is_an_ept_violation_of_a_page_that_is_not_there(tmp_path):
    made = build(tmp_path, "here: or dword ptr [rbx], 1;")
    made.run()
    exits = [record for record in made.of(EptViolation) if record.gpa == TPR]
    assert [(record.gva, record.qualification) for record in exits] == [(TPR, 0x183)]
    behind = made.records[made.records.index(exits[0]) + 1]
    assert isinstance(behind, DeviceAccess)
    assert behind.rip == exits[0].rip


def test_no_single_step_is_owed_for_a_device(tmp_path):
    made = build(tmp_path, "mov eax, [rbx];")
    made.run()
    assert made.count(ExitReason.MTF) == 0


def test_an_alias_of_a_device_is_the_device(tmp_path):
    made = build(tmp_path, f"{map_alias(0, APIC)} mov dword ptr [rdx + 0x1080], 0x21; mov r8d, [rbx];")
    assert made.run().reason == "port"
    assert made.machine.register("r8") == 0x21
    assert [record.gva for record in made.of(EptViolation) if record.gpa == TPR] == [ALIAS + 0x1080, TPR]


@WAYS
def test_a_rep_stops_between_two_accesses_nothing_to_a_device(tmp_path, options):
    """From the end of what is mapped: the load of the second iteration faults, and the first one counts."""
    source = f"""
        {map_alias(DATA, APIC)} mov dword ptr [rdx + 0xffc], 0x21
        mov rcx, cr3; mov edx, {TABLE}; mov qword ptr [rdx + 8], 0; mov cr3, rcx
        mov esi, {ALIAS + 0xFFC}; mov rdi, rbx; mov ecx, 2; rep movs dword ptr [rdi], dword ptr [rsi];"""
    made = build(tmp_path, source, options=options)
    assert made.run().reason == "triple fault"
    assert accesses(made) == [("write", TPR, 4, 0x21)]


@WAYS
def test_an_instruction_that_faults_has_stored_nothing_to_a_device(tmp_path, options):
    """A store in two pieces, of which the second one is to a page that is not mapped."""
    unmapped = f"mov qword ptr [{TABLE} + 8], 0; mov rcx, cr3; mov cr3, rcx;"
    source = f"{map_alias(APIC, 0)} {unmapped} movups [rdx + 0xff8], xmm0;"
    made = build(tmp_path, source, options=options)
    assert made.run().reason == "triple fault"
    assert accesses(made) == []


@WAYS
def test_a_store_over_the_end_of_a_code_frame_into_a_device(tmp_path, options):
    """Part of it is a modification of code, part of it goes to the device; and the other way round."""
    code = DATA + 0x2000
    source = f"""
        mov eax, {code}; mov byte ptr [rax], 0xc3; call rax
        {map_alias(code, APIC)} mov word ptr [rdx + 0xfff], 0x1234
        {map_alias(APIC, code)} mov word ptr [rdx + 0xfff], 0x5678;"""
    made = build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    writes = [(gpa, size, value) for direction, gpa, size, value in accesses(made) if direction == "write"]
    assert writes == [(APIC, 1, 0x12), (APIC + 0xFFF, 1, 0x78)]
    changed = {record.gpa: record.new for record in made.modifications}
    assert changed[code + 0xFFF] == b"\x34"
    assert made.machine.read(code, 1) == b"\x56"
    assert all(frame.hpa < made.machine.memory.size for frame in made.machine.frames)


def test_a_load_of_code_and_a_store_to_a_device_in_one_instruction(tmp_path):
    made = build(tmp_path, "lea rsi, [rip + there]; mov rdi, rbx; there: movsb;")
    assert made.run().reason == "port"
    assert accesses(made) == [("write", TPR, 1, 0xA4)]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("jmp rdi;", "a fetch from a device"),
        ("mov cr3, rdi; nop;", "a page table in a device"),
        ("mov rsp, rdi; add rsp, 0x100; ud2;", "no IDT either, but nothing to push to"),
        (f"mov dword ptr [rdi + 0xffe], {0x12345678};", "a store over the end of a device, where nothing is"),
        ("mov eax, 0xfed00000; mov eax, [rax];", "a place without a device"),
    ],
)
def test_what_a_device_cannot_be_used_for_ends_the_run(tmp_path, source, what):
    made = build(tmp_path, source)
    assert made.run().reason in ("unmapped memory", "triple fault"), what


def test_a_handler_may_answer_for_a_device(tmp_path):
    made = build(tmp_path, "mov eax, [rbx]; mov r8d, eax;", acts=True)
    context = made.machine.vcpu.context

    @made.machine.on(EptViolation)
    def answer(record):
        if record.gpa != TPR:
            return None
        context.set_gpr("rax", 0x99)
        context.rip += 2
        return True

    assert made.run().reason == "port"
    assert made.machine.register("r8") == 0x99
    assert accesses(made) == []


def test_a_monitor_sees_what_comes_from_a_device(tmp_path):
    made = build(tmp_path, f"mov esi, {APIC + 0x30}; mov edi, {DATA}; movs dword ptr [rdi], dword ptr [rsi];")
    seen = []
    made.machine.monitor(DATA, 4, "w", after=lambda access: seen.append(access.new))
    made.run()
    assert seen == [(0x50014).to_bytes(4, "little")]
    assert accesses(made) == [("read", APIC + 0x30, 4, 0x50014)]


def test_a_device_leaves_no_frame_and_no_code_behind(tmp_path):
    made = build(tmp_path, "mov eax, [rbx]; mov [rbx], eax;")
    made.run()
    made.machine.verify()
    assert {frame.state for frame in made.machine.frames} <= {FrameState.DATA, FrameState.CODE}
    assert all(frame.hpa < made.machine.memory.size for frame in made.machine.frames)


def test_a_pc_without_apic_has_nothing_there(tmp_path):
    made = build(tmp_path, "mov eax, [rbx];", apic=False)
    assert made.run().reason == "unmapped memory"
