"""The extended page tables against a dictionary of pages, and against a walk as the manual has it."""

from __future__ import annotations

import hypothesis.strategies as st
import manual
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from manual import Processor
from test_entries import likely, profile_of

from vmm.ept import CLEAN, MISCONFIGURED, Capabilities, EptProfile, ExtendedPageTables, Permission
from vmm.errors import OptionError
from vmm.memory import PAGE

MIB_2, GIB = 2 << 20, 1 << 30
#: Pages at both sides of every boundary between tables, and the last page there is.
EDGES = [0, PAGE, 0x1FF000, MIB_2, 0x3FFFF000, GIB, 0x7FFFFFF000, 0x8000000000, (1 << 48) - PAGE]
pages = st.one_of(st.sampled_from(EDGES), st.integers(0, 600).map(lambda n: n * PAGE))
hosts = st.integers(0, 1 << 20).map(lambda n: n * PAGE)
permissions = st.integers(0, 7).map(Permission)
sizes = st.sampled_from([MIB_2, GIB])
#: What map, split and join are asked about: the same few regions, so that they meet.
regions = st.sampled_from([0, MIB_2, GIB - MIB_2, GIB, 0x8000000000])

RW = Permission.R | Permission.W
RWX = RW | Permission.X


def reference(processor: Processor, ept: ExtendedPageTables, gpa: int) -> int:
    """What ``translate`` has to say, from the entries alone."""

    def read_entry(level: int) -> int:
        return ept.read_entry(gpa, level)

    walk = manual.walk(processor, read_entry)
    if walk.end == "not present":
        return 0
    if walk.end == "misconfigured":
        return MISCONFIGURED
    allowed = walk.every(0) | walk.every(1) << 1 | walk.every(2) << 2
    if processor.mode_based:
        allowed |= walk.every(10) << 10
    clean = processor.accessed_dirty and not walk.used[-1][1] >> 9 & 1
    return walk.host_page(gpa) | allowed | (CLEAN if clean else 0)


