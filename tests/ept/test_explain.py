"""Entries, qualifications and walks in words: the words and the rules say the same."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given
from test_entries import likely, processors, profile_of

from vmm.ept import PROFILES, EntryRules, ExtendedPageTables, Permission
from vmm.ept.explain import explain_entry, explain_qualification, explain_walk

DEFAULT, ADVANCED = PROFILES["default"], PROFILES["advanced"]
words = st.integers(0, (1 << 64) - 1)


def bits_of(explanation):
    """The value that the fields make up, and how often each bit is in one."""
    value, seen = 0, 0
    for field in explanation.fields:
        high, _, low = field.bits.rpartition(":") if ":" in field.bits else (field.bits, "", field.bits)
        low = int(low)
        value |= field.value << low
        seen += (1 << int(high) + 1) - (1 << low)
        assert 0 <= field.value < 1 << int(high) + 1 - low
    return value, seen


@given(st.one_of(words, likely), st.integers(1, 4), processors)
def test_every_bit_of_a_present_entry_is_in_one_field(raw, level, processor):
    profile = profile_of(processor)
    explanation = explain_entry(raw, level, profile)
    value, seen = bits_of(explanation)
    if EntryRules.of(profile).is_present(raw):
        assert (value, seen) == (raw, (1 << 64) - 1)
    else:
        assert explanation.verdict == "not present; all other bits are ignored"
        assert value == 0


@given(st.one_of(words, likely), st.integers(1, 4), processors)
def test_the_verdict_is_that_of_the_rules(raw, level, processor):
    profile = profile_of(processor)
    verdict = explain_entry(raw, level, profile).verdict
    wrong = EntryRules.of(profile).misconfigured(raw, level)
    assert verdict.startswith("misconfigured") == bool(wrong)
    assert all(reason.value in verdict for reason in wrong)


@given(words)
def test_every_bit_of_a_qualification_is_in_one_field(raw):
    value, _ = bits_of(explain_qualification(raw, DEFAULT))
    assert value == raw


@pytest.mark.parametrize(
    ("raw", "verdict"),
    [
        (0x182, "a write was refused: the EPT allows ---"),
        (0x1AB, "a read and write was refused: the EPT allows r-x"),
        (0x8B, "a read and write of a guest paging structure was refused: the EPT allows r--"),
        (0x4, "a fetch was refused: the EPT allows ---"),
        (0, "an access of no kind was refused: the EPT allows ---"),
    ],
)
def test_a_qualification_in_a_line(raw, verdict):
    assert explain_qualification(raw, DEFAULT).verdict == verdict


@pytest.mark.parametrize(
    ("raw", "profile", "meaning"),
    [
        (0x382, ADVANCED, "a user-mode linear address"),
        (0x182, ADVANCED, "a supervisor-mode linear address"),
        (0x282, ADVANCED, "undefined where bits 7 and 8 are not both 1"),
        (0x382, DEFAULT, "undefined on a processor without advanced information"),
    ],
)
def test_bits_9_to_11_mean_something_only_where_the_processor_gives_them(raw, profile, meaning):
    assert explain_qualification(raw, profile).fields[9].meaning == meaning


class TestWalks:
    def ept(self):
        ept = ExtendedPageTables()
        ept.map(0, 0x200000, Permission.R, size=2 << 20)
        return ept

    def test_it_ends_with_the_page(self):
        walk = explain_walk(self.ept(), 0x1234, "read")
        assert walk.verdict == "the read reaches HPA 0x201234"
        assert [entry.what.split()[0] for entry in walk.entries] == ["PML4E", "PDPTE", "PDE"]

    def test_or_with_the_entry_that_forbids_the_access(self):
        walk = explain_walk(self.ept(), 0x1234, "write")
        assert (walk.verdict, walk.section) == ("EPT violation: the PDE does not allow a write", "29.3.3.2")

    def test_or_with_the_first_that_is_not_present(self):
        assert explain_walk(self.ept(), 1 << 39, "read").verdict == "EPT violation: the PML4E is not present"
        assert explain_walk(self.ept(), 2 << 20, "read").verdict == "EPT violation: the PDE is not present"

    def test_or_misconfigured(self):
        ept = self.ept()
        ept.write_entry(0, 3, ept.read_entry(0, 3) | 1 << 4)
        walk = explain_walk(ept, 0, "read")
        assert walk.verdict == "EPT misconfiguration: by the PDPTE"
        assert walk.entries[-1].verdict == "misconfigured: a reserved bit is set (bit 4)"
