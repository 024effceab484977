"""The sub-page permission table: which 128 bytes of a read-only page may be written (SDM vol. 3, 29.3.4).

Four levels of tables, selected by the same bits of a guest-physical address as EPT entries. Entries of levels 4 to 2
are valid if bit 0 is set, and have the address of the next table in bits M-1:12; all other bits are reserved. An entry
of level 1 is always there: bit 2n lets sub-page n be written, the odd bits are reserved.
"""

from __future__ import annotations

import enum
from typing import Final

from vmm.ept.bits import ADDRESS_MASK, ENTRIES, GPA_LIMIT, LEVELS, shift_of
from vmm.errors import OptionError
from vmm.memory import PAGE

#: Bytes in a sub-page, and how many there are in a page.
SUB_PAGE: Final = 128
SUB_PAGES: Final = PAGE // SUB_PAGE

_VALID: Final = 1
_ODD_BITS: Final = 0xAAAA_AAAA_AAAA_AAAA
_ROOT: Final = PAGE


class SubPageVerdict(enum.Enum):
    """What the table says of a write."""

    ALLOWED = "allowed"
    FORBIDDEN = "forbidden"
    MISS = "an entry on the way is not valid"
    MISCONFIGURED = "a reserved bit is set"


class SubPageTable:
    """The table that the SPPTP of the VMCS selects; ``physical_address_width`` is M, in bits."""

    def __init__(self, physical_address_width: int) -> None:
        self._reserved: Final = ~(ADDRESS_MASK & (1 << physical_address_width) - 1 | _VALID)
        self._tables: dict[int, list[int]] = {_ROOT: [0] * ENTRIES}
        #: The place that a table was made for: its level and the GPA bits that lead to it.
        self._home: dict[int, tuple[int, int]] = {}

    def look_up(self, gpa: int) -> SubPageVerdict:
        """What is found for a write to the sub-page of ``gpa``."""
        table = self._tables[_ROOT]
        for level in range(LEVELS, 1, -1):
            raw = table[gpa >> shift_of(level) & ENTRIES - 1]
            if not raw & _VALID:
                return SubPageVerdict.MISS
            if raw & self._reserved:
                return SubPageVerdict.MISCONFIGURED
            table = self._tables[raw & ADDRESS_MASK]
        entry = table[gpa >> 12 & ENTRIES - 1]
        if entry & _ODD_BITS:
            return SubPageVerdict.MISCONFIGURED
        allowed = entry >> 2 * (gpa % PAGE // SUB_PAGE) & 1
        return SubPageVerdict.ALLOWED if allowed else SubPageVerdict.FORBIDDEN

    def permit(self, gpa: int, writable: int) -> None:
        """Let the sub-pages of the page of ``gpa`` be written whose bit is set among the 32 of ``writable``."""
        entry = sum(1 << 2 * number for number in range(SUB_PAGES) if writable >> number & 1)
        self._table(gpa, 1, make=True)[gpa >> 12 & ENTRIES - 1] = entry

    def read_entry(self, gpa: int, level: int) -> int:
        """The 64 bits of the entry of ``level`` 1 to 4 on the way to ``gpa``; ``OptionError`` if that ends above."""
        return self._table(gpa, level)[gpa >> shift_of(level) & ENTRIES - 1]

    def write_entry(self, gpa: int, level: int, raw: int) -> None:
        """Put any 64 bits into that entry; one that leads to a table must lead to the one made for its place.

        Raises ``OptionError`` otherwise, and if the way ends above.
        """
        table = self._table(gpa, level)
        leads = level > 1 and raw & _VALID and not raw & self._reserved
        if not 0 <= raw < 1 << 64 or (leads and self._below(gpa, level, raw) is None):
            fix = "give 64 bits, with the address that read_entry gives"
            raise OptionError(f"entry {raw:#x}", where="sub-page permission table", fix=fix)
        table[gpa >> shift_of(level) & ENTRIES - 1] = raw

    def _table(self, gpa: int, level: int, *, make: bool = False) -> list[int]:
        if not (1 <= level <= LEVELS and 0 <= gpa < GPA_LIMIT):
            what = f"level {level} of GPA {gpa:#x}"
            raise OptionError(what, where="sub-page permission table", fix="give level 1 to 4, a GPA below 2^48")
        table = self._tables[_ROOT]
        for above in range(LEVELS, level, -1):
            index = gpa >> shift_of(above) & ENTRIES - 1
            below = self._below(gpa, above, table[index])
            if below is None:
                if not make:
                    what = f"there is no entry of level {level} for GPA {gpa:#x}"
                    raise OptionError(what, where="sub-page permission table", fix="permit something there first")
                table[index] = self._new_table(gpa, above) | _VALID
                below = self._tables[table[index] & ADDRESS_MASK]
            table = below
        return table

    def _below(self, gpa: int, level: int, raw: int) -> list[int] | None:
        """The table that an entry of ``level`` for ``gpa`` refers to, valid or not; None unless it was made for it."""
        if self._home.get(raw & ADDRESS_MASK) != (level - 1, gpa >> shift_of(level)):
            return None
        return self._tables[raw & ADDRESS_MASK]

    def _new_table(self, gpa: int, above: int) -> int:
        address = _ROOT + PAGE * len(self._tables)
        self._tables[address] = [0] * ENTRIES
        self._home[address] = above - 1, gpa >> shift_of(above)
        return address