class Tables(RuleBasedStateMachine):
    """Maps, splits and joins, against {page: (host page, permissions)} for the pages that were asked about."""

    processor = Processor()

    @initialize()
    def start(self) -> None:
        self.ept = ExtendedPageTables(profile_of(self.processor))
        #: (first GPA, bytes, host address, permissions), later ones winning.
        self.mapped: list[tuple[int, int, int, Permission]] = []
        self.asked: set[int] = set(EDGES)

    def put(self, gpa: int, size: int, hpa: int, allowed: Permission) -> None:
        self.mapped.append((gpa, size, hpa, allowed))
        self.asked.update((gpa, gpa + size - PAGE, (gpa + size) % (1 << 48), (gpa - PAGE) % (1 << 48)))

    def model(self, gpa: int) -> tuple[int, Permission] | None:
        for first, size, hpa, allowed in reversed(self.mapped):
            if first <= gpa < first + size:
                return None if hpa < 0 else (hpa + gpa - first, allowed)
        return None

    @rule(gpa=pages, hpa=hosts, allowed=permissions)
    def map(self, gpa: int, hpa: int, allowed: Permission) -> None:
        self.ept.map(gpa, hpa, allowed)
        self.put(gpa, PAGE, hpa, allowed)

    @rule(gpa=regions, size=sizes, host=st.integers(0, 3), allowed=permissions)
    def map_large(self, gpa: int, size: int, host: int, allowed: Permission) -> None:
        gpa &= -size
        self.ept.map(gpa, host * size, allowed, size=size)
        self.put(gpa, size, host * size, allowed)

    @rule(first=st.integers(0, 600), count=st.integers(1, 1100), hpa=hosts, allowed=permissions)
    def map_range(self, first: int, count: int, hpa: int, allowed: Permission) -> None:
        self.ept.map_range(first * PAGE, hpa, count * PAGE, allowed)
        self.put(first * PAGE, count * PAGE, hpa, allowed)

    @rule(gpa=regions, size=st.sampled_from([MIB_2, GIB, GIB + MIB_2 + PAGE]), allowed=permissions)
    def map_range_with_large_pages(self, gpa: int, size: int, allowed: Permission) -> None:
        self.ept.map_range(gpa, gpa & GIB - 1, size, allowed)
        self.put(gpa, size, gpa & GIB - 1, allowed)

    @rule(gpa=pages, allowed=permissions)
    def protect(self, gpa: int, allowed: Permission) -> None:
        found = self.model(gpa)
        if found is None:
            with pytest.raises(OptionError, match="is not mapped"):
                self.ept.protect(gpa, allowed)
        else:
            self.ept.protect(gpa, allowed)
            self.put(gpa, PAGE, found[0], allowed)

    @rule(gpa=pages)
    def unmap(self, gpa: int) -> None:
        self.ept.unmap(gpa)
        self.put(gpa, PAGE, -1, Permission.NONE)

    @rule(gpa=st.one_of(pages, regions))
    def split(self, gpa: int) -> None:
        if self.ept.entry(gpa).page_size != PAGE:
            self.ept.split(gpa)
            assert self.ept.entry(gpa).page_size in (PAGE, MIB_2)
        else:
            with pytest.raises(OptionError, match="is in no large page"):
                self.ept.split(gpa)

    @rule(gpa=regions, size=sizes)
    def join(self, gpa: int, size: int) -> None:
        """Whatever it does, the model has not changed."""
        gpa &= -size
        try:
            self.ept.join(gpa, size=size)
        except OptionError:
            return
        assert self.ept.entry(gpa).page_size == size

    @rule(gpa=pages, offset=st.integers(0, PAGE - 1), write=st.booleans())
    def access(self, gpa: int, offset: int, write: bool) -> None:
        leaf = self.ept.translate(gpa + offset)
        assert self.ept.look(gpa) == leaf
        if write and leaf & CLEAN:
            assert self.ept.dirty(gpa) == leaf & ~CLEAN

    @invariant()
    def every_page_is_where_it_was_put(self) -> None:
        for gpa in self.asked:
            found = self.model(gpa)
            assert self.ept.host_page(gpa) == (None if found is None else found[0])
            assert self.ept.entry(gpa).permissions == (found[1] if found else Permission.NONE)

    @invariant()
    def nothing_is_remembered_wrongly(self) -> None:
        for gpa in self.asked:
            by_walk = reference_of(self.processor, self.ept, gpa)
            assert self.ept.look(gpa) == by_walk
            assert self.ept.translate(gpa) == reference_of(self.processor, self.ept, gpa)


def reference_of(processor: Processor, ept: ExtendedPageTables, gpa: int) -> int:
    try:
        return reference(processor, ept, gpa)
    except OptionError:  # no table at that level: nothing present
        return 0


class TablesWithFlags(Tables):
    processor = Processor(accessed_dirty=True)


class TablesOfAnotherProcessor(Tables):
    processor = Processor(execute_only=False, mode_based=True)


