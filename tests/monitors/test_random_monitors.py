"""Random monitors over random guests that patch themselves, against a plain list of every byte that is touched.

The list comes from a run without traps or monitors, one instruction at a time, with what the engine reports of each.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import groupby

import pytest
import tiny
from attrs import evolve, frozen
from random_guests import FRAMES, RandomGuest

from vmm.cpu.engine import Stop
from vmm.decode import decode
from vmm.guest.manifest import Policy
from vmm.machine import RunOptions
from vmm.memory import PAGE

SEEDS = 6
KINDS = ("r", "w", "x", "rw", "rwx")
WAYS = {
    "free": (tiny.STRICT, Policy(code="load")),
    "four blocks": (evolve(tiny.STRICT, capacity=4), Policy(code="load", reads="grant")),
    "windows": (RunOptions(check=True, audit=True), Policy(code="load", writes="window")),
    "stepped": (RunOptions(single_step=True), Policy(code="fetch")),
}


@frozen
class Touched:
    """What one instruction touched: "r", "w" or "x", and which bytes of RAM."""

    rip: int
    access: str
    places: frozenset[int]


@cache
def everything_touched(seed: int) -> tuple[Touched, ...]:
    made = guest_of(seed, RunOptions(traps=False), Policy())
    vcpu, found = made.machine.vcpu, []
    vcpu.stepping.wants_reads = True
    step = vcpu.step

    def listing_step() -> Stop:
        rip, bits = vcpu.context.pc, vcpu.context.code_bits
        length = decode(vcpu.mmu.code_bytes(rip), bits).length
        code = frozenset(vcpu.mmu.peek(rip + i) for i in range(length))
        stop = step()
        if stop is Stop.STEPPED:
            found.append(Touched(rip, "x", code))
            accesses = [("r", hpa, size) for _, hpa, size in vcpu.stepping.reads]
            accesses += [("w", hpa, size) for hpa, size in vcpu.stepping.writes]
            found.extend(Touched(rip, access, places(made, hpa, size)) for access, hpa, size in accesses)
        return stop

    vcpu.step = listing_step
    assert made.run().reason == "port"
    return tuple(found)


def places(made, hpa: int, size: int) -> frozenset[int]:
    """The bytes of an access of which the engine tells the first; pages that follow do so in the guest's order."""
    room = PAGE - hpa % PAGE
    first = frozenset(range(hpa, hpa + min(size, room)))
    if size <= room:
        return first
    following = FRAMES[FRAMES.index(hpa & -PAGE) + 1]
    return first | frozenset(range(following, following + size - room))


def guest_of(seed: int, options: RunOptions, policy: Policy):
    guest = RandomGuest(seed)
    return guest.build(guest.segments(), options=options, policy=policy)


def random_ranges(rng: random.Random, seed: int) -> list[tuple[int, int, str]]:
    """(GPA, size, access) of monitors around bytes that are touched, and one of a whole frame."""
    touched = everything_touched(seed)
    around = [rng.choice([one for one in touched if one.access == kind]) for kind in "rrwwx"]
    some = [
        (max(min(one.places) + rng.randint(-9, 9), 0), rng.choice([1, 1, 2, 4, 8, 64]), rng.choice(KINDS))
        for one in around
    ]
    return [*some, (rng.choice(FRAMES), PAGE, rng.choice(["rw", "x"]))]


def noting(told: list[tuple[int, str]]):
    return lambda seen: told.append((seen.rip, seen.access))


def distinct(pairs):
    """Without repetitions: a record may be of several runs of bytes, and a string instruction executes once."""
    return [pair for pair, _ in groupby(pairs)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_each_monitor_is_told_of_exactly_its_bytes(seed, way):
    rng = random.Random(seed)
    options, policy = WAYS[way]
    made = guest_of(seed, options, policy)
    monitors = []
    for gpa, size, access in random_ranges(rng, seed):
        told: list[tuple[int, str]] = []
        asked: list[tuple[int, str]] = []
        before = rng.choice([None, noting(asked)])
        made.machine.monitor(gpa, size, access, before=before, after=noting(told))
        monitors.append((gpa, size, access, told, asked if before else None))

    assert made.run().reason == "port"
    made.machine.verify()

    for gpa, size, access, told, asked in monitors:
        watched = range(gpa, gpa + size)
        for kind in access:
            expected = distinct(
                (touched.rip, kind)
                for touched in everything_touched(seed)
                if touched.access == kind and any(place in watched for place in touched.places)
            )
            assert distinct(one for one in told if one[1] == kind) == expected
            if asked is not None:
                assert distinct(one for one in asked if one[1] == kind) == expected


def test_the_monitors_are_worth_having():
    """They are told of something, of every kind."""
    hits = {"r": 0, "w": 0, "x": 0}
    for seed in range(SEEDS):
        for gpa, size, access in random_ranges(random.Random(seed), seed):
            for touched in everything_touched(seed):
                if touched.access in access and any(gpa <= place < gpa + size for place in touched.places):
                    hits[touched.access] += 1
    assert min(hits.values()) > 50
