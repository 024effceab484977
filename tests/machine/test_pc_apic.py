"""A PC with local APIC and I/O APIC as a guest sees it, and that one which knows of neither notices nothing."""

from __future__ import annotations

from itertools import pairwise

import pc_guests
import pytest
from pc_guests import DATA, END, EOI, IDT, MASTER, PIC, STACK, timer

from vmm.devices.pit import time_of
from vmm.exits import ExternalInterrupt, Rdtsc
from vmm.machine import RunOptions
from vmm.pc import TICKS_PER_BLOCK
from vmm.records import DeviceAccess, Injection

APIC, IO_APIC = 0xFEE00000, 0xFEC00000
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
#: A vector of the guests' own, the spurious one, and NMI's.
VECTOR, SPURIOUS, NMI = 0x40, 0xFF, 2
APIC_EOI = f"push rax; mov eax, {APIC}; mov dword ptr [rax + 0xb0], 0; pop rax;"
COUNT = "handler: inc ebx;"


def gate(vector: int, label: str) -> str:
    return f"""
        lea rax, [rip + {label}]; mov edi, {IDT + 16 * vector};
        mov [rdi], ax; mov word ptr [rdi + 2], 0x10; mov word ptr [rdi + 4], 0x8e00;
        shr rax, 16; mov [rdi + 6], ax; shr rax, 16; mov [rdi + 8], eax; mov dword ptr [rdi + 12], 0;"""


def start(*gates: tuple[int, str]) -> str:
    """A stack, an IDT, all 8259s masked, the local APIC enabled with its other interrupts masked; RSI at it."""
    return f"""
        mov esp, {STACK}; {" ".join(gate(vector, label) for vector, label in gates)}
        mov edi, {DATA}; mov word ptr [rdi], 0xfff; mov qword ptr [rdi + 2], {IDT}; lidt [rdi];
        {PIC} mov al, 0xff; out 0x21, al; out 0xa1, al;
        mov esi, {APIC}; mov dword ptr [rsi + 0x350], 0x10000; mov dword ptr [rsi + 0xf0], {0x100 | SPURIOUS};
        xor ebx, ebx;"""


def redirect(pin: int, low: int, destination: int = 0) -> str:
    return f"""
        mov edi, {IO_APIC};
        mov dword ptr [rdi], {0x11 + 2 * pin}; mov dword ptr [rdi + 16], {destination << 24};
        mov dword ptr [rdi], {0x10 + 2 * pin}; mov dword ptr [rdi + 16], {low};"""


def vectors(made) -> list[int]:
    return [record.vector for record in made.of(ExternalInterrupt)]


def local_timer(count: int, *, periodic: bool = False) -> str:
    """The timer of the local APIC at the bus clock."""
    entry = VECTOR | (1 << 17 if periodic else 0)
    return f"""
        mov dword ptr [rsi + 0x3e0], 11; mov dword ptr [rsi + 0x320], {entry}; mov dword ptr [rsi + 0x380], {count};"""


# The timer


@WAYS
def test_the_timer_interrupts_a_guest_that_spins(tmp_path, options):
    source = f"""
        {start((VECTOR, "handler"))} {local_timer(50_000, periodic=True)} sti; spin: cmp ebx, 5; jb spin; cli; {END}
        {COUNT} {APIC_EOI} iretq"""
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    assert vectors(made) == [VECTOR] * 5
    assert sum(record.gpa == APIC + 0xB0 for record in made.of(DeviceAccess)) == 5


def test_its_interrupts_are_a_period_apart_in_virtual_time(tmp_path):
    source = f"""
        {start((VECTOR, "handler"))} {local_timer(50_000, periodic=True)} sti; spin: cmp ebx, 5; jb spin; cli; {END}
        {COUNT} rdtsc; {APIC_EOI} iretq"""
    made = pc_guests.build(tmp_path, source)
    made.run()
    seen = [record.value for record in made.of(Rdtsc)]
    apart = [after - before for before, after in pairwise(seen)][1:]  # the first one fetches the handler first
    assert len(apart) == 3
    assert all(abs(time - 50_000) <= 20 * TICKS_PER_BLOCK for time in apart)


@WAYS
def test_without_an_end_of_interrupt_there_is_no_second_one(tmp_path, options):
    source = f"""
        {start((VECTOR, "handler"))} {local_timer(20_000, periodic=True)} sti
        mov ecx, 10000; spin: dec ecx; jnz spin; cli; {END} {COUNT} iretq"""
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    assert vectors(made) == [VECTOR]


