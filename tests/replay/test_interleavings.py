"""A hundred interleavings of the guests with two vCPUs: each comes again from its trace, byte for byte."""

from __future__ import annotations

import json
import random

import pytest
from recorded import recorded, replayed

from vmm.guest.loader import bundled_guests, load_guest
from vmm.machine import RunOptions

GUESTS = [guest.path for guest in bundled_guests() if load_guest(guest.path).manifest.others]
SEEDS = 100
PIECE = 10


def seeds(piece: int) -> list[int]:
    rng = random.Random(0x2CB5 + piece)
    return [rng.getrandbits(64) for _ in range(PIECE)]


@pytest.mark.parametrize("piece", range(SEEDS // PIECE))
def test_an_interleaving_comes_again(piece, tmp_path):
    for number, seed in enumerate(seeds(piece)):
        path = GUESTS[(piece + number) % len(GUESTS)]
        trace = recorded(tmp_path / "t", path, RunOptions(seed=seed, block_events=True))
        assert json.loads(trace[: trace.index(b"\n")])["seed"] == seed
        assert replayed(tmp_path / "t") == (trace, None), (path, seed)


def test_they_are_different_interleavings(tmp_path):
    traces = {recorded(tmp_path / "t", GUESTS[0], RunOptions(seed=seed)).partition(b"\n")[2] for seed in seeds(0)}
    assert len(traces) == PIECE


def test_another_seed_than_the_recorded_one_diverges(tmp_path):
    trace = recorded(tmp_path / "t", GUESTS[0], RunOptions(seed=1))
    assert trace.count(b'"seed": 1,') == 1
    (tmp_path / "t").write_bytes(trace.replace(b'"seed": 1,', b'"seed": 2,'))
    assert replayed(tmp_path / "t")[1] is not None
