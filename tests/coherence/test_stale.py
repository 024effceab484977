"""Stale execution, end to end: what a guest sees in each model, and what is reported of it."""

from __future__ import annotations

import pytest
import tiny
from attrs import evolve
from tiny import CODE, DATA, PAGE

from vmm.coherence import Coherence
from vmm.guest.manifest import CpuSpec, Policy, Schedule
from vmm.machine import RunOptions
from vmm.records import StaleExecution

VIEW = 0x70000
FUNCTION = CODE + 0x800
RETURN_99 = bytes.fromhex("b863000000c3")  # mov eax, 99; ret
MAPS = (tiny.map_page(VIEW, CODE, "rw"),)
WAYS = {
    "audited": tiny.STRICT,
    "stepped": RunOptions(single_step=True, check=True),
    "one block": RunOptions(capacity=1),
    "four blocks": RunOptions(capacity=4, check=True),
}
SYNCHRONISED = {
    Coherence.COHERENT: "nop",
    Coherence.SERIALISED: "push rbx; cpuid; pop rbx",
    Coherence.EXPLICIT: f"clflush [{FUNCTION:#x}]",
}
WEAK = (Coherence.SERIALISED, Coherence.EXPLICIT)

each_way = pytest.mark.parametrize("way", WAYS)
each_weak = pytest.mark.parametrize("model", WEAK, ids=lambda model: model.value)


def patching(sync: str) -> str:
    """Patch and call a function three times; the three results come to lie in R15."""
    return f"""
        mov ebx, 3
    again:
        mov dword ptr [{VIEW + 0x801:#x}], ebx
        {sync}
        call {FUNCTION:#x}
        shl r15, 8
        add r15d, eax
        dec ebx
        jnz again
        mov al, 0
        {tiny.END}
    """


def build(source, *, model: Coherence, options: RunOptions = tiny.STRICT, maps=MAPS, **rest):
    parts = {CODE: source, FUNCTION: RETURN_99} if isinstance(source, str) else source
    return tiny.build(parts, maps=maps, options=evolve(options, coherence=model), **rest)


def run(source, **rest):
    made = build(source, **rest)
    made.run()
    made.machine.verify()
    return made


def stale(made) -> list[StaleExecution]:
    return made.of(StaleExecution)


@each_way
@pytest.mark.parametrize("model", Coherence, ids=lambda model: model.value)
def test_what_is_synchronised_is_seen(model, way):
    made = run(patching(SYNCHRONISED[model]), model=model, options=WAYS[way])
    assert made.machine.register("r15") == 0x030201
    assert stale(made) == []


@each_way
@each_weak
def test_what_is_not_is_the_oldest_version(model, way):
    made = run(patching("nop"), model=model, options=WAYS[way])
    assert made.machine.register("r15") == 0x636363
    assert [(record.rip, record.executed, record.memory) for record in stale(made)] == [
        (FUNCTION, bytes.fromhex("b863000000"), bytes.fromhex(f"b80{version}000000")) for version in (3, 2, 1)
    ]


@each_weak
def test_the_report_says_who_when_and_what_was_missing(model):
    made = run(patching("nop"), model=model)
    writer = CODE + 5
    for record, change in zip(stale(made), made.modifications, strict=True):
        assert (record.writer, record.writer_vcpu) == (writer, 0)
        assert (record.instruction, change.rip) == (change.instruction, writer)
        assert record.gpa == FUNCTION
    assert {record.missing for record in stale(made)} == {
        "a serialising instruction" if model is Coherence.SERIALISED else "a flush of these bytes"
    }
    times = [record.time for record in stale(made)]
    assert times == sorted(set(times))


@each_weak
@pytest.mark.parametrize("other", ["nop", "mfence", "push rbx; lfence; pop rbx"])
def test_fences_synchronise_nothing(model, other):
    assert len(stale(run(patching(other), model=model))) == 3


def test_a_flush_of_another_line_is_none():
    made = run(patching(f"clflush [{FUNCTION + 64:#x}]"), model=Coherence.EXPLICIT)
    assert made.machine.register("r15") == 0x636363


def test_a_flush_through_the_view_is_one():
    made = run(patching(f"clflush [{VIEW + 0x800:#x}]"), model=Coherence.EXPLICIT)
    assert made.machine.register("r15") == 0x030201


def test_a_flush_of_nothing_mapped_does_no_harm():
    made = run(patching("clflush [0x7ffff000]"), model=Coherence.EXPLICIT)
    assert len(stale(made)) == 3


@each_way
@each_weak
def test_code_that_is_written_as_data_and_never_synchronised_is_what_was_there_before(model, way):
    """The first version of code in a fresh page: a translator that forgets to synchronise runs zeros."""
    source = f"""
        mov dword ptr [{DATA:#x}], 0xc3c0ff
        call {DATA + PAGE:#x}
        mov al, 0
        {tiny.END}
    """  # inc eax; ret
    zeros = tiny.assemble("add [rax], al")
    made = run(
        {CODE: source},
        model=model,
        options=WAYS[way],
        maps=(tiny.map_page(DATA + PAGE, DATA, "rx"), tiny.map_page(0, 0, "rw")),
        code=(CODE,),
        limits=None,
    )
    first = stale(made)[0]
    assert (first.rip, first.executed, first.writer) == (DATA + PAGE, zeros, CODE)
    assert first.instruction is None


