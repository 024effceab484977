"""A PC as a guest sees it: interrupts at the right boundaries, time that passes, sleep, and that runs repeat."""

from __future__ import annotations

from itertools import pairwise

import pc_guests
import pytest
from pc_guests import DATA, END, EOI, MASTER, SLAVE, prologue, timer

from vmm.cpu import countdown
from vmm.devices.pit import time_of
from vmm.exits import ExternalInterrupt, Hlt, IoInstruction
from vmm.instruction_exits import TICKS_PER_EXIT
from vmm.machine import RunOptions
from vmm.pc import TICKS_PER_BLOCK

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
PERIOD = 40
TICKS = f"""
    {prologue(MASTER)} {timer(PERIOD)} xor ebx, ebx; sti; spin: cmp ebx, 5; jb spin; cli; {END}
    handler: inc ebx; push rax; {EOI} pop rax; iretq"""


@WAYS
def test_a_guest_that_spins_gets_its_timer_interrupts(tmp_path, options):
    made = pc_guests.build(tmp_path, TICKS, options=options)
    assert made.run().reason == "port"
    assert [record.vector for record in made.of(ExternalInterrupt)] == [MASTER] * 5
    assert made.machine.pc.now() >= time_of(5 * PERIOD)


def test_interrupts_of_a_timer_are_a_period_apart_in_virtual_time(tmp_path):
    made = pc_guests.build(tmp_path, TICKS.replace("inc ebx", "inc ebx; rdtsc"))
    made.run()
    seen = [record.value for record in made.records if type(record).__name__ == "Rdtsc"]
    assert len(seen) == 5
    # Delivered at a block's start, and the handler's RDTSC is an exit of its own after that of the interrupt.
    apart = [after - before for before, after in pairwise(seen)][1:]  # the first one fetches the handler first
    assert all(abs(time - time_of(PERIOD)) <= 20 * TICKS_PER_BLOCK for time in apart)


@pytest.mark.parametrize("asks", ["in al, 0x61", "rdtsc", "xor eax, eax; cpuid", "out 0x80, al"])
def test_exits_that_are_answered_within_a_block_take_time_that_interrupts_do_not_wait_for(tmp_path, asks):
    source = f"""
        {prologue(MASTER)} {timer(PERIOD)} xor r15d, r15d; sti; spin: {asks}; cmp r15d, 5; jb spin; cli; {END}
        handler: inc r15d; push rax; {EOI} pop rax; iretq"""
    made = pc_guests.build(tmp_path, source)
    made.run()
    assert len(made.of(ExternalInterrupt)) == 5
    exits = sum(hasattr(record, "reason") for record in made.records)
    assert exits < 5 * time_of(PERIOD) / TICKS_PER_EXIT + 100


@WAYS
@pytest.mark.parametrize("look", ["rdtsc", "mov al, 0; out 0x43, al; in al, 0x40; in al, 0x40"], ids=["TSC", "timer"])
def test_a_guest_that_looks_at_a_clock_all_the_time_gets_its_timer_interrupts_in_time(tmp_path, options, look):
    """Exits that are answered within a block take time, too, of which the engine knows nothing."""
    source = f"""
        {prologue(MASTER)} {timer(2000)} xor ebx, ebx; sti; spin: {look}; cmp ebx, 5; jb spin; cli; {END}
        handler: inc ebx; push rax; {EOI} pop rax; iretq"""
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    assert made.machine.pc.now() < time_of(5 * 2000) + 100_000


@WAYS
def test_an_interrupt_waits_for_if_and_the_shadow_of_sti(tmp_path, options):
    """Nothing but STI tells that the guest takes interrupts now: it is no exit."""
    source = f"""
        {prologue(MASTER)} {timer(10, 0)}
        mov ecx, 20000; wait: dec ecx; jnz wait
        lea r13, [rip + shadow]; sti; shadow: nop; nop; nop; {END}
        handler: mov r12, [rsp]; push rax; {EOI} pop rax; iretq"""
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    assert len(made.of(ExternalInterrupt)) == 1
    assert made.machine.register("r12") == made.machine.register("r13") + 1


def test_an_interrupt_is_taken_after_popf_and_iret_as_after_sti(tmp_path):
    source = f"""
        {prologue(MASTER)} {timer(10, 0)}
        mov ecx, 20000; wait: dec ecx; jnz wait
        lea r13, [rip + here]; push 0x202; popfq; here: nop; nop; {END}
        handler: mov r12, [rsp]; push rax; {EOI} pop rax; iretq"""
    made = pc_guests.build(tmp_path, source)
    made.run()
    assert made.machine.register("r12") == made.machine.register("r13")


