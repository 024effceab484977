"""What invalidates which mapping, sentence by sentence (SDM vol. 3, 4.10.4.1 and 29.4.3.1)."""

from __future__ import annotations

import pytest

from vmm.paging import Translation
from vmm.tlb.mappings import (
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_SMEP,
    MAX_MAPPINGS,
    UNPAGED,
    CachedMappings,
    GuestPhysical,
    Mapping,
    pcid_of,
)

HERE, THERE = 0x1000, 0x2000  # EPTRTAs
PAGING = 1 << 31
KEEP = 1 << 63

#: What is cached, by a letter each: (EPTRTA, PCID, linear page, GPA, global, size).
COMBINED = {
    "a": (HERE, 1, 0x5000, 0xA000, False, 0x1000),
    "b": (HERE, 1, 0x6000, 0xB000, False, 0x1000),
    "c": (HERE, 2, 0x5000, 0xC000, False, 0x1000),
    "d": (THERE, 1, 0x5000, 0xD000, False, 0x1000),
    "g": (HERE, 1, 0x7000, 0xE000, True, 0x1000),
    "l": (HERE, 1, 0x201000, 0x401000, False, 0x200000),
    "m": (HERE, 1, 0x202000, 0x402000, False, 0x200000),
    "u": (HERE, UNPAGED, 0x5000, 0x5000, False, 0x1000),
}
PHYSICAL = {"A": (HERE, 0xA000), "B": (HERE, 0xB000), "D": (THERE, 0xD000)}
ALL = "abcdglmuABD"


def translation(gpa: int, size: int, *, is_global: bool) -> Translation:
    return Translation(gpa, True, True, True, size, True, is_global, False, False, True)


def filled() -> CachedMappings:
    cached = CachedMappings(vpid=1)
    for eptrta, pcid, page, gpa, is_global, size in COMBINED.values():
        mapping = Mapping(translation(gpa, size, is_global=is_global), gpa | 7, True, (), (), 0)
        assert cached.keep(eptrta, pcid, page, mapping)
    for eptrta, gpa in PHYSICAL.values():
        cached.keep_guest_physical(eptrta, gpa, GuestPhysical(gpa | 7, (), 0))
    return cached


def left(cached: CachedMappings) -> str:
    mappings = {name: cached.find(root, pcid, page) for name, (root, pcid, page, *_) in COMBINED.items()}
    found = [name for name, mapping in mappings.items() if mapping is not None and mapping.leaf]
    return "".join(
        found + [name for name, where in PHYSICAL.items() if cached.find_guest_physical(*where) is not None]
    )


RULES = {
    "nothing": (lambda _: None, ""),
    "INVLPG: the current PCID, all EPTRTAs": (lambda c: c.invlpg(1, 0x5123), "ad"),
    "INVLPG: a global translation, from any PCID": (lambda c: c.invlpg(2, 0x7000), "g"),
    "INVLPG: every part of a large page": (lambda c: c.invlpg(1, 0x3FFFFF), "lm"),
    "MOV to CR3 without PCIDs": (lambda c: c.moved_to_cr3(0x9001, 0), ""),
    "MOV to CR3: the new PCID, not global ones": (lambda c: c.moved_to_cr3(0x9001, CR4_PCIDE), "abdlm"),
    "MOV to CR3 with bit 63": (lambda c: c.moved_to_cr3(KEEP | 0x9001, CR4_PCIDE), ""),
    "MOV to CR0 that turns paging off": (lambda c: c.moved_to_cr0(PAGING, 0), "abcdglm"),
    "MOV to CR0 that changes WP": (lambda c: c.moved_to_cr0(PAGING, PAGING | 1 << 16), ""),
    "MOV to CR4 that changes PGE": (lambda c: c.moved_to_cr4(CR4_PGE, 0, 1), "abcdglm"),
    "MOV to CR4 that clears PCIDE": (lambda c: c.moved_to_cr4(CR4_PCIDE, 0, 1), "abcdglm"),
    "MOV to CR4 that sets PCIDE": (lambda c: c.moved_to_cr4(0, CR4_PCIDE, 1), ""),
    "MOV to CR4 that sets SMEP": (lambda c: c.moved_to_cr4(CR4_PCIDE, CR4_PCIDE | CR4_SMEP, 1), "abdglm"),
    "MOV to CR4 that clears SMEP": (lambda c: c.moved_to_cr4(CR4_SMEP, 0, 1), ""),
    "MOV to CR4 that changes PAE": (lambda c: c.moved_to_cr4(CR4_PCIDE, CR4_PCIDE | CR4_PAE, 2), "cg"),
    "a page fault": (lambda c: c.page_fault(1, 0x5000), "ad"),
    "a page fault at a global translation": (lambda c: c.page_fault(2, 0x7000), "g"),
    "an EPT violation: its GPA": (lambda c: c.ept_violation(HERE, 0xA123), "aA"),
    "an EPT violation: its EPTRTA": (lambda c: c.ept_violation(THERE, 0xA000), ""),
    "single-context INVEPT": (lambda c: c.invept(THERE), "dD"),
    "all-context INVEPT": (lambda c: c.invept(None), ALL),
    "individual-address INVVPID: all PCIDs, all EPTRTAs": (lambda c: c.invvpid_address(0x5000), "acd"),
    "individual-address INVVPID of a global translation": (lambda c: c.invvpid_address(0x7000), "g"),
    "single-context INVVPID: no guest-physical mapping": (lambda c: c.invvpid(), "abcdglm"),
    "INVVPID retaining globals": (lambda c: c.invvpid(retaining_globals=True), "abcdlm"),
    "what a change of one EPT entry asks for": (lambda c: c.invalidate_gpa(0xA000), "aA"),
}


@pytest.mark.parametrize("rule", RULES)
def test_exactly_what_the_rule_names_is_gone(rule):
    invalidate, gone = RULES[rule]
    cached = filled()
    assert left(cached) == ALL
    invalidate(cached)
    assert left(cached) == "".join(name for name in ALL if name not in gone)


def test_a_global_mapping_serves_every_pcid_but_no_other_eptrta():
    cached = filled()
    assert cached.find(HERE, 5, 0x7000) is not None
    assert cached.find(THERE, 1, 0x7000) is None
    assert cached.find(HERE, UNPAGED, 0x7000) is None


def test_the_pcid_counts_only_if_pcids_are_on():
    assert (pcid_of(0x9123, 0), pcid_of(0x9123, CR4_PCIDE)) == (0, 0x123)


def test_there_is_room_for_so_many():
    cached = CachedMappings(vpid=1)
    mapping = Mapping(translation(0, 0x1000, is_global=False), 7, True, (), (), 0)
    assert all(cached.keep(HERE, 1, page << 12, mapping) for page in range(MAX_MAPPINGS))
    assert not cached.keep(HERE, 1, MAX_MAPPINGS << 12, mapping)
    assert len(cached) == 1