class AnyEntries(Tables):
    """The host writes any bits into any entry: only the walk by the manual knows what that means."""

    @rule(gpa=st.one_of(pages, regions), level=st.integers(1, 4), raw=likely)
    def write_any(self, gpa: int, level: int, raw: int) -> None:
        self.write(gpa, level, raw)

    @rule(gpa=st.one_of(pages, regions), level=st.integers(1, 4), bit=st.integers(0, 63))
    def flip_a_bit(self, gpa: int, level: int, bit: int) -> None:
        try:
            raw = self.ept.read_entry(gpa, level)
        except OptionError:
            return
        self.write(gpa, level, raw ^ 1 << bit)

    def write(self, gpa: int, level: int, raw: int) -> None:
        try:
            self.ept.write_entry(gpa, level, raw)
        except OptionError:
            return
        assert self.ept.read_entry(gpa, level) == raw
        self.asked.add(gpa)

    @rule(gpa=pages, allowed=permissions)
    def protect(self, gpa: int, allowed: Permission) -> None:
        try:
            self.ept.protect(gpa, allowed)
        except OptionError:
            return

    @rule(gpa=st.one_of(pages, regions))
    def split(self, gpa: int) -> None:
        try:
            self.ept.split(gpa)
        except OptionError:
            return

    def every_page_is_where_it_was_put(self) -> None:
        """Not any more."""

    @rule(gpa=pages, hpa=hosts, allowed=permissions)
    def map(self, gpa: int, hpa: int, allowed: Permission) -> None:
        try:
            self.ept.map(gpa, hpa, allowed)
        except OptionError:  # a misconfigured large page is in the way
            return
        self.asked.add(gpa)

    @rule(first=st.integers(0, 600), count=st.integers(1, 1100), hpa=hosts, allowed=permissions)
    def map_range(self, first: int, count: int, hpa: int, allowed: Permission) -> None:
        try:
            self.ept.map_range(first * PAGE, hpa, count * PAGE, allowed)
        except OptionError:
            return

    @rule(gpa=pages)
    def unmap(self, gpa: int) -> None:
        try:
            self.ept.unmap(gpa)
        except OptionError:
            return

    @rule(gpa=regions, size=sizes, host=st.integers(0, 3), allowed=permissions)
    def map_large(self, gpa: int, size: int, host: int, allowed: Permission) -> None:
        try:
            self.ept.map(gpa & -size, host * size, allowed, size=size)
        except OptionError:
            return

    @rule(gpa=regions, size=st.sampled_from([MIB_2, GIB]), allowed=permissions)
    def map_range_with_large_pages(self, gpa: int, size: int, allowed: Permission) -> None:
        try:
            self.ept.map_range(gpa, gpa & GIB - 1, size, allowed)
        except OptionError:
            return


class AnyEntriesWithFlags(AnyEntries):
    processor = Processor(accessed_dirty=True)


class AnyEntriesOfAnotherProcessor(AnyEntries):
    processor = Processor(execute_only=False, mode_based=True)


TestTables = Tables.TestCase
TestTablesWithFlags = TablesWithFlags.TestCase
TestTablesOfAnotherProcessor = TablesOfAnotherProcessor.TestCase
TestAnyEntries = AnyEntries.TestCase
TestAnyEntriesWithFlags = AnyEntriesWithFlags.TestCase
TestAnyEntriesOfAnotherProcessor = AnyEntriesOfAnotherProcessor.TestCase
for case in (
    TestTables,
    TestTablesWithFlags,
    TestTablesOfAnotherProcessor,
    TestAnyEntries,
    TestAnyEntriesWithFlags,
    TestAnyEntriesOfAnotherProcessor,
):
    case.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
del case


