"""All bundled guests, run in every way, end as their manifests say; what they do does not depend on the way."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import tiny
from attrs import evolve

from vmm.coherence import Coherence
from vmm.guest.loader import bundled_guests, load_guest
from vmm.guest.manifest import Policy
from vmm.machine import Machine, RunOptions
from vmm.memory import PAGE
from vmm.memory.frames import FrameState
from vmm.records import BlockEvent, End, FrameEvent, Modification

GUESTS = {guest.name: guest.path for guest in bundled_guests() if not guest.wrong_of}
WAYS = {
    "plain": (RunOptions(), {}),
    "audit and check": (tiny.STRICT, {}),
    "single step": (RunOptions(single_step=True, check=True), {}),
    "no traps": (RunOptions(traps=False), {}),
    "four blocks": (RunOptions(capacity=4, audit=True, check=True), {}),
    "one block": (RunOptions(capacity=1, audit=True), {}),
    "window": (RunOptions(audit=True, check=True), {"writes": "window"}),
    "adaptive": (RunOptions(audit=True, check=True), {"writes": "adaptive"}),
    "grant": (RunOptions(audit=True, check=True), {"reads": "grant"}),
    "window and grant": (RunOptions(audit=True, check=True), {"writes": "window", "reads": "grant"}),
    "code at load": (RunOptions(audit=True, check=True), {"code": "load"}),
    "code at fetch": (RunOptions(audit=True, check=True), {"code": "fetch"}),
}
#: Ways in which every store to code is stepped, of the same frames.
STEPPING = ("plain", "audit and check", "single step", "four blocks", "one block")
POLICIES = [
    Policy(reads, writes, code)
    for reads in ("step", "grant")
    for writes in ("step", "window", "adaptive")
    for code in ("load", "fetch")
]



def refuses(policy: Policy) -> bool:
    """Whether there are accesses that the guest is not let through with."""
    return policy.wx != "off" or policy.code == "seal"


#: Every guest in every way; what a policy refuses to a guest needs traps.
RUNS = [
    (name, way)
    for name, path in GUESTS.items()
    for way, (options, _) in WAYS.items()
    if options.traps or not refuses(load_guest(path).manifest.policy)
]

each_guest = pytest.mark.parametrize("name", GUESTS)


def machine_for(path: Path, options: RunOptions, policy: dict[str, str]) -> Machine:
    guest = load_guest(path)
    if not options.traps:
        options = evolve(options, coherence=Coherence.COHERENT)
    if guest.manifest.policy.code == "seal":  # which is part of what the guest is, not of how it is run
        policy = {key: value for key, value in policy.items() if key != "code"}
    manifest = evolve(guest.manifest, policy=evolve(guest.manifest.policy, **policy))
    return Machine(evolve(guest, manifest=manifest), options)


@cache
def outcome(name: str, way: str, *, traced: bool = True):
    """(end, registers, RAM, text, modifications) of one run."""
    options, policy = WAYS[way]
    machine = machine_for(GUESTS[name], options, policy)
    records = tiny.watch(machine).records if traced else []
    end = machine.run()
    machine.verify()
    memory = machine.guest.manifest.machine.memory
    state = machine.vcpu.context.registers(), machine.read(0, memory), bytes(machine.console.output)
    return end, state, [evolve(r, blocks=()) for r in records if isinstance(r, Modification)]


@pytest.mark.parametrize(("name", "way"), RUNS)
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "untraced"])
def test_ends_as_its_manifest_says(name, way, traced):
    wanted = load_guest(GUESTS[name]).manifest.end
    end, _, _ = outcome(name, way, traced=traced)
    assert (end.reason, end.detail) == ("port", {"port": wanted.port, "value": wanted.value})


@each_guest
def test_the_way_leaves_no_mark_on_the_guest(name):
    """Registers, memory and text are those of the guest executed one instruction at a time."""
    _, state, _ = outcome(name, "single step")
    for way in [way for one, way in RUNS if one == name]:
        for traced in (True, False):
            assert outcome(name, way, traced=traced)[1] == state, (way, traced)


@each_guest
def test_every_way_that_steps_records_the_same(name):
    wanted = outcome(name, "plain")[2]
    for way in STEPPING:
        if name == "remap" and way == "single step":
            continue  # its frames become code at their first fetch, which a translation does earlier than a step
        assert outcome(name, way)[2] == wanted, way


@each_guest
def test_two_runs_report_the_same(name):
    def records():
        made = tiny.watch(machine_for(GUESTS[name], tiny.STRICT, {}))
        made.run()
        return made.records

    assert records() == records()


class Shadow:
    """A copy of every frame that is code, changed only by what the records say."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.copies = {
            frame.hpa: bytearray(machine.memory.read(frame.hpa, PAGE))
            for frame in machine.frames
            if frame.state in (FrameState.CODE, FrameState.SEALED)
        }
        machine.observe(self.see)

    def see(self, record) -> None:
        if isinstance(record, FrameEvent) and record.after == "code" and record.before == "data":
            self.copies[record.gpa] = bytearray(self.machine.read(record.gpa, PAGE))
        elif isinstance(record, Modification):
            for i, (old, new) in enumerate(zip(record.old, record.new, strict=True)):
                copy = self.copies.get(record.gpa + i & -PAGE)
                if copy is not None:
                    assert copy[(record.gpa + i) % PAGE] == old
                    copy[(record.gpa + i) % PAGE] = new


@each_guest
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.reads}-{policy.writes}-{policy.code}")
def test_the_journal_misses_nothing(name, policy):
    machine = machine_for(
        GUESTS[name], RunOptions(), {"reads": policy.reads, "writes": policy.writes, "code": policy.code}
    )
    shadow = Shadow(machine)
    assert machine.run().reason == "port"
    assert shadow.copies
    for hpa, copy in shadow.copies.items():
        assert machine.memory.read(hpa, PAGE) == copy, hex(hpa)


@each_guest
def test_counters_add_up(name):
    made = tiny.watch(machine_for(GUESTS[name], tiny.STRICT, {}))
    end = made.run()
    blocks, counters = made.machine.blocks, made.machine.blocks.counters
    assert isinstance(end, End)
    assert counters.created == len(blocks) + counters.invalidated + counters.evicted
    events = [record.event for record in made.of(BlockEvent)]
    assert (events.count("created"), events.count("invalidated"), events.count("evicted")) == (
        counters.created,
        counters.invalidated,
        counters.evicted,
    )
    assert made.machine.door.modifications == len(made.modifications)
    assert sum(made.machine.reporter.counts.values()) == made.machine.reporter.total == len(made.exits)


def test_they_show_what_they_are_for():
    """Between them the guests patch, and blocks die of it."""
    assert sum(len(outcome(name, "plain")[2]) for name in GUESTS) > 300
