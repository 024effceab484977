"""The extended page tables against a dictionary, and their entries bit by bit."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vmm.ept import EptEntry, ExtendedPageTables, Permission, Qualification
from vmm.errors import OptionError
from vmm.memory import PAGE

#: Pages at both sides of every boundary between tables, and the last page there is.
EDGES = [0, PAGE, 0x1FF000, 0x200000, 0x3FFFF000, 0x40000000, 0x7FFFFFF000, 0x8000000000, (1 << 48) - PAGE]
pages = st.one_of(st.sampled_from(EDGES), st.integers(0, 600).map(lambda n: n * PAGE))
hosts = st.integers(0, 1 << 20).map(lambda n: n * PAGE)
permissions = st.integers(0, 7).map(Permission)


class TablesAgainstDictionary(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.ept = ExtendedPageTables()
        self.model: dict[int, tuple[int, Permission]] = {}
        self.asked: set[int] = set(EDGES)

    @rule(gpa=pages, hpa=hosts, allowed=permissions)
    def map(self, gpa: int, hpa: int, allowed: Permission) -> None:
        self.ept.map(gpa, hpa, allowed)
        self.model[gpa] = hpa, allowed
        self.asked.add(gpa)

    @rule(first=st.integers(0, 600), count=st.integers(1, 1100), hpa=hosts, allowed=permissions)
    def map_range(self, first: int, count: int, hpa: int, allowed: Permission) -> None:
        self.ept.map_range(first * PAGE, hpa, count * PAGE, allowed)
        for i in range(count):
            self.model[(first + i) * PAGE] = hpa + i * PAGE, allowed
        self.asked.update(
            ((first - 1) * PAGE % (1 << 48), first * PAGE, (first + count - 1) * PAGE, (first + count) * PAGE)
        )

    @rule(gpa=pages, allowed=permissions)
    def protect(self, gpa: int, allowed: Permission) -> None:
        if gpa in self.model:
            self.ept.protect(gpa, allowed)
            self.model[gpa] = self.model[gpa][0], allowed
        else:
            with pytest.raises(OptionError, match="is not mapped"):
                self.ept.protect(gpa, allowed)

    @rule(gpa=pages)
    def unmap(self, gpa: int) -> None:
        self.ept.unmap(gpa)
        self.model.pop(gpa, None)
        self.asked.add(gpa)

    @rule(gpa=pages, offset=st.integers(0, PAGE - 1))
    def translate(self, gpa: int, offset: int) -> None:
        assert self.ept.translate(gpa + offset) == self._leaf(gpa)

    def _leaf(self, gpa: int) -> int:
        hpa, allowed = self.model.get(gpa, (0, Permission.NONE))
        return hpa | allowed if allowed else 0

    @invariant()
    def what_was_asked_before_is_not_remembered_wrongly(self) -> None:
        for gpa in self.asked:
            assert self.ept.translate(gpa) == self._leaf(gpa)
            entry = self.ept.entry(gpa)
            assert entry.permissions == self.model.get(gpa, (0, Permission.NONE))[1]
            assert entry.present == bool(self._leaf(gpa))


TestTablesAgainstDictionary = TablesAgainstDictionary.TestCase
TestTablesAgainstDictionary.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@given(permissions, st.integers(0, 7), hosts)
def test_an_entry_decodes_to_what_it_was_encoded_from(allowed, memory_type, address):
    entry = EptEntry(allowed, memory_type, address)
    assert EptEntry.decode(entry.encode()) == entry


@pytest.mark.parametrize("bits", range(8))
def test_permissions_are_bits_0_to_2(bits):
    assert EptEntry.decode(bits | 6 << 3).permissions == bits
    assert Permission.parse(str(Permission(bits))) == bits


@pytest.mark.parametrize("text", ["", "rw", "rwxx", "xwr", "r w", "rw1"])
def test_permission_text_in_another_form_is_refused(text):
    with pytest.raises(ValueError, match=r"^"):
        Permission.parse(text)


@pytest.mark.parametrize(
    ("raw", "misconfigured"),
    [
        (0b000 | 6 << 3, False),  # not present, so the rest is ignored
        (0b000 | 2 << 3, False),
        (0b001 | 6 << 3, False),
        (0b010 | 6 << 3, True),  # W without R
        (0b110 | 6 << 3, True),
        (0b100 | 6 << 3, False),  # execute-only, which the VMM lives by
        (0b001 | 2 << 3, True),  # reserved memory types: 2, 3, 7
        (0b001 | 3 << 3, True),
        (0b001 | 7 << 3, True),
        (0b001 | 0 << 3, False),
    ],
)
def test_misconfigurations(raw, misconfigured):
    assert EptEntry.decode(raw).misconfigured is misconfigured


@pytest.mark.parametrize("gpa", [1, PAGE - 1, 1 << 48, -PAGE])
def test_what_is_no_page_is_refused(gpa):
    ept = ExtendedPageTables()
    for change in (lambda: ept.map(gpa, 0, Permission.R), lambda: ept.unmap(gpa)):
        with pytest.raises(OptionError, match="is not the address of a page"):
            change()


def test_nothing_is_mapped_beyond_48_bits():
    assert ExtendedPageTables().translate(1 << 48) == 0


qualifications = st.builds(
    Qualification,
    read=st.booleans(),
    write=st.booleans(),
    fetch=st.booleans(),
    allowed=permissions,
    linear_valid=st.just(value=True),
    final=st.booleans(),
)


@given(qualifications)
def test_a_qualification_decodes_to_what_it_was_encoded_from(qualification):
    assert Qualification.decode(qualification.encode()) == qualification


def test_a_qualification_reads_as_table_28_7_has_it():
    store_to_execute_only = Qualification(write=True, allowed=Permission.X)
    assert store_to_execute_only.encode() == 1 << 1 | 1 << 5 | 1 << 7 | 1 << 8
    assert Qualification(fetch=True, linear_valid=False).encode() == 1 << 2
    assert str(store_to_execute_only) == "write where the EPT allows --x"