@WAYS
def test_hlt_sleeps_until_the_timer_wakes(tmp_path, options):
    source = f"""
        {start((VECTOR, "handler"))} {local_timer(1_000_000)} sti; hlt; cli; mov eax, [rsi + 0x390]; mov r8d, eax; {END}
        {COUNT} {APIC_EOI} iretq"""
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    assert (vectors(made), made.machine.register("r8")) == ([VECTOR], 0)
    assert 1_000_000 <= made.machine.pc.now() < 1_200_000


def test_the_timer_can_be_measured_with_the_8254(tmp_path):
    """As systems do that do not ask CPUID: how far it counts in 10 ms of counter 2."""
    source = f"""
        {start((VECTOR, "handler"))}
        mov al, 1; out 0x61, al; mov al, 0xb0; out 0x43, al
        mov dword ptr [rsi + 0x3e0], 3; mov dword ptr [rsi + 0x320], {VECTOR | 1 << 16};
        mov al, {11932 & 0xFF}; out 0x42, al; mov al, {11932 >> 8}; out 0x42, al
        mov dword ptr [rsi + 0x380], 0xffffffff
        wait: in al, 0x61; test al, 0x20; jz wait
        mov eax, [rsi + 0x390]; not eax; mov r8d, eax; {END} handler: iretq"""
    made = pc_guests.build(tmp_path, source)
    assert made.run().reason == "port"
    counted = made.machine.register("r8") * 16
    assert abs(counted - time_of(11932)) < 10_000


def test_cpuid_tells_of_the_apic_and_its_clock(tmp_path):
    source = f"""
        mov eax, 1; cpuid; mov r8d, edx; mov r9d, ecx; mov eax, 0x15; cpuid; mov r10d, ecx; mov r11d, eax; mov r12d, ebx
        xor eax, eax; cpuid; mov r13d, eax; mov eax, 0x14; cpuid; mov r14d, eax
        mov eax, 0x16; cpuid; mov r15d, eax; {END}"""
    made = pc_guests.build(tmp_path, source)
    made.run()
    read = made.machine.register
    assert read("r8") >> 9 & 1 == 1
    assert read("r9") & (1 << 21 | 1 << 24) == 0, "neither x2APIC nor TSC-deadline"
    assert (read("r10"), read("r11"), read("r12")) == (1_000_000_000, 1, 1)
    assert (read("r13"), read("r14"), read("r15")) == (0x16, 0, 1000)
    without = pc_guests.build(tmp_path, source, apic=False)
    without.run()
    assert without.machine.register("r8") >> 9 & 1 == 0
    assert without.machine.register("r13") == 0xD


# Interrupts of devices


@WAYS
def test_the_8254_interrupts_by_pin_2_of_the_io_apic(tmp_path, options):
    source = f"""
        {start((VECTOR, "handler"))} {redirect(2, VECTOR)} {timer(100)} sti; spin: cmp ebx, 5; jb spin; cli; {END}
        {COUNT} {APIC_EOI} iretq"""
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    assert vectors(made) == [VECTOR] * 5


def test_the_serial_port_interrupts_by_pin_4(tmp_path):
    source = f"""
        {start((VECTOR, "handler"))} {redirect(4, VECTOR)}
        mov edx, 0x3fc; mov al, 8; out dx, al; mov edx, 0x3f9; mov al, 2; out dx, al; sti; hlt; cli; {END}
        {COUNT} {APIC_EOI} iretq"""
    made = pc_guests.build(tmp_path, source)
    assert made.run().reason == "port"
    assert vectors(made) == [VECTOR]


@WAYS
def test_the_higher_class_interrupts_the_lower_and_is_not_interrupted_by_it(tmp_path, options):
    """Two interrupts to itself: the lower one's handler sends the higher, whose handler sends the lower once more."""
    low, high = 0x45, 0x92
    send = "mov dword ptr [rsi + 0x300], {};"
    source = f"""
        {start((low, "low"), (high, "high"))} xor r8d, r8d; xor r9d, r9d; sti; {send.format(1 << 18 | low)}
        spin: cmp ebx, 4; jb spin; cli; {END}
        low: shl r8, 8; or r8, 1; inc ebx; sti; cmp ebx, 1; jne past; {send.format(1 << 18 | high)} nop;
        past: shl r8, 8; or r8, 3; inc ebx; {APIC_EOI} iretq
        high: shl r8, 8; or r8, 2; sti; {send.format(1 << 18 | low)} nop; shl r8, 8; or r8, 4; {APIC_EOI} iretq"""
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    assert vectors(made) == [low, high, low]
    assert made.machine.register("r8") == 0x0102_0403_0103


