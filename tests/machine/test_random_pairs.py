"""Random pairs of programs that patch each other end the same however they are run.

The oracle executes one instruction at a time and throws every translation away before each: neither vCPU can run
anything stale.
"""

from __future__ import annotations

import random

import pytest
import tiny
from attrs import evolve
from random_guests import RandomGuest
from random_pairs import RandomPair

from vmm.coherence import Coherence
from vmm.cpu.engine import PRIVATE_BASE, PRIVATE_PAGES
from vmm.exits import ExceptionExit, ExternalInterrupt, IoInstruction
from vmm.guest.manifest import Policy
from vmm.machine import RunOptions
from vmm.memory import PAGE
from vmm.records import StaleExecution
from vmm.vcpu import VirtualCpu

STEP = Policy(code="load")
SEEDS = 4
CAMPAIGN = 200
PIECE = 20
WAYS = {
    "audited": tiny.STRICT,
    "free": RunOptions(),
    "four blocks": evolve(tiny.STRICT, capacity=4),
    "one block": RunOptions(capacity=1),
    "stepped": RunOptions(single_step=True),
}
POLICIES = (
    evolve(STEP, writes="window"),
    evolve(STEP, writes="adaptive", reads="grant"),
    evolve(STEP, code="fetch"),
)


def run(pair: RandomGuest, segments, *, options: RunOptions, policy: Policy = STEP, flushed: bool = False) -> tiny.Tiny:
    made = pair.build(segments, options=options, policy=policy)
    for vcpu in made.machine.vcpus if flushed else ():
        flush_before_each_step(vcpu)
    with made.machine:
        made.run()
        made.machine.verify()
    return made


def flush_before_each_step(vcpu: VirtualCpu) -> None:
    """Make the stepping engine forget all that it has translated, and what it has latched, before each step."""
    stepping, step = vcpu.stepping, vcpu.step

    def flushing_step():
        stepping._slots.clear()
        stepping._latched.clear()
        stepping.forget(PRIVATE_BASE, PRIVATE_PAGES * PAGE)
        return step()

    vcpu.step = flushing_step


def state(made: tiny.Tiny):
    """What the two end with, and how many instructions each has completed."""
    machine = made.machine
    registers = [vcpu.context.registers() for vcpu in machine.vcpus]
    retired = [vcpu.pace.retired for vcpu in machine.vcpus]
    return made.end, registers, retired, machine.read(0, tiny.MEMORY), bytes(machine.console.output)


def events(made: tiny.Tiny):
    """What happened in which order, apart from the trap itself."""
    return made.of(IoInstruction, ExternalInterrupt, ExceptionExit)


def compare(seed: int) -> int:
    """Run one pair in every way; the number of modifications."""
    pair = RandomPair(seed)
    segments = pair.segments()
    oracle = run(pair, segments, options=RunOptions(check=True, single_step=True), flushed=True)
    for name, options in WAYS.items():
        made = run(pair, segments, options=options)
        assert state(made) == state(oracle), name
        assert made.architectural() == oracle.architectural(), name
        assert events(made) == events(oracle), name
    for policy in POLICIES:
        made = run(pair, segments, options=RunOptions(check=True, audit=True), policy=policy)
        assert state(made) == state(oracle), policy
        assert events(made) == events(oracle), policy
    return len(oracle.modifications)


def compare_stale(seed: int, model: Coherence) -> int:
    """Run one pair in every way where fetches lag behind; the number of stale executions."""
    pair = RandomPair(seed)
    segments = pair.segments()

    def seen(options: RunOptions):
        made = run(pair, segments, options=evolve(options, coherence=model))
        stale = [evolve(record, time=0) for record in made.of(StaleExecution)]
        return state(made), made.architectural(), events(made), stale

    results = {name: seen(options) for name, options in WAYS.items()}
    assert all(result == results["stepped"] for result in results.values())
    return len(results["stepped"][3])


@pytest.mark.parametrize("seed", range(SEEDS))
def test_all_ways_of_running_agree(seed):
    compare(seed)


@pytest.mark.parametrize("model", [Coherence.SERIALISED, Coherence.EXPLICIT], ids=lambda model: model.value)
def test_all_ways_of_running_are_stale_alike(model):
    assert compare_stale(SEEDS, model) > 10


def test_the_pairs_are_worth_running():
    """They end as they should, both patch, blocks of one die of the other's stores, interrupts come."""
    ends, patching, interrupts, foreign = [], set(), 0, 0
    for seed in range(12):
        pair = RandomPair(seed)
        made = run(pair, pair.segments(), options=tiny.STRICT)
        ends.append(made.end.reason)
        patching |= {record.vcpu for record in made.modifications}
        interrupts += len(made.of(ExternalInterrupt))
        foreign += sum(r.event == "invalidated" and r.owner != r.vcpu for r in made.block_events)
    assert ends.count("port") >= 10
    assert patching == {0, 1}
    assert interrupts > 20
    assert foreign > 50


@pytest.mark.long
@pytest.mark.parametrize("piece", range(CAMPAIGN // PIECE))
def test_campaign(piece):
    rng = random.Random(0x52 + piece)
    assert sum(compare(rng.getrandbits(40)) for _ in range(PIECE)) > 10 * PIECE


@pytest.mark.long
@pytest.mark.parametrize("model", [Coherence.SERIALISED, Coherence.EXPLICIT], ids=lambda model: model.value)
@pytest.mark.parametrize("piece", range(CAMPAIGN // PIECE))
def test_stale_campaign(piece, model):
    rng = random.Random(0x53 + piece)
    assert sum(compare_stale(rng.getrandbits(40), model) for _ in range(PIECE)) > 10 * PIECE
