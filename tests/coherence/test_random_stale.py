"""Random guests that patch themselves and now and then synchronise: all ways of running them are stale alike."""

from __future__ import annotations

import random

import pytest
import tiny
from attrs import evolve
from random_guests import BRANCH, UNIT, RandomGuest

from vmm.coherence import Coherence
from vmm.guest.manifest import Policy
from vmm.machine import RunOptions
from vmm.records import StaleExecution

#: Synchronises in both weaker models, and changes no register.
SYNCHRONISE = tiny.assemble("wbinvd").ljust(UNIT, b"\x90")
STEP = Policy(code="load")
WAYS = {
    "audited": tiny.STRICT,
    "stepped": RunOptions(single_step=True),
    "one block": RunOptions(capacity=1),
    "four blocks": RunOptions(capacity=4, audit=True, check=True),
}
SEEDS = 6


def guest_of(seed: int) -> RandomGuest:
    """A guest in which some of the branches are synchronising instructions instead."""
    guest, rng = RandomGuest(seed), random.Random(seed)
    for function in guest.functions:
        for index, unit in enumerate(function):
            if unit == BRANCH and rng.random() < 0.4:
                function[index] = SYNCHRONISE
    return guest


def run(guest: RandomGuest, segments, options: RunOptions, model: Coherence):
    made = guest.build(segments, options=evolve(options, coherence=model), policy=STEP)
    made.run()
    assert made.end.reason == "port", made.end
    made.machine.verify()
    return made


def seen(made):
    """All that a guest and a reader of the reports could tell; when is a matter of counting exits."""
    stale = [evolve(record, time=0) for record in made.of(StaleExecution)]
    return made.state(), made.architectural(), stale


def compare(seed: int) -> int:
    """Run one guest in every way in each of the weaker models; the number of stale executions."""
    guest = guest_of(seed)
    segments = guest.segments()
    found = 0
    for model in (Coherence.SERIALISED, Coherence.EXPLICIT):
        results = {name: seen(run(guest, segments, options, model)) for name, options in WAYS.items()}
        assert all(result == results["stepped"] for result in results.values()), model
        found += len(results["stepped"][2])
    return found


@pytest.mark.parametrize("seed", range(SEEDS))
def test_all_ways_agree(seed):
    compare(seed)


def test_the_guests_are_worth_running():
    """They execute stale code, and what they end with is not what a coherent processor ends with."""
    different = found = 0
    for seed in range(8):
        guest = guest_of(seed)
        segments = guest.segments()
        weak, strong = (run(guest, segments, RunOptions(), m) for m in (Coherence.SERIALISED, Coherence.COHERENT))
        found += weak.machine.sanitizer.found
        different += weak.state() != strong.state()
    assert found > 50
    assert different > 2


@pytest.mark.long
@pytest.mark.parametrize("piece", range(20))
def test_campaign(piece):
    rng = random.Random(0x57A1E + piece)
    assert sum(compare(rng.getrandbits(40)) for _ in range(25)) > 25