@WAYS
def test_raising_tpr_holds_an_interrupt_back_and_lowering_it_lets_it_in_at_once(tmp_path, options):
    source = f"""
        {start((VECTOR, "handler"))} sti; mov dword ptr [rsi + 0x80], 0x40
        mov dword ptr [rsi + 0x300], {1 << 18 | VECTOR}; nop; mov r8d, ebx
        lea r9, [rip + there]; mov dword ptr [rsi + 0x80], 0x30; there: nop; cli; {END}
        {COUNT} mov r10, [rsp]; {APIC_EOI} iretq"""
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    read = made.machine.register
    assert (read("r8"), read("rbx"), read("r10")) == (0, 1, read("r9"))


@WAYS
def test_an_nmi_to_itself_comes_with_interrupts_off(tmp_path, options):
    source = f"""
        {start((NMI, "handler"))} lea r9, [rip + there]; mov dword ptr [rsi + 0x300], 0x400; there: nop; {END}
        {COUNT} mov r10, [rsp]; iretq"""
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    assert made.machine.register("r10") == made.machine.register("r9")
    assert [(record.vector, record.type) for record in made.of(Injection)] == [(NMI, "nmi")]


def test_the_timer_may_be_an_nmi(tmp_path):
    """By the I/O APIC, to a guest that spins with interrupts off and makes no exit."""
    source = f"""
        {start((NMI, "handler"))} {redirect(2, 0x400)} {timer(100)} spin: cmp ebx, 3; jb spin; {END}
        {COUNT} iretq"""
    made = pc_guests.build(tmp_path, source)
    assert made.run().reason == "port"
    assert [record.vector for record in made.of(Injection)] == [NMI] * 3


@WAYS
def test_an_nmi_that_comes_in_the_middle_of_a_block_is_taken_soon(tmp_path, options):
    """A control word raises the output of the 8254 at once, and nothing is an exit after that."""
    source = f"""
        {start((NMI, "handler"))} {redirect(2, 0x400)} mov al, 0x30; out 0x43, al; mov al, 0x34; out 0x43, al
        mov ecx, 1000; spin: dec ecx; jnz spin; mov r8d, ebx; {END} {COUNT} iretq"""
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    assert made.machine.register("r8") == 1


# A system that knows of no APIC


@WAYS
def test_the_8259s_interrupt_through_the_local_apic_until_it_is_disabled(tmp_path, options):
    source = f"""
        mov esp, {STACK}; {gate(MASTER, "handler")} xor ebx, ebx
        mov edi, {DATA}; mov word ptr [rdi], 0xfff; mov qword ptr [rdi + 2], {IDT}; lidt [rdi]
        {PIC} mov al, 0xfe; out 0x21, al; {timer(40)} sti; spin: cmp ebx, 5; jb spin
        mov esi, {APIC}; mov dword ptr [rsi + 0xf0], 0xff; xor ebx, ebx; mov ecx, 5000; more: dec ecx; jnz more
        cli; {END} {COUNT} push rax; {EOI} pop rax; iretq"""
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    assert made.machine.register("rbx") <= 1
    assert 5 <= len(vectors(made)) <= 6


def test_firmware_leaves_virtual_wire_mode_behind(tmp_path):
    source = f"""
        mov esi, {APIC}; mov edi, {IO_APIC}; mov r8d, [rsi + 0xf0]; mov r9d, [rsi + 0x350]; mov r10d, [rsi + 0x360]
        mov dword ptr [rdi], 0; mov r11d, [rdi + 16]; mov dword ptr [rdi], 0x14; mov r12d, [rdi + 16]; {END}"""
    made = pc_guests.build(tmp_path, source)
    made.run()
    state = [made.machine.register(name) for name in ("r8", "r9", "r10", "r11", "r12")]
    assert state == [0x1FF, 0x700, 0x400, 1 << 24, 0x10000]


# Guests that mean no good


@pytest.mark.parametrize(
    "source",
    [
        f"{local_timer(1, periodic=True)} sti; spin: jmp spin;",
        f"{local_timer(1, periodic=True)} spin: sti; hlt; jmp spin;",
        "mov ecx, 5000; again: mov dword ptr [rsi + 0x380], ecx; dec ecx; jnz again;",
        "mov ecx, 3000; again: mov dword ptr [rsi + 0x300], 0x4000f; mov [rsi + 0x280], eax; dec ecx; jnz again;",
        f"{redirect(3, 0xA040)} sti; spin: jmp spin;",
    ],
    ids=["a period of 1 ns", "a period of 1 ns, halted", "a timer set anew", "errors", "an idle pin active low"],
)
def test_no_programming_of_the_apics_hangs_the_vmm(tmp_path, source):
    """As on a processor, what interrupts all the time leaves a guest nothing but its handler, which ends this one."""
    handler = f"{COUNT} cmp ebx, 200; jae over; {APIC_EOI} iretq; over:"
    made = pc_guests.build(
        tmp_path, f"{start((VECTOR, 'handler'))} {source} jmp over; {handler} {END}", seconds=120.0
    )
    assert made.run().reason == "port"
