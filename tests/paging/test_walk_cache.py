"""What is remembered of walks is never something that a walk would not say, whatever happens in between."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paging_tables import LME, NXE, PAE, PG, RW, US, WP, XD, A, D, P

from vmm.ept import ExtendedPageTables, Permission
from vmm.ept.views import View
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frames
from vmm.mmu.refusals import PagingStructureViolation
from vmm.mmu.structures import GuestStructures
from vmm.mmu.walk_cache import CAPACITY, WalkCache
from vmm.paging import Access, PageFault, PagingMode, walk

SIZE = 0x10000
MODE = PagingMode.of(PG | WP, PAE, LME | NXE)
#: Four tables, one a level, and pages that their first four entries lead to.
TABLES = (0x1000, 0x2000, 0x3000, 0x4000)
FULL = P | RW | US | A | D
RWX = Permission.R | Permission.W | Permission.X


class World:
    """Guest memory with page tables, an EPT, and what the cache and a walk say about an address."""

    def __init__(self) -> None:
        self.memory = GuestMemory(SIZE)
        self.ept = ExtendedPageTables()
        self.ept.map_range(0, 0, SIZE, RWX)
        self.cache = WalkCache(self.memory, self.ept)
        mmu = type("NoMmu", (), {"fetch_side": None})()
        self.structures = GuestStructures(self.memory, View(0, self.ept), Frames(SIZE, SIZE), mmu)
        for table, target in zip(TABLES, (*TABLES[1:], 0x8000), strict=True):
            for index in range(4):
                self.entry(table, index, target + (index * PAGE if target == 0x8000 else 0) | FULL)

    def entry(self, table: int, index: int, value: int) -> None:
        self.memory.write(table + 8 * index, value.to_bytes(8, "little"))

    def look(self, page: int, access: Access, *, user: bool) -> bool:
        """Whether the cache answered; it must have said what a walk says."""
        key = (TABLES[0], page, int(access), user)
        remembered, trail = self.cache.find(key), []
        translation = None if remembered is None else remembered[0]
        found = None
        with contextlib.suppress(PageFault, PagingStructureViolation):
            found = walk(self.structures, MODE, TABLES[0], page, access, user=user, trail=trail)
        assert translation in (None, found)
        if trail:
            self.cache.keep(key, found, trail)
        return remembered is not None


def linear(indices: tuple[int, int, int, int]) -> int:
    page = 0
    for index in indices:
        page = page << 9 | index
    return page << 12


_INDEX = st.integers(0, 3)
_LOOK = st.tuples(
    st.just("look"), st.tuples(_INDEX, _INDEX, _INDEX, _INDEX), st.sampled_from(list(Access)), st.booleans()
)
_BITS = st.sampled_from([0, P, RW, US, A, D, XD, 0x1000, 0x3000])
_CHANGE = st.tuples(st.just("change"), st.sampled_from(TABLES), _INDEX, _BITS)
_PROTECT = st.tuples(
    st.just("protect"), st.sampled_from(TABLES), st.sampled_from([RWX, Permission.R, Permission.X]), st.none()
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(_LOOK, _LOOK, _CHANGE, _PROTECT), max_size=60))
def test_never_says_what_a_walk_would_not(deeds):
    world = World()
    for deed, first, second, third in deeds:
        if deed == "look":
            for _ in range(2):
                world.look(linear(first), second, user=third)
        elif deed == "change":
            value = int.from_bytes(world.memory.read(first + 8 * second, 8), "little")
            world.entry(first, second, value ^ third)
        else:
            world.ept.protect(first, second)


def test_answers_the_second_time():
    world = World()
    assert [world.look(0, Access.WRITE, user=True) for _ in range(2)] == [False, True]


def test_a_walk_that_sets_a_flag_is_not_remembered():
    world = World()
    world.entry(TABLES[3], 0, 0x8000 | FULL & ~D)
    assert [world.look(0, Access.WRITE, user=True) for _ in range(3)] == [False, False, True]


def test_takes_no_more_than_its_capacity():
    world = World()
    for number in range(CAPACITY + 10):
        world.cache.keep((number, 0, 0, False), None, [])
    assert len(world.cache._walks) <= CAPACITY


def test_a_fault_is_found_again_each_time():
    world = World()
    world.look(0, Access.READ, user=True)
    world.entry(TABLES[2], 0, 0)
    assert not world.look(0, Access.READ, user=True)
    with pytest.raises(PageFault):
        walk(world.structures, MODE, TABLES[0], 0, Access.READ, user=True)