class TestLargePages:
    def test_ranges_are_mapped_with_the_largest_pages_that_fit(self):
        ept = ExtendedPageTables()
        ept.map_range(GIB - MIB_2 - PAGE, GIB - MIB_2 - PAGE, 2 * GIB, RW)
        some = (GIB - MIB_2 - PAGE, GIB - MIB_2, GIB, 2 * GIB, 3 * GIB - MIB_2 - 2 * PAGE)
        sizes = [ept.entry(gpa).page_size for gpa in some]
        assert sizes == [PAGE, MIB_2, GIB, MIB_2, PAGE]

    def test_a_processor_without_them_gets_none(self):
        ept = ExtendedPageTables(EptProfile(capabilities=Capabilities(pages_1g=False, pages_2m=False)))
        ept.map_range(0, 0, 2 * MIB_2, RW)
        assert ept.entry(0).page_size == PAGE
        with pytest.raises(OptionError, match="no pages of 0x200000 bytes"):
            ept.map(0, 0, RW, size=MIB_2)

    def test_a_change_of_one_page_splits_what_it_lies_in_and_nothing_else(self):
        ept = ExtendedPageTables()
        ept.map_range(0, 0, 2 * GIB, RW)
        ept.protect(MIB_2 + PAGE, Permission.X)
        sizes = {gpa: ept.entry(gpa).page_size for gpa in (0, MIB_2, 2 * MIB_2, GIB)}
        assert sizes == {0: MIB_2, MIB_2: PAGE, 2 * MIB_2: MIB_2, GIB: GIB}
        found = [ept.translate(MIB_2 + n * PAGE) for n in range(3)]
        assert found == [MIB_2 | 3, MIB_2 + PAGE | 4, MIB_2 + 2 * PAGE | 3]

    def test_splitting_and_joining_keep_what_is_cached(self):
        ept = ExtendedPageTables()
        ept.map(0, 0, RW, size=MIB_2)
        cached = {gpa: ept.translate(gpa) for gpa in range(0, MIB_2, PAGE)}
        ept.split(0)
        assert len(list(ept.leaves)) == len(cached)
        ept.join(0, size=MIB_2)
        assert len(list(ept.leaves)) == len(cached)
        assert {gpa: ept.translate(gpa) for gpa in cached} == cached

    def test_a_change_drops_what_was_cached_of_its_page_and_no_more(self):
        ept = ExtendedPageTables()
        ept.map_range(0, 0, 2 * MIB_2, RW)
        for gpa in range(0, 2 * MIB_2, PAGE):
            ept.translate(gpa)
        ept.write_entry(0, 2, ept.read_entry(0, 2) & ~2)
        assert list(ept.leaves) == list(range(512, 1024))
        assert (ept.translate(PAGE), ept.translate(MIB_2)) == (PAGE | 1, MIB_2 | 3)

    def test_pages_are_joined_that_are_contiguous_aligned_and_alike(self):
        ept = ExtendedPageTables()
        ept.map_range(0, MIB_2 + PAGE, MIB_2, RW)
        with pytest.raises(OptionError, match="are not one"):
            ept.join(0, size=MIB_2)
        ept.map(0, 2 * MIB_2, RW, size=MIB_2)
        ept.split(0)
        ept.protect(5 * PAGE, Permission.R)
        with pytest.raises(OptionError, match="are not one"):
            ept.join(0, size=MIB_2)
        ept.protect(5 * PAGE, RW)
        ept.join(0, size=MIB_2)
        assert ept.translate(5 * PAGE) == 2 * MIB_2 + 5 * PAGE | 3

    def test_joined_pages_have_the_flags_of_all(self):
        ept = ExtendedPageTables(EptProfile(accessed_dirty=True))
        ept.map(0, 0, RW, size=MIB_2)
        ept.split(0)
        ept.translate(3 * PAGE)
        ept.join(0, size=MIB_2)
        assert (ept.entry(0).accessed, ept.entry(0).dirty) == (True, False)
        ept.split(0)
        assert all(ept.entry(gpa).accessed for gpa in range(0, MIB_2, PAGE))
        assert ept.read_entry(0, 2) >> 8 & 1
        ept.dirty(7 * PAGE)
        ept.join(0, size=MIB_2)
        assert (ept.entry(0).accessed, ept.entry(0).dirty) == (True, True)
        assert ept.translate(0) == 3

    @pytest.mark.parametrize("size", [MIB_2, GIB])
    def test_tables_that_are_not_needed_any_more_are_given_back(self, size):
        ept = ExtendedPageTables()
        ept.map(0, 0, RW, size=size)
        before = len(ept._structures.tables)
        for _ in range(3):
            ept.split(0)
            ept.protect(0, Permission.R)
            ept.map(0, 0, RW, size=size)
        assert len(ept._structures.tables) == before