@WAYS
def test_hlt_sleeps_until_the_next_interrupt(tmp_path, options):
    source = f"{prologue(MASTER)} {timer(0xFFFF, 0)} sti; hlt; cli; {END} handler: push rax; {EOI} pop rax; iretq"
    made = pc_guests.build(tmp_path, source, options=options)
    assert made.run().reason == "port"
    assert len(made.of(Hlt)) == len(made.of(ExternalInterrupt)) == 1
    assert time_of(0xFFFF) < made.machine.pc.now() < time_of(0xFFFF) + 200_000


@pytest.mark.parametrize("flag", ["cli", "sti"])
def test_hlt_with_nothing_to_come_is_the_end(tmp_path, flag):
    """With IF set, too: no device has anything in mind."""
    made = pc_guests.build(tmp_path, f"{prologue(MASTER)} {flag}; hlt; handler: nop")
    assert made.run().reason == "halt"


def test_what_comes_over_the_serial_line_interrupts_and_is_read(tmp_path):
    source = f"""
        {prologue(MASTER + 4)}
        mov dx, 0x3f9; mov al, 1; out dx, al; mov dx, 0x3fc; mov al, 8; out dx, al
        xor ebx, ebx; sti; spin: cmp ebx, 3; jb spin; cli; {END}
        handler: push rax; push rdx; mov dx, 0x3f8; in al, dx; inc al; out dx, al; inc ebx
        {EOI} pop rdx; pop rax; iretq"""
    made = pc_guests.build(tmp_path, source)
    made.machine.pc.com1.receive(b"HAL")
    assert made.run().reason == "port"
    assert made.machine.console.output == b"IBM"
    assert len(made.of(ExternalInterrupt)) == 3


def test_the_clock_interrupts_through_the_slave(tmp_path):
    source = f"""
        {prologue(SLAVE)}
        mov al, 0x0b; out 0x70, al; mov al, 0x12; out 0x71, al
        sti; hlt; cli; {END}
        handler: push rax; mov al, 0x0c; out 0x70, al; in al, 0x71; mov r12b, al
        mov al, 0x20; out 0xa0, al; {EOI} pop rax; iretq"""
    made = pc_guests.build(tmp_path, source)
    assert made.run().reason == "port"
    assert made.machine.register("r12") & 0x90 == 0x90
    assert made.machine.pc.now() >= 1_000_000_000


@pytest.mark.parametrize("how", ["mov al, 0xfe; out 0x64, al", "mov dx, 0xcf9; mov al, 6; out dx, al"])
def test_a_reset_ends_the_run(tmp_path, how):
    made = pc_guests.build(tmp_path, f"{how}; hlt")
    assert made.run().reason == "reset"
    assert isinstance(made.records[-2], IoInstruction)


def test_runs_repeat(tmp_path):
    runs = []
    for _ in range(2):
        made = pc_guests.build(tmp_path, TICKS)
        made.run()
        runs.append((made.records, made.machine.pc.now(), made.machine.vcpu.context.registers()))
    assert runs[0] == runs[1]


def test_a_run_is_the_same_where_no_machine_code_can_count(tmp_path, monkeypatch):
    runs = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(countdown, "placed", lambda _code: None)
        made = pc_guests.build(tmp_path, TICKS)
        assert made.machine.vcpu.free.countdown.native is native
        made.run()
        runs.append((made.records, made.machine.pc.now(), made.machine.vcpu.context.registers()))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("flag", ["cli", "sti"])
def test_the_time_limit_ends_a_guest_that_spins(tmp_path, flag):
    """Also with an interrupt pending that it never takes, and leaves it at an instruction boundary."""
    made = pc_guests.build(
        tmp_path, f"{prologue(MASTER)} {timer(10, 0)} {flag}; spin: inc dword ptr [{DATA}]; jmp spin; handler: iretq",
        seconds=0.3,
    )  # fmt: skip
    assert made.run().reason == "time"
    rip, code = made.machine.register("rip"), made.machine.read(made.machine.register("rip"), 1)
    assert code in (b"\xff", b"\xeb"), hex(rip)


def test_a_block_that_is_always_stepped_takes_time_and_interrupts(tmp_path):
    """RCL of memory is never executed freely."""
    source = f"""
        {prologue(MASTER)} {timer(50)} xor ebx, ebx; mov edi, {DATA}; sti
        spin: rcl dword ptr [rdi], 1; cmp ebx, 2; jb spin; cli; {END}
        handler: inc ebx; push rax; {EOI} pop rax; iretq"""
    made = pc_guests.build(tmp_path, source)
    assert made.run().reason == "port"
    assert len(made.of(ExternalInterrupt)) == 2
