"""Which entries are present, which are misconfigured (SDM vol. 3, 29.3.2 and 29.3.3.1).

An entry is present if any of bits 2:0 is set, or with mode-based execute control any of bits 2:0 and bit 10. One that
is not present is not looked at any further. One that is present is misconfigured if

1. bit 0 is clear and bit 1 is set: writes without reads;
2. bit 0 is clear and bit 2 is set (with mode-based execute control: bit 2 or bit 10), and the processor has no
   execute-only translations;
3. a reserved bit is set: 51:M always; 6:3 where it refers to a table; 7 in a PML4E, and in a PDE or PDPTE where the
   processor has no page of that size; the address bits of a large page below its alignment;
4. it maps a page, and its memory type is 2, 3 or 7.
"""

from __future__ import annotations

import enum
from functools import lru_cache
from typing import Final, NamedTuple

from attrs import Factory, field, frozen

from vmm.ept.bits import (
    ADDRESS_MASK,
    EXECUTE,
    LARGE,
    LEVELS,
    MEMORY_TYPE_SHIFT,
    PERMISSION_MASK,
    READ,
    USER_EXECUTE,
    WRITE,
    page_mask,
    shift_of,
)
from vmm.ept.capabilities import EptProfile

#: Bit n is set for each reserved memory type n.
RESERVED_TYPES: Final = 1 << 2 | 1 << 3 | 1 << 7
_TYPE_AND_PAT: Final = 0xF << MEMORY_TYPE_SHIFT


class Misconfigured(enum.Enum):
    """What is wrong with an entry; the values are for people."""

    WRITE_WITHOUT_READ = "W without R"
    EXECUTE_ONLY = "X without R, on a processor without execute-only translations"
    USER_EXECUTE_ONLY = "XU without R, on a processor without execute-only translations"
    RESERVED_BITS = "a reserved bit is set"
    MEMORY_TYPE = "a reserved memory type (2, 3 or 7)"


class Level(NamedTuple):
    """One level of the walk, for entries of one kind."""

    #: The lowest GPA bit that selects the entry.
    shift: int
    #: The entry bit that makes it map a page; every bit of a PTE, no bit of a PML4E.
    leaf_bit: int
    #: Bits that must be 0 if it refers to a table, and if it maps a page.
    table_reserved: int
    leaf_reserved: int
    #: Where the address of the page is.
    page: int


@frozen(slots=True)
class EntryRules:
    """The rules for entries under one profile, as masks; make one with :meth:`of`."""

    profile: EptProfile
    #: Any of these bits makes an entry present.
    present: int = field(
        init=False,
        default=Factory(
            lambda rules: PERMISSION_MASK | (USER_EXECUTE if rules.profile.mode_based_execute else 0), takes_self=True
        ),
    )
    #: None of these may be set where R is clear.
    needs_read: int = field(init=False, default=Factory(lambda rules: _needs_read(rules.profile), takes_self=True))
    #: The levels in the order of the walk, from 4 down to 1.
    levels: tuple[Level, ...] = field(
        init=False, default=Factory(lambda rules: _levels(rules.profile), takes_self=True)
    )

    @staticmethod
    @lru_cache(maxsize=64)
    def of(profile: EptProfile) -> EntryRules:
        """The rules under ``profile``."""
        return EntryRules(profile)

    def level(self, level: int) -> Level:
        """The rules of ``level`` 1 to 4."""
        return self.levels[LEVELS - level]

    def is_present(self, raw: int) -> bool:
        """Whether an entry is present."""
        return bool(raw & self.present)

    def reserved_bits(self, raw: int, level: int) -> int:
        """The reserved bits that are set in an entry, present or not."""
        of = self.level(level)
        return raw & (of.leaf_reserved if raw & of.leaf_bit else of.table_reserved)

    def misconfigured(self, raw: int, level: int) -> list[Misconfigured]:
        """Everything that makes a present entry misconfigured; nothing if it is not present."""
        if not raw & self.present:
            return []
        found = []
        execute_only = not raw & READ and not self.profile.capabilities.execute_only
        if raw & (READ | WRITE) == WRITE:
            found.append(Misconfigured.WRITE_WITHOUT_READ)
        if execute_only and raw & EXECUTE:
            found.append(Misconfigured.EXECUTE_ONLY)
        if execute_only and raw & USER_EXECUTE and self.profile.mode_based_execute:
            found.append(Misconfigured.USER_EXECUTE_ONLY)
        if self.reserved_bits(raw, level):
            found.append(Misconfigured.RESERVED_BITS)
        if raw & self.level(level).leaf_bit and RESERVED_TYPES >> (raw >> MEMORY_TYPE_SHIFT & 7) & 1:
            found.append(Misconfigured.MEMORY_TYPE)
        return found


def _needs_read(profile: EptProfile) -> int:
    if profile.capabilities.execute_only:
        return WRITE
    return WRITE | EXECUTE | (USER_EXECUTE if profile.mode_based_execute else 0)


def _levels(profile: EptProfile) -> tuple[Level, ...]:
    has = profile.capabilities
    beyond = ADDRESS_MASK & -1 << has.physical_address_width
    table = beyond | _TYPE_AND_PAT
    large = {4: False, 3: has.pages_1g, 2: has.pages_2m}
    levels = []
    for level in (4, 3, 2):
        below_alignment = ADDRESS_MASK & ~page_mask(level)
        levels.append(
            Level(
                shift=shift_of(level),
                leaf_bit=LARGE if large[level] else 0,
                table_reserved=table if large[level] else table | LARGE,
                leaf_reserved=beyond | below_alignment,
                page=ADDRESS_MASK & page_mask(level),
            )
        )
    return (*levels, Level(shift_of(1), -1, beyond, beyond, ADDRESS_MASK))
