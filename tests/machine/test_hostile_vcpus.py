"""One vCPU cannot starve, flood or confuse another one, nor the VMM; the host stops and interrupts whom it wants."""

from __future__ import annotations

import threading

import pytest
import tiny
from attrs import evolve
from tiny import CODE, DATA, PAGE

from vmm.cpu.events import Event, EventType, Vector
from vmm.errors import OptionError
from vmm.exits import Cpuid, ExternalInterrupt, Hlt, TripleFault
from vmm.guest.manifest import CpuSpec, Limits, Schedule
from vmm.machine import RunOptions
from vmm.records import Injection

OTHER = 0x20000
OTHER_STACK = 0x60000
IDT = 0x48000
HANDLER = 0x28000
NOTHING = 0x30000
VECTOR = 0x40
IPI = 0xB0
COUNT = DATA + 0x80
INTERRUPT_OTHER = f"mov eax, {1 << 8 | VECTOR}; mov dx, {IPI}; out dx, ax"
WAYS = {
    "free": RunOptions(check=True),
    "audited": tiny.STRICT,
    "stepped": RunOptions(single_step=True),
    "one block": RunOptions(capacity=1),
}
each_way = pytest.mark.parametrize("way", WAYS)


def gate(handler: int) -> bytes:
    return (handler & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48).to_bytes(16, "little")


def build(first: str, second: str, *, way: str = "audited", seed: int = 1, quantum: int = 40, **rest) -> tiny.Tiny:
    """Two vCPUs with a gate for ``VECTOR`` and for NMI, whose handler counts at ``COUNT``; interrupts are off."""
    handler = f"lock inc dword ptr [{COUNT}]; iretq"
    gates = bytearray(16 * (VECTOR + 1))
    gates[16 * Vector.NMI : 16 * Vector.NMI + 16] = gates[16 * VECTOR :] = gate(HANDLER)
    return tiny.build(
        {CODE: first, OTHER: second, HANDLER: handler, IDT: bytes(gates)},
        code=(CODE, OTHER, HANDLER),
        maps=[
            *(tiny.map_page(code, code) for code in (OTHER, HANDLER)),
            *(tiny.map_page(data, data, "rw") for data in (OTHER_STACK - PAGE, IDT, NOTHING)),
        ],
        idt=IDT,
        others=[CpuSpec(OTHER, registers={"rsp": OTHER_STACK}, idt=IDT)],
        schedule=Schedule(seed, quantum),
        ipi=IPI,
        options=rest.pop("options", WAYS[way]),
        **rest,
    )


def taken(made: tiny.Tiny) -> int:
    return int.from_bytes(made.machine.read(COUNT, 4), "little")


@each_way
@pytest.mark.parametrize("loop", ["l: jmp l", "l: inc rax; jmp l", "l: pause; jmp l", f"l: mov [{DATA}], rax; jmp l"])
def test_a_vcpu_that_loops_for_ever_leaves_the_other_one_its_turns(loop, way):
    made = build(loop, f"mov ecx, 200; m: dec ecx; jnz m; mov al, 7; {tiny.END}", way=way)
    assert (made.run().reason, made.end.detail["value"], made.end.vcpu) == ("port", 7, 1)


def test_a_vcpu_that_loops_for_ever_has_long_turns_too():
    made = build("l: jmp l", f"mov al, 7; {tiny.END}", quantum=1 << 17, options=RunOptions(seconds=60))
    assert made.run().reason == "port"


@each_way
def test_a_flood_of_interrupts_is_one_pending_bit(way):
    """The other one is halted with interrupts off: nothing piles up, and the budget of exits ends the run."""
    made = build(f"{INTERRUPT_OTHER}; l: out dx, ax; jmp l", "cli; hlt", way=way, limits=Limits(300, 60.0))
    assert made.run().reason == "exits"
    assert made.machine.loop.processors[1].interrupts == {VECTOR}
    assert not made.of(ExternalInterrupt)


@each_way
def test_a_vcpu_may_interrupt_itself(way):
    made = build(f"sti; mov eax, {VECTOR}; mov dx, {IPI}; out dx, ax; nop; hlt", "hlt", way=way)
    assert made.run().reason == "halt"
    assert taken(made) == 1


@each_way
@pytest.mark.parametrize("seed", range(12))
def test_sti_hlt_loses_no_wakeup(way, seed):
    """The other one asks for its work with interrupts off, and halts in the shadow of STI: an interrupt wakes it."""
    asking = f"""
        mov ecx, 20
    again:
        lock inc dword ptr [0x40010]
        {INTERRUPT_OTHER}
    done:
        mov ebx, [0x40010]
        cmp [0x40014], ebx
        jne done
        dec ecx
        jnz again
        mov al, 0
        {tiny.END}
    """
    idle = """
    idle:
        cli
        mov eax, [0x40010]
        cmp eax, [0x40014]
        jne work
        sti
        hlt
        jmp idle
    work:
        lock inc dword ptr [0x40014]
        sti
        jmp idle
    """
    options = evolve(WAYS[way], seconds=30.0)
    made = build(asking, idle, seed=seed, quantum=9, options=options)
    assert made.run().reason == "port"
    # An interrupt whose work was found before it came is still pending at the end, or was taken for nothing.
    assert taken(made) == len(made.of(ExternalInterrupt)) <= 20


@each_way
def test_all_may_halt_and_the_last_one_ends_the_run(way):
    made = build("cli; hlt", f"mov ecx, 100; l: dec ecx; jnz l; {INTERRUPT_OTHER}; hlt", way=way)
    assert made.run().reason == "halt"
    assert {record.vcpu for record in made.of(Hlt)} == {0, 1}