@each_weak
def test_a_block_that_patches_itself_ahead_runs_the_old_bytes(model):
    """The store and what it patches are in one block."""
    source = f"""
        mov byte ptr [{VIEW + 10:#x}], 7
        xor ebx, ebx
        mov al, 1
        {tiny.END}
    """
    code = tiny.assemble(source)
    at = code.index(b"\xb0\x01")
    made = run(source.replace(f"{VIEW + 10:#x}", f"{VIEW + at + 1:#x}"), model=model)
    assert made.end.detail["value"] == 1
    assert [record.rip for record in stale(made)] == [CODE + at]
    coherent = run(source.replace(f"{VIEW + 10:#x}", f"{VIEW + at + 1:#x}"), model=Coherence.COHERENT)
    assert coherent.end.detail["value"] == 7


@each_weak
def test_the_same_bytes_are_not_stale(model):
    source = patching("nop").replace("], ebx", "], 99")
    made = run(source, model=model)
    assert made.machine.register("r15") == 0x636363
    assert stale(made) == []


@each_weak
def test_bytes_that_are_written_back_are_not_stale(model):
    source = patching("mov dword ptr [0x70801], 99")
    assert stale(run(source, model=model)) == []


@each_weak
def test_a_change_by_the_host_waits_as_well(model):
    made = build(patching(SYNCHRONISED[model]).replace("], ebx", "+0x100], ebx"), model=model)
    made.machine.write(FUNCTION + 1, b"\x05")
    made.run()
    assert made.machine.register("r15") == 0x050505


@each_weak
def test_a_stale_instruction_that_faults_is_reported(model):
    """UD2 is replaced by NOPs, and runs."""
    source = f"""
        mov word ptr [{VIEW + 0x800:#x}], 0x9090
        call {FUNCTION:#x}
    """
    for options in WAYS.values():
        made = run({CODE: source, FUNCTION: b"\x0f\x0b\xc3"}, model=model, options=options)
        assert [(record.rip, record.executed) for record in stale(made)][:1] == [(FUNCTION, b"\x0f\x0b")]
        assert made.end.reason == "triple fault"


@each_weak
def test_endless_stale_execution_uses_the_budget_up(model):
    source = f"""
        mov dword ptr [{VIEW + 0x801:#x}], 1
    again:
        call {FUNCTION:#x}
        jmp again
    """
    made = run(source, model=model, limits=tiny.Limits(exits=500, seconds=10.0))
    assert made.end.reason == "exits"
    assert made.machine.sanitizer.found <= 501


@each_weak
@pytest.mark.parametrize("reads", ["step", "grant"])
@pytest.mark.parametrize("writes", ["step", "window", "adaptive"])
@pytest.mark.parametrize("code", ["load", "fetch"])
def test_policies_make_no_difference(model, reads, writes, code):
    policy = Policy(reads, writes, code)
    for sync, wanted in (("nop", 0x636363), (SYNCHRONISED[model], 0x030201)):
        assert run(patching(sync), model=model, policy=policy).machine.register("r15") == wanted


class TestTwo:
    """One vCPU patches, the other one has to serialise."""

    CALLER = f"""
    wait:
        cmp dword ptr [{DATA:#x}], 1
        jne wait
        {{sync}}
        call {FUNCTION:#x}
        {tiny.END}
    """
    PATCHER = f"""
        mov dword ptr [{VIEW + 0x801:#x}], 5
        {{sync}}
        mov dword ptr [{DATA:#x}], 1
        hlt
    """

    def run(self, *, caller: str, patcher: str, model: Coherence, options: RunOptions = tiny.STRICT, seed: int = 1):
        parts = {
            CODE: self.CALLER.format(sync=caller),
            FUNCTION: RETURN_99,
            CODE + PAGE: self.PATCHER.format(sync=patcher),
        }
        made = tiny.build(
            parts,
            maps=(*MAPS, tiny.map_page(CODE + PAGE, CODE + PAGE)),
            options=evolve(options, coherence=model),
            others=[CpuSpec(CODE + PAGE, registers={"rsp": tiny.STACK - 0x800})],
            schedule=Schedule(seed, 16),
        )
        made.run()
        return made

    @pytest.mark.parametrize("seed", range(4))
    @each_way
    def test_serialising_on_the_side_that_executes(self, way, seed):
        made = self.run(caller="cpuid", patcher="nop", model=Coherence.SERIALISED, options=WAYS[way], seed=seed)
        assert made.end.detail["value"] == 5

    @pytest.mark.parametrize("seed", range(4))
    @each_way
    def test_serialising_on_the_other_side_helps_nobody(self, way, seed):
        made = self.run(caller="nop", patcher="cpuid", model=Coherence.SERIALISED, options=WAYS[way], seed=seed)
        assert made.end.detail["value"] == 99
        (record,) = stale(made)
        assert (record.vcpu, record.writer_vcpu, record.writer) == (0, 1, CODE + PAGE)

    def test_a_flush_is_for_all(self):
        made = self.run(caller="nop", patcher=f"clflush [{FUNCTION:#x}]", model=Coherence.EXPLICIT)
        assert made.end.detail["value"] == 5


def test_coherent_is_the_default_and_has_no_twins():
    made = tiny.build("hlt")
    assert made.machine.sanitizer is None
    last = made.machine.memory.size - 1
    assert made.machine.memory.home(last) == last
