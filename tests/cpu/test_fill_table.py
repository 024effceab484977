"""Fills answered by machine code: exactly those that are kept, while nothing that they depend on has changed."""

import ctypes
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.cpu import binding as b
from vmm.cpu import fill_table
from vmm.cpu import layout as at
from vmm.cpu.fill_table import MOST_WATCHED, PAGE, REGION, FillTable, Granted

READ, WRITE, FETCH = b.ACCESS_READ, b.ACCESS_WRITE, b.ACCESS_FETCH
R, W, X = 1, 2, 4
PAGED = ((1 << 31, 1 << 31), (0, 0), (0, 0), 0)
LEAF = 0x1234_5000


class Bench:
    """A table with an engine's state, leaves and watched words that the test owns."""

    def __init__(self) -> None:
        self.state = (ctypes.c_uint8 * at.CONTEXT_SIZE)()
        self.leaves = (ctypes.c_uint64 * 1024)()
        self.words = (ctypes.c_uint64 * 16)()
        self.cell = ctypes.c_uint64()
        self.asked: list[tuple[int, int]] = []
        self.table = FillTable(b.TlbFill(self._python))
        self.table.connect(SimpleNamespace(address=ctypes.addressof(self.state)))
        self.registers(cr0=1 << 31, cr3=0x1000, user=False)
        self.table.select(PAGED)

    def _python(self, _engine: int, page: int, access: int, _entry: object, _data: int) -> bool:
        self.asked.append((page, access))
        return False

    def registers(self, *, cr0: int, cr3: int, user: bool) -> None:
        self._set(at.CONTROL, cr0)
        self._set(at.CONTROL + 24, cr3)
        self._set(at.HFLAGS, 3 * user)

    def _set(self, offset: int, value: int) -> None:
        ctypes.c_uint64.from_address(ctypes.addressof(self.state) + offset).value = value

    def keep(self, page: int, access: int = READ, **more: object) -> None:
        fields = {
            "cr3": 0x1000,
            "user": False,
            "size": PAGE,
            "leaves": ctypes.addressof(self.leaves) - 8 * (page >> 12 & 511),
            "needed": {READ: R, WRITE: W, FETCH: X}[access],
            "allowed": R | W,
            "fetched": 0,
            "watched": [],
        }
        self.table.keep(Granted(page, access, **(fields | more)))

    def watch(self, count: int) -> list[int]:
        return [x for i in range(count) for x in (ctypes.addressof(self.words) + 8 * i, self.words[i])]

    def ask(self, page: int, access: int = READ) -> tuple[int, int] | None:
        """What the machine code answers, (host page, permissions); None if it asks Python."""
        entry = (ctypes.c_uint64 * 2)(1, 1)
        before = len(self.asked)
        call = ctypes.cast(self.table.callback, b.TlbFill)
        granted = call(None, page, access, entry, ctypes.cast(self.table.user_data, ctypes.c_void_p))
        assert granted == (len(self.asked) == before)
        if granted:
            return entry[0], entry[1]
        assert self.asked[-1] == (page, access)
        return None


@pytest.fixture
def bench():
    return Bench()


def test_what_is_not_kept_goes_to_python(bench):
    assert bench.ask(0x5000) is None
    bench.leaves[0] = LEAF | R
    bench.keep(0x5000)
    assert bench.ask(0x5000) == (LEAF, R)
    assert bench.table.answered == 1
    for page, access in ((0x6000, READ), (0x5000, WRITE), (0x5000, FETCH)):
        assert bench.ask(page, access) is None


@pytest.mark.parametrize("change", ["cr0", "cr3", "user"])
def test_other_registers_are_another_question(bench, change):
    bench.leaves[0] = LEAF | R
    bench.keep(0x5000)
    registers = {"cr0": 1 << 31, "cr3": 0x1000, "user": False}
    bench.registers(**registers | {change: {"cr0": 0, "cr3": 0x2000, "user": True}[change]})
    assert bench.ask(0x5000) is None
    bench.registers(**registers)
    assert bench.ask(0x5000) == (LEAF, R)


@given(count=st.integers(0, MOST_WATCHED), data=st.data())
def test_each_watched_word_counts(count, data):
    bench = Bench()
    for i in range(count):
        bench.words[i] = data.draw(st.integers(0, 2**64 - 1))
    bench.leaves[0] = LEAF | R | W
    bench.keep(0x5000, watched=bench.watch(count))
    assert bench.ask(0x5000) == (LEAF, R | W)
    for i in range(count):
        bit = 1 << data.draw(st.integers(0, 63))
        bench.words[i] ^= bit
        assert bench.ask(0x5000) is None
        bench.words[i] ^= bit
        assert bench.ask(0x5000) == (LEAF, R | W)


