"""Several vCPUs on one memory: turns are a function of the seed, whatever way the instructions are executed in."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import tiny
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from tiny import CODE, DATA, PAGE

from vmm.errors import OptionError
from vmm.exits import EptViolation, ExceptionExit, ExternalInterrupt
from vmm.guest.manifest import CpuSpec, Schedule
from vmm.machine import RunOptions
from vmm.records import BlockEvent, End, Modification, RefusedAccess
from vmm.scheduler import Scheduler

OTHER = 0x20000
OTHER_STACK = 0x60000
IPI = 0xB0
WAYS = {
    "free": RunOptions(),
    "audited": tiny.STRICT,
    "stepped": RunOptions(single_step=True, check=True),
    "four blocks": RunOptions(capacity=4, check=True),
    "one block": RunOptions(capacity=1),
}
MAPS = (
    tiny.map_page(OTHER, OTHER),
    tiny.map_page(OTHER_STACK - PAGE, OTHER_STACK - PAGE, "rw"),
    tiny.map_page(DATA + PAGE, CODE, "rw"),
)

#: Both vCPUs append their number to a log, a hundred times each; LOOP and STRING are of different lengths.
LOGGING = """
    mov edi, 0x40100
    mov ecx, 60
again:
    mov eax, 1
    lock xadd dword ptr [0x40000], eax
    mov byte ptr [rdi + rax], {number}
    push rcx
    push rdi
    mov edi, 0x40800
    mov ecx, {length}
    rep stosb
    pop rdi
    pop rcx
    dec ecx
    jnz again
    lock inc dword ptr [0x40010]
wait:
    cmp dword ptr [0x40010], 2
    jne wait
    mov al, 0
    {end}
"""


def build(first: str, second: str, *, seed: int = 1, quantum: int = 40, options: RunOptions = tiny.STRICT, **rest):
    other = CpuSpec(OTHER, registers={"rsp": OTHER_STACK})
    return tiny.build(
        {CODE: first, OTHER: second},
        maps=MAPS,
        others=[other],
        schedule=Schedule(seed, quantum),
        options=options,
        **rest,
    )


def log_of(seed: int, options: RunOptions) -> tuple[bytes, tuple]:
    made = build(
        LOGGING.format(number=1, length=3, end=tiny.END),
        LOGGING.format(number=2, length=0, end="hlt"),
        seed=seed,
        options=options,
    )
    end = made.run()
    assert end.reason == "port"
    registers = [vcpu.context.registers() for vcpu in made.machine.vcpus]
    return made.machine.read(DATA + 0x100, 120), (registers, made.machine.read(0, tiny.MEMORY))


@pytest.mark.parametrize("seed", range(8))
def test_an_interleaving_is_the_same_in_every_way_of_running(seed):
    logs = {name: log_of(seed, options) for name, options in WAYS.items()}
    assert all(logs[name] == logs["stepped"] for name in WAYS), {name: log[0] for name, log in logs.items()}


def test_another_seed_is_another_interleaving():
    logs = {log_of(seed, RunOptions())[0] for seed in range(8)}
    assert len(logs) == 8
    assert {frozenset(Counter(log).items()) for log in logs} == {frozenset({(1, 60), (2, 60)})}


def test_both_get_their_share():
    log, _ = log_of(3, RunOptions())
    changes = sum(one != other for one, other in pairwise(log))
    assert changes > 20


PATCHING = """
    mov edi, 0x41000 + 0x800
    mov ecx, 50
again:
    mov dword ptr [rdi + 1], ecx
    call 0x10800
    add r15d, eax
    dec ecx
    jnz again
    lock inc dword ptr [0x40010]
wait:
    cmp dword ptr [0x40010], 2
    jne wait
    mov al, 0
    out 0xf4, al
"""
CALLING = """
    mov ecx, 200
again:
    call 0x10800
    mov dword ptr [0x40100 + rcx * 4], eax
    dec ecx
    jnz again
    lock inc dword ptr [0x40010]
    hlt