class TestRefusals:
    @pytest.mark.parametrize("gpa", [1, PAGE - 1, 1 << 48, -PAGE])
    def test_what_is_no_page(self, gpa):
        ept = ExtendedPageTables()
        for change in (lambda: ept.map(gpa, 0, Permission.R), lambda: ept.unmap(gpa)):
            with pytest.raises(OptionError, match="is not the address of a page"):
                change()

    @pytest.mark.parametrize(("gpa", "hpa"), [(PAGE, 0), (0, PAGE)])
    def test_a_large_page_that_is_not_aligned(self, gpa, hpa):
        with pytest.raises(OptionError, match="is not the address of a page"):
            ExtendedPageTables().map(gpa, hpa, RW, size=MIB_2)

    def test_a_size_that_no_processor_has(self):
        with pytest.raises(OptionError, match="no pages of 0x10000 bytes"):
            ExtendedPageTables().map(0, 0, RW, size=0x10000)

    def test_what_reaches_beyond_the_hosts_memory(self):
        ept = ExtendedPageTables(host_size=GIB)
        ept.map(0, 0, RW, size=GIB)
        for change in (
            lambda: ept.map(0, GIB, RW),
            lambda: ept.map_range(0, GIB - PAGE, 2 * PAGE, RW),
            lambda: ept.write_entry(0, 3, GIB | 0xB7),
        ):
            with pytest.raises(OptionError, match="beyond the host's memory"):
                change()

    def test_an_entry_that_leads_to_no_table(self):
        ept = ExtendedPageTables()
        ept.map(0, 0, RW)
        ept.write_entry(0, 2, 0x5000_0000)  # not present: the processor does not go there
        ept.write_entry(0, 2, 0x5000_0000 | 1 << 50 | 7)  # misconfigured: nor there
        with pytest.raises(OptionError, match="leads to no table of level 1"):
            ept.write_entry(0, 2, 0x5000_0000 | 7)

    @pytest.mark.parametrize("level", [0, 5])
    def test_a_level_that_there_is_not(self, level):
        with pytest.raises(OptionError, match="give level 1 to 4"):
            ExtendedPageTables().read_entry(0, level)

    def test_an_entry_below_the_end_of_the_way(self):
        with pytest.raises(OptionError, match="map or split first"):
            ExtendedPageTables().read_entry(0, 3)

    @pytest.mark.parametrize("raw", [-1, 1 << 64])
    def test_what_is_no_entry(self, raw):
        with pytest.raises(OptionError, match="give 64 bits"):
            ExtendedPageTables().write_entry(0, 4, raw)


def test_nothing_is_mapped_beyond_48_bits():
    ept = ExtendedPageTables()
    assert (ept.translate(1 << 48), ept.look(1 << 48), ept.host_page(1 << 48)) == (0, 0, None)


class TestOrderOfTheWalk:
    """SDM vol. 3, 29.3.3.3: entries are judged one by one from the top; permissions only at the end."""

    def ept(self):
        ept = ExtendedPageTables()
        ept.map(0, 0, RWX)
        return ept

    @pytest.mark.parametrize(("upper", "lower"), [(4, 3), (4, 1), (3, 2), (2, 1)])
    def test_a_misconfiguration_comes_before_an_entry_below_that_is_not_present(self, upper, lower):
        ept = self.ept()
        ept.write_entry(0, lower, ept.read_entry(0, lower) & ~7)
        assert ept.translate(0) == 0
        ept.write_entry(0, upper, ept.read_entry(0, upper) | 1 << 51)
        assert ept.translate(0) == MISCONFIGURED

    @pytest.mark.parametrize(("upper", "lower"), [(4, 3), (4, 1), (3, 2), (2, 1)])
    def test_one_that_is_not_present_hides_a_misconfiguration_below(self, upper, lower):
        ept = self.ept()
        ept.write_entry(0, lower, ept.read_entry(0, lower) | 1 << 51)
        assert ept.translate(0) == MISCONFIGURED
        ept.write_entry(0, upper, ept.read_entry(0, upper) & ~7)
        assert ept.translate(0) == 0

    def test_a_misconfiguration_comes_before_a_missing_permission_above(self):
        ept = self.ept()
        ept.write_entry(0, 4, ept.read_entry(0, 4) & ~6)
        assert ept.translate(0) == 1
        ept.write_entry(0, 1, 2)
        assert ept.translate(0) == MISCONFIGURED

    @given(st.lists(st.integers(1, 7).filter(lambda p: p & 3 != 2), min_size=4, max_size=4))
    def test_what_is_allowed_is_the_and_of_all(self, allowed):
        ept = self.ept()
        for level in (4, 3, 2, 1):
            ept.write_entry(0, level, ept.read_entry(0, level) & ~7 | allowed[level - 1])
        assert ept.translate(0) == allowed[0] & allowed[1] & allowed[2] & allowed[3]