@pytest.mark.parametrize("seed", range(4))
@each_way
def test_a_triple_fault_of_one_is_the_end_of_all(seed, way):
    made = build("ud2", "ud2", way=way, seed=seed)
    made.run()
    (fault,) = made.of(TripleFault)
    assert (made.end.reason, made.end.vcpu) == ("triple fault", fault.vcpu)
    assert made.end.rip == fault.rip in (CODE, OTHER)


@each_way
def test_a_vcpu_that_takes_its_address_space_away_leaves_the_other_one_its_own(way):
    """CR3 is a register of one vCPU; without memory for its IDT it dies, and only then the run."""
    loop = f"mov ecx, 60; l: inc dword ptr [{DATA}]; dec ecx; jnz l; lock inc dword ptr [{DATA + 8}]; hlt"
    wait = f"w: cmp dword ptr [{DATA + 8}], 1; jne w; mov eax, {NOTHING}; mov cr3, rax; nop"
    made = build(loop, wait, way=way)
    assert (made.run().reason, made.end.vcpu) == ("triple fault", 1)
    assert made.machine.read(DATA, 4) == (60).to_bytes(4, "little")


class TestTheHost:
    @each_way
    def test_an_nmi_goes_to_the_vcpu_at_work_though_its_interrupts_are_off(self, way):
        made = build("hlt", "cpuid; nop; hlt", way=way, acts=True)
        nmi = Event(Vector.NMI, EventType.NMI)
        made.machine.on(Cpuid)(lambda _exit: made.machine.inject(nmi))
        assert made.run().reason == "halt"
        assert taken(made) == 1
        assert [(record.vcpu, record.vector) for record in made.of(Injection)] == [(1, Vector.NMI)]

    @each_way
    def test_an_nmi_wakes_a_halted_vcpu(self, way):
        made = build("hlt", f"mov ecx, 200; l: dec ecx; jnz l; hlt; mov al, 9; {tiny.END}", way=way)
        nmi = Event(Vector.NMI, EventType.NMI)
        made.machine.on(Hlt)(lambda halt: made.machine.inject(nmi) if halt.vcpu == 1 else None)
        assert (made.run().reason, made.end.detail["value"]) == ("port", 9)

    @each_way
    @pytest.mark.parametrize("vcpu", [0, 1])
    def test_an_nmi_goes_to_the_vcpu_that_it_is_for(self, way, vcpu):
        """Whoever is at work when the host injects it."""
        made = build("w: nop; jmp w", "cpuid; w: nop; jmp w", way=way)
        nmi = Event(Vector.NMI, EventType.NMI)
        made.machine.on(Cpuid)(lambda _exit: made.machine.inject(nmi, vcpu=vcpu))
        made.machine.observe(lambda record: made.machine.stop() if isinstance(record, Injection) else None, acts=True)
        assert made.run().reason == "stopped"
        assert [(record.vcpu, record.vector) for record in made.of(Injection)] == [(vcpu, Vector.NMI)]

    @each_way
    def test_an_nmi_wakes_a_halted_vcpu_that_is_not_at_work(self, way):
        made = build(f"hlt; mov al, 7; {tiny.END}", "mov ecx, 100; l: dec ecx; jnz l; cpuid; w: jmp w", way=way)
        nmi = Event(Vector.NMI, EventType.NMI)
        made.machine.on(Cpuid)(lambda _exit: made.machine.inject(nmi, vcpu=0))
        assert (made.run().reason, made.end.detail["value"]) == ("port", 7)

    @pytest.mark.parametrize("vcpu", [-1, 2])
    def test_there_is_no_injecting_into_a_vcpu_that_there_is_not(self, vcpu):
        with pytest.raises(OptionError, match=f"vCPU {vcpu}; there are 2, counted from 0"):
            build("hlt", "hlt").machine.inject(Event(Vector.NMI, EventType.NMI), vcpu=vcpu)

    @each_way
    def test_an_interrupt_goes_to_the_vcpu_that_it_is_for(self, way):
        made = build("sti; w: cpuid; jmp w", f"sti; hlt; mov al, 5; {tiny.END}", way=way)
        made.machine.on(Cpuid)(lambda _exit: made.machine.interrupt(VECTOR, vcpu=1))
        assert made.run().detail["value"] == 5
        assert {record.vcpu for record in made.of(ExternalInterrupt)} == {1}

    @each_way
    def test_a_handler_stops_the_run_in_the_turn_of_another_vcpu(self, way):
        made = build("l: jmp l", "mov ebx, 5; cpuid; mov ebx, 6; l: jmp l", way=way)
        made.machine.on(Cpuid)(lambda _exit: made.machine.stop())
        assert (made.run().reason, made.end.vcpu) == ("stopped", 1)
        assert made.end.rip == made.machine.vcpus[1].context.rip

    @pytest.mark.parametrize("quantum", [1, 64, 1 << 20])
    @pytest.mark.parametrize("single_step", [False, True])
    def test_it_breaks_in(self, quantum, single_step):
        made = build("l: jmp l", "l: jmp l", quantum=quantum, options=RunOptions(single_step=single_step, seconds=60))
        over = threading.Event()

        def insist():
            while not over.wait(0.02):
                made.machine.break_in()

        thread = threading.Thread(target=insist)
        thread.start()
        assert made.run().reason == "interrupted"
        over.set()
        thread.join()

    def test_where_it_is_names_the_vcpu(self):
        made = build("l: jmp l", "cpuid; l: jmp l")

        @made.machine.on(Cpuid)
        def fail(_exit):
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine") as raised:
            made.run()
        assert raised.value.__notes__ == [f"guest at {OTHER:#x}, long mode, ring 0, vCPU 1"]