def test_more_than_a_slot_has_room_for_is_not_kept(bench):
    bench.leaves[0] = LEAF | R
    bench.keep(0x5000, watched=[1, 1] * (MOST_WATCHED + 1))
    assert bench.ask(0x5000) is None


@given(
    leaf=st.integers(0, 2**64 - 1),
    access=st.sampled_from([READ, WRITE, FETCH]),
    allowed=st.integers(0, 3),
    user_fetch=st.booleans(),
)
def test_the_leaf_of_the_moment_decides(leaf, access, allowed, user_fetch):
    bench = Bench()
    needed = {READ: R, WRITE: W, FETCH: 1 << 10 if user_fetch else X}[access]
    bench.keep(0x5000, access, needed=needed, allowed=allowed, fetched=ctypes.addressof(bench.cell))
    bench.leaves[0] = leaf
    granted = leaf & needed and not leaf & 0x38
    answer = (leaf & 0x000F_FFFF_FFFF_F000, leaf & allowed | X * (access == FETCH))
    assert bench.ask(0x5000, access) == (answer if granted else None)
    assert bench.cell.value == (answer[0] if granted else 0)


@given(numbers=st.lists(st.integers(0, 511), max_size=8), access=st.sampled_from([READ, WRITE]))
def test_a_region_serves_all_of_its_pages(numbers, access):
    bench = Bench()
    bench.keep(3 * REGION, access, size=REGION, leaves=ctypes.addressof(bench.leaves))
    for number in numbers:
        bench.leaves[number] = LEAF + number * PAGE | R | W
    for number in range(512):
        expected = (LEAF + number * PAGE, R | W) if number in numbers else None
        assert bench.ask(3 * REGION + number * PAGE, access) == expected
    assert bench.ask(4 * REGION, access) is None


def test_a_page_with_a_slot_of_its_own_is_not_answered_by_its_region(bench):
    bench.leaves[1], bench.leaves[600] = LEAF | R, LEAF + PAGE | R
    bench.keep(REGION, size=REGION, leaves=ctypes.addressof(bench.leaves))
    bench.keep(REGION + PAGE, leaves=ctypes.addressof(bench.leaves) + 8 * 599)
    assert bench.ask(REGION + PAGE) == (LEAF + PAGE, R)
    bench.leaves[600] = 0
    assert bench.ask(REGION + PAGE) is None


def test_settings_rest_and_come_back(bench):
    bench.leaves[0] = LEAF | R
    bench.keep(0x5000)
    other = (*PAGED[:3], 1)
    bench.table.select(other)
    assert bench.ask(0x5000) is None
    bench.table.select(PAGED)
    assert bench.ask(0x5000) == (LEAF, R)


def test_settings_are_bounded(bench):
    bench.leaves[0] = LEAF | R
    for number in range(3 * fill_table._MOST_SETTINGS):
        bench.table.select((*PAGED[:3], number))
        assert bench.ask(0x5000) is None
        bench.keep(0x5000)
        assert bench.ask(0x5000) == (LEAF, R)


def test_nothing_is_answered_while_suspended_after_clear_or_when_retired(bench):
    bench.leaves[0] = LEAF | R
    bench.keep(0x5000)
    bench.table.suspend(on=True)
    assert bench.ask(0x5000) is None
    bench.table.suspend(on=False)
    assert bench.ask(0x5000) == (LEAF, R)
    bench.table.clear()
    bench.table.select(PAGED)
    assert bench.ask(0x5000) is None
    bench.keep(0x5000)
    bench.table.retire()
    assert bench.ask(0x5000) is None
    bench.table.suspend(on=False)
    assert bench.ask(0x5000) is None
    assert not bench.table.remembers


@given(st.lists(st.tuples(st.integers(0, 2**40), st.sampled_from([READ, WRITE, FETCH]), st.booleans()), max_size=50))
def test_slots_that_collide_replace_each_other(deeds):
    """Whatever is answered is what was kept last for that very question."""
    bench = Bench()
    bench.leaves[:] = range(LEAF | R | W | X, (LEAF | R | W | X) + 1024 * PAGE, PAGE)
    kept = {}
    for number, (where, access, user) in enumerate(deeds):
        page = where * PAGE
        bench.registers(cr0=1 << 31, cr3=0x1000, user=user)
        answer = bench.ask(page, access)
        if answer is not None:
            assert answer[0] == LEAF + kept[page, access, user] * PAGE
        kept[page, access, user] = number
        bench.keep(page, access, user=user, leaves=ctypes.addressof(bench.leaves) + 8 * (number - (where & 511)))