"""
FUNCTION = bytes.fromhex("b8 63000000 c3")  # mov eax, 99; ret


class TestPatching:
    """One vCPU patches, through an alias, a function that both of them call."""

    def machine(self, seed: int, options: RunOptions):
        made = build(PATCHING, CALLING, seed=seed, options=options)
        made.machine.write(CODE + 0x800, FUNCTION)
        return made

    @pytest.mark.parametrize("seed", range(6))
    def test_every_version_is_seen_in_its_order(self, seed):
        made = self.machine(seed, tiny.STRICT)
        assert made.run().reason == "port"
        data = made.machine.read(DATA + 0x100, 201 * 4)
        seen = [int.from_bytes(data[4 * i : 4 * i + 4], "little") for i in range(200, 0, -1)]
        assert seen == sorted(seen, reverse=True)
        assert len(set(seen)) > 1
        assert made.machine.vcpus[0].context.registers()["r15"] == sum(range(1, 51))

    def test_a_patch_ends_the_translations_of_all(self):
        made = self.machine(1, tiny.STRICT)
        made.run()
        dead = [event for event in made.of(BlockEvent) if event.event == "invalidated" and event.vcpu == 0]
        assert {event.owner for event in dead if event.gva == CODE + 0x800} == {0, 1}

    def test_records_name_the_vcpu(self):
        made = self.machine(1, tiny.STRICT)
        made.run()
        guest_made = [m for m in made.of(Modification) if m.cause == "store"]
        assert {m.vcpu for m in guest_made} == {0}
        assert {v.vcpu for v in made.of(EptViolation)} <= {0, 1}
        assert made.end.vcpu == made.of(End)[0].vcpu == 0

    @pytest.mark.parametrize("seed", range(4))
    def test_all_ways_agree(self, seed):
        states = {}
        for name, options in WAYS.items():
            made = self.machine(seed, options)
            made.run()
            registers = [vcpu.context.registers() for vcpu in made.machine.vcpus]
            patches = [evolve(record, blocks=()) for record in made.modifications]
            states[name] = registers, made.machine.read(0, tiny.MEMORY), patches
        assert all(state == states["stepped"] for state in states.values())


IDT = 0x42000
GATE_VECTOR = 0x41


def gate(handler: int) -> bytes:
    low, middle, high = handler & 0xFFFF, handler >> 16 & 0xFFFF, handler >> 32
    parts = (low, 2), (0x08, 2), (0x8E00, 2), (middle, 2), (high, 4), (0, 4)
    return b"".join(value.to_bytes(size, "little") for value, size in parts)


#: The second round of each loop goes to the middle of the block that the first one was in.
LOOPS = "mov ecx, 3; one: dec ecx; jnz one; mov ecx, 3; two: dec ecx; jnz two; mov ecx, 3; repe scasb; mov al, 0;"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_counted_is_what_was_executed(way, seed):
    loops = f"mov edi, {DATA}; {LOOPS}"
    counted = 1 + (1 + 6) + (1 + 6) + 3 + 1
    made = build(f"{loops} hlt", f"{loops} hlt", seed=seed, quantum=5, options=WAYS[way])
    assert made.run().reason == "halt"
    assert [vcpu.pace.retired for vcpu in made.machine.vcpus] == [counted, counted]


class TestInterprocessorInterrupts:
    SENDER = f"""
        mov eax, 0x0141
        mov dx, {IPI}
        out dx, ax
    wait:
        cmp dword ptr [0x40010], 1
        jne wait
        in al, dx
        out 0xf4, al
    """
    #: Halted until the interrupt comes; its handler is at +0x100.
    RECEIVER = "sti; hlt; inc dword ptr [0x40010]; hlt"
    HANDLER = f"push rax; push rdx; mov dx, {IPI}; in al, dx; mov byte ptr [0x40020], al; pop rdx; pop rax; iretq"

    def run(self, seed: int, options: RunOptions = tiny.STRICT):
        made = self.build(seed, options)
        made.run()
        return made

    def build(self, seed: int, options: RunOptions, *, quantum: int = 20):
        idt = bytes(16 * GATE_VECTOR) + gate(OTHER + 0x800)
        other = CpuSpec(OTHER, registers={"rsp": OTHER_STACK}, idt=IDT)
        return tiny.build(
            {CODE: self.SENDER, OTHER: self.RECEIVER, OTHER + 0x800: self.HANDLER, IDT: idt},
            code=(CODE, OTHER, OTHER + 0x800),
            maps=(*MAPS, tiny.map_page(IDT, IDT, "rw")),
            others=[other],
            schedule=Schedule(seed, quantum),
            ipi=IPI,
            options=options,
        )

    @pytest.mark.parametrize("seed", range(8))
    def test_its_delivery_is_one_of_the_instructions_of_a_turn(self, seed):
        """A turn that ends with the delivery does not execute the handler's first instruction."""
        turns = {way: self.turns(seed, WAYS[way]) for way in ("free", "stepped")}
        assert turns["free"] == turns["stepped"]

    def turns(self, seed: int, options: RunOptions) -> list[tuple[int, ...]]:
        """How many instructions each vCPU has completed at the start of each turn; turns are of one or two."""
        made, counts = self.build(seed, options, quantum=2), []
        draw = made.machine.loop._scheduler.draw

        def noting(ready):
            counts.append(tuple(vcpu.pace.retired for vcpu in made.machine.vcpus))
            return draw(ready)

        made.machine.loop._scheduler.draw = noting
        made.run()
        return counts

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("way", WAYS)
    def test_wakes_the_one_that_it_is_for(self, seed, way):
        made = self.run(seed, WAYS[way])
        assert (made.end.reason, made.end.detail["value"]) == ("port", 0)
        assert made.machine.read(DATA + 0x20, 1) == b"\x01"
        assert [(record.vcpu, record.vector) for record in made.of(ExternalInterrupt)] == [(1, GATE_VECTOR)]


