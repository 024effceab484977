"""The workpiece: a sensor that looks ahead, flaws that can be hit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.devices import Workpiece

PORT = 0x300
FLAWS = [(20, 57), (45, 100), (45, 7)]


@pytest.fixture
def found():
    return []


@pytest.fixture
def workpiece(found):
    made = Workpiece(PORT, FLAWS, 4, lambda: found.append(made.read(PORT, 4)))
    return made


def move(workpiece, x, y):
    workpiece.write(PORT, 4, x << 16 | y)


def test_nothing_is_found_at_first(workpiece, found):
    assert workpiece.read(PORT, 4) == 0xFFFF_FFFF
    assert workpiece.read(PORT + 4, 4) == 0
    move(workpiece, 15, 57)
    assert found == []


def test_a_flaw_is_found_ahead_of_the_cutter_once(workpiece, found):
    for x in (15, 16, 17, 20):
        move(workpiece, x, 0)
    assert found == [20 << 16 | 57]


def test_two_flaws_at_one_position_are_two(workpiece, found):
    move(workpiece, 41, 0)
    assert found == [20 << 16 | 57, 45 << 16 | 100, 45 << 16 | 7]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 120)), max_size=60))
def test_hits_are_moves_to_a_flaw(moves):
    workpiece = Workpiece(PORT, FLAWS, 4, lambda: None)
    for x, y in moves:
        move(workpiece, x, y)
    assert workpiece.read(PORT + 4, 4) == sum(where in FLAWS for where in moves)


def test_other_ports_move_nothing(workpiece):
    workpiece.write(PORT + 4, 4, 20 << 16 | 57)
    assert workpiece.hits == 0
