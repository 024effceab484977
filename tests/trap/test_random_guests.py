"""Random guests that patch themselves through aliases end the same however they are run.

The oracle executes one instruction at a time and throws every translation away before each: it cannot run
anything stale.
"""

from __future__ import annotations

import random

import pytest
import tiny
from attrs import evolve
from random_guests import RandomGuest

from vmm.cpu.engine import PRIVATE_BASE, PRIVATE_PAGES
from vmm.guest.manifest import Policy
from vmm.machine import RunOptions
from vmm.memory import PAGE

STEP = Policy(code="load")
SEEDS = 36
CAMPAIGN = 1000
PIECE = 25


def run(
    guest: RandomGuest, segments, *, options: RunOptions = tiny.STRICT, policy: Policy = STEP, flushed: bool = False
):
    made = guest.build(segments, options=options, policy=policy)
    if flushed:
        flush_before_each_step(made)
    end = made.run()
    assert end.detail.get("value") == 0, end
    made.machine.verify()
    return made


def flush_before_each_step(made: tiny.Tiny) -> None:
    """Make the stepping engine forget all that it has translated, and what it has latched, before each step."""
    stepping, step = made.machine.vcpu.stepping, made.machine.vcpu.step

    def flushing_step():
        stepping._slots.clear()
        stepping._latched.clear()
        stepping.forget(PRIVATE_BASE, PRIVATE_PAGES * PAGE)
        return step()

    made.machine.vcpu.step = flushing_step


def compare(seed: int) -> int:
    """Run one guest in every way; the number of modifications."""
    guest = RandomGuest(seed)
    segments = guest.segments()
    oracle = run(guest, segments, options=RunOptions(check=True, single_step=True), flushed=True)
    assert oracle.machine.blocks.counters.created == 0
    ways = {
        "free": run(guest, segments),
        "four blocks": run(guest, segments, options=evolve(tiny.STRICT, capacity=4)),
        "one block": run(guest, segments, options=evolve(tiny.STRICT, capacity=1)),
        "stepped": run(guest, segments, options=RunOptions(single_step=True)),
    }
    for name, made in ways.items():
        assert made.state() == oracle.state(), name
        assert made.architectural() == oracle.architectural(), name
        assert [(v.rip, v.gpa, v.gva, v.qualification) for v in made.violations] == [
            (v.rip, v.gpa, v.gva, v.qualification) for v in oracle.violations
        ], name
    for policy in (
        evolve(STEP, writes="window"),
        evolve(STEP, writes="adaptive"),
        evolve(STEP, reads="grant"),
        evolve(STEP, reads="grant", writes="adaptive", code="fetch"),
        evolve(STEP, code="fetch"),
    ):
        assert run(guest, segments, policy=policy).state() == oracle.state(), policy
    return len(oracle.modifications)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_all_ways_of_running_agree(seed):
    compare(seed)


def test_the_guests_are_worth_running():
    """They patch, they run what they patched, blocks die, stores straddle frames."""
    modifications = deaths = straddles = bytes_changed = 0
    for seed in range(12):
        guest = RandomGuest(seed)
        made = run(guest, guest.segments())
        records = made.modifications
        modifications += len(records)
        deaths += sum(len(record.blocks) for record in records)
        straddles += len(records) - len({record.instruction for record in records})
        bytes_changed += sum(record.old != record.new for record in records)
    assert modifications > 300
    assert deaths > 200
    assert straddles > 10
    assert bytes_changed > 200


@pytest.mark.long
@pytest.mark.parametrize("piece", range(CAMPAIGN // PIECE))
def test_campaign(piece):
    rng = random.Random(0x51 + piece)
    assert sum(compare(rng.getrandbits(40)) for _ in range(PIECE)) > 10 * PIECE