def test_the_run_halts_when_all_do():
    made = build("hlt", "mov ecx, 1000; l: dec ecx; jnz l; hlt")
    assert made.run().reason == "halt"
    assert made.machine.vcpus[1].context.registers()["rcx"] == 0


def test_a_vcpu_that_there_is_not():
    with pytest.raises(OptionError, match="there are 2"):
        build("hlt", "hlt").machine.interrupt(0x40, vcpu=2)


def test_each_has_a_task_register_of_its_own():
    made = build("str ax; mov [0x40000], ax; hlt", "str ax; mov [0x40002], ax; hlt")
    made.run()
    assert made.machine.read(DATA, 4) == b"\x28\x00\x38\x00"
    first, second = (vcpu.context.segment("tr").base for vcpu in made.machine.vcpus)
    assert second == first + 0x80


def test_a_guest_that_never_ends_is_stopped():
    made = build("l: jmp l", "l: jmp l", options=RunOptions(seconds=0.2))
    assert made.run().reason == "time"


@given(st.integers(0, 1 << 64), st.integers(1, 200), st.integers(1, 4))
def test_turns_are_within_their_bounds(seed, quantum, count):
    one, other = Scheduler(seed, quantum), Scheduler(seed, quantum)
    ready = list(range(count))
    for _ in range(50):
        who, instructions = one.draw(ready)
        assert who in ready
        assert 1 <= instructions <= quantum
        assert other.draw(ready) == (who, instructions)


WRITING = f"""
    mov ecx, 30
again:
    mov byte ptr [{tiny.DATA + 0x1000}], 0x90
    pause
    dec ecx
    jnz again
    mov al, 0
    {tiny.END}
"""
RUNNING = "again: mov eax, 0x70000; call rax; jmp again"


def refusals_of(seed: int, options: RunOptions) -> tuple[list, list]:
    """One vCPU writes what the other one runs, under W^X; each goes on behind what was refused."""
    options = evolve(options, wx="fault")
    other = CpuSpec(OTHER, registers={"rsp": OTHER_STACK})
    shared = (tiny.map_page(0x70000, 0x70000, "rx"), tiny.map_page(DATA + PAGE, 0x70000, "rw"))
    made = tiny.build(
        {CODE: WRITING, OTHER: RUNNING, 0x70000: b"\x90\xc3"},
        maps=(tiny.map_page(CODE, CODE, "rx"), tiny.map_page(OTHER, OTHER, "rx"), MAPS[1], *shared),
        others=[other],
        schedule=Schedule(seed, 10),
        options=options,
    )

    @made.machine.on(ExceptionExit)
    def skip(fault: ExceptionExit) -> bool:
        context = made.machine.vcpus[fault.vcpu].context
        if fault.vcpu == 0:
            context.rip += 8
        else:
            context.rip = int.from_bytes(made.machine.read(context.rsp, 8), "little")
            context.rsp += 8
        return True

    assert made.run().reason == "port"
    return made.of(RefusedAccess), made.architectural()


@pytest.mark.parametrize("seed", range(4))
def test_w_xor_x_refuses_the_same_in_every_way_of_running(seed):
    wanted = refusals_of(seed, WAYS["stepped"])
    assert {record.rule for record in wanted[0]} <= {"mapping", "approval"}
    assert len(wanted[0]) > 5
    for name, options in WAYS.items():
        assert refusals_of(seed, options) == wanted, name


@pytest.mark.parametrize("quantum", range(1, 12))
def test_a_fetch_that_is_refused_right_after_a_turn_belongs_to_the_next_one(quantum):
    """Each call faults at its target: which vCPU has come how far when it does is the same, stepped or not."""

    def faults(options):
        first = f"mov ecx, 40; again: dec ecx; jnz again; {tiny.END}"
        made = build(first, "again: mov eax, 0x90000; call rax; jmp again", seed=5, quantum=quantum, options=options)
        seen = []

        @made.machine.on(ExceptionExit)
        def skip(fault: ExceptionExit) -> bool:
            context = made.machine.vcpus[1].context
            context.rip = int.from_bytes(made.machine.read(context.rsp, 8), "little")
            context.rsp += 8
            seen.append(made.machine.vcpus[0].context.registers()["rcx"])
            return True

        assert made.run().reason == "port"
        return seen

    assert faults(WAYS["free"]) == faults(WAYS["stepped"])
