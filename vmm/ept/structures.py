"""EPT paging structures as the VMM builds and changes them: maps, splits, joins, and any 64 bits anywhere.

Tables live in host memory that no guest can reach; their addresses are numbers that only lead here. The VMM's way down
follows every entry that leads to a table, also where the processor would not (an entry that allows nothing keeps its
address). Nothing is cached here: that is ``tables.py``.
"""

from __future__ import annotations

from typing import Final

from vmm.ept.bits import (
    ACCESSED,
    ADDRESS_MASK,
    DIRTY,
    ENTRIES,
    EXECUTE,
    GPA_LIMIT,
    LARGE,
    LEVELS,
    MEMORY_TYPE_SHIFT,
    PERMISSION_MASK,
    SUPPRESS_VE,
    USER_EXECUTE,
    WRITE_BACK,
    page_mask,
    shift_of,
)
from vmm.ept.entry import Permission, maps_page
from vmm.ept.rules import EntryRules
from vmm.errors import OptionError
from vmm.memory import PAGE

#: Where the PML4 table of the first EPT of a machine is.
ROOT: Final = PAGE

_LEVEL_OF_SIZE: Final = {PAGE: 1, 1 << 21: 2, 1 << 30: 3}
_FLAGS: Final = ACCESSED | DIRTY
#: An entry with none of these has never been given a page.
_ANYTHING: Final = ADDRESS_MASK | 7 << MEMORY_TYPE_SHIFT | PERMISSION_MASK

#: A table and the index of an entry in it, and the entry's level.
Place = tuple[list[int], int, int]


class PagingStructures:
    """The tables of one EPT. ``host_size`` is where host-physical memory ends, ``root`` where the PML4 table is.

    With EPT-violation #VE every entry suppresses it from the start, so that it is delivered where the host wants it.
    """

    def __init__(self, rules: EntryRules, host_size: int, root: int = ROOT) -> None:
        self.rules: Final = rules
        self.root: Final = root
        self._host_size = host_size
        self._suppressed = SUPPRESS_VE if rules.profile.virtualization_exceptions else 0
        #: By permissions, the bits of an entry that allows so much; with mode-based execute control X stands for X, XU.
        self.allow: Final = tuple(bits | (rules.present & USER_EXECUTE if bits & EXECUTE else 0) for bits in range(8))
        #: By host-physical address.
        self.tables: Final[dict[int, list[int]]] = {root: [self._suppressed] * ENTRIES}
        #: The place that a table was made for: its level and the first GPA that it translates. It is used nowhere else.
        self._home: dict[int, tuple[int, int]] = {}
        self._next = root + PAGE

    def copy(self, root: int) -> PagingStructures:
        """The same tables again, with the PML4 table at ``root`` and the others as far behind it as here."""
        made, distance = PagingStructures(self.rules, self._host_size, root), root - self.root
        made._next = self._next + distance
        for address, (level, gpa) in {self.root: (LEVELS, 0), **self._home}.items():
            size = 1 << shift_of(level)
            made.tables[address + distance] = [
                raw + distance if level > 1 and self._below(gpa + index * size, level, raw) is not None else raw
                for index, raw in enumerate(self.tables[address])
            ]
            if address != self.root:
                made._home[address + distance] = level, gpa
        return made

    # Looking

    def find(self, gpa: int) -> Place:
        """The entry that maps ``gpa``, or the one where the way ends without one."""
        table = self.tables[self.root]
        for level in range(LEVELS, 1, -1):
            index = gpa >> shift_of(level) & ENTRIES - 1
            below = self._below(gpa, level, table[index])
            if below is None:
                return table, index, level
            table = below
        return table, gpa >> 12 & ENTRIES - 1, 1

    def host_page(self, gpa: int) -> int | None:
        """The host page that ``gpa`` leads to, whatever the entries allow; None where nothing is mapped."""
        table, index, level = self.find(gpa)
        raw = table[index]
        if not raw & _ANYTHING or not maps_page(raw, level):
            return None
        mask = page_mask(level)
        return raw & ADDRESS_MASK & mask | gpa & ~mask & -PAGE

    def table(self, gpa: int, level: int) -> list[int]:
        """The table of ``level`` 1 to 4 on the way to ``gpa``; raises ``OptionError`` if the way ends above."""
        if not (1 <= level <= LEVELS and 0 <= gpa < GPA_LIMIT):
            raise OptionError(f"level {level} of GPA {gpa:#x}", where="EPT", fix="give level 1 to 4, a GPA below 2^48")
        table = self.tables[self.root]
        for above in range(LEVELS, level, -1):
            below = self._below(gpa, above, table[gpa >> shift_of(above) & ENTRIES - 1])
            if below is None:
                what = f"there is no entry of level {level} for GPA {gpa:#x}"
                raise OptionError(what, where="EPT", fix="map or split first")
            table = below
        return table

    # Changing

    def check_write(self, gpa: int, level: int, raw: int) -> None:
        """Raise ``OptionError`` for an entry that would lead the processor to a place that it should not reach."""
        if not 0 <= raw < 1 << 64:
            raise OptionError(f"entry {raw:#x}", where="EPT", fix="give 64 bits")
        if not raw & self.rules.present or self.rules.misconfigured(raw, level):
            return
        if maps_page(raw, level):
            self.check_host(raw & ADDRESS_MASK, 1 << shift_of(level))
        elif self._below(gpa, level, raw) is None:
            what = f"entry {raw:#x} leads to no table of level {level - 1} for GPA {gpa:#x}"
            raise OptionError(what, where="EPT", fix="keep the address that read_entry gives")

    def put(self, gpa: int, level: int, raw: int) -> None:
        """Put an entry of ``level`` where it belongs, in place of all that was there, large pages split."""
        table, index = self.make_table(gpa, level), gpa >> shift_of(level) & ENTRIES - 1
        self._release(gpa, level, table[index])
        table[index] = raw

    def clear(self, gpa: int) -> None:
        """Make a 4 KiB page not present, and not mapped; large pages are split."""
        self.put(gpa, 1, self._suppressed)

    def suppress(self, gpa: int, *, on: bool) -> None:
        """Set or clear bit 63, suppress #VE, of the PTE that maps ``gpa``, or would; large pages are split."""
        table, index = self.make_table(gpa, 1), gpa >> 12 & ENTRIES - 1
        table[index] = table[index] & ~SUPPRESS_VE | (SUPPRESS_VE if on else 0)

    def put_page(self, gpa: int, hpa: int, permissions: Permission, size: int) -> int:
        """Map one page as write-back memory; its level. Raises ``OptionError`` (see ``ExtendedPageTables.map``)."""
        level = self.level_of(size)
        check_page(gpa, size)
        if hpa % size:
            raise OptionError(f"HPA {hpa:#x} is not the address of a page", where="EPT", fix=f"align it to {size:#x}")
        self.check_host(hpa, size)
        self.put(gpa, level, hpa | self._attributes(permissions) | (LARGE if level > 1 else 0))
        return level

    def put_small_pages(self, gpa: int, hpa: int, size: int, permissions: Permission) -> int:
        """Map 4 KiB pages up to the end of a page table, or of ``size``; the bytes that were mapped."""
        table, first = self.make_table(gpa, 1), gpa >> 12 & ENTRIES - 1
        count = min(ENTRIES - first, size // PAGE)
        start = hpa | self._attributes(permissions)
        table[first : first + count] = range(start, start + count * PAGE, PAGE)
        return count * PAGE

    def page_table(self, gpa: int) -> list[int] | None:
        """The page table whose entry maps ``gpa``, large pages split; None where nothing is mapped."""
        table, index, level = self.find(gpa)
        while level > 1:
            if not maps_page(table[index], level):
                return None
            self.split(gpa)
            table, index, level = self.find(gpa)
        return table if table[index] & _ANYTHING else None

    def split(self, gpa: int) -> None:
        """Turn the large page that maps ``gpa`` into 512 of the next size (see ``ExtendedPageTables.split``)."""
        table, index, level = self.find(gpa)
        raw = table[index]
        present = raw & self.rules.present
        if level == 1 or not maps_page(raw, level) or (present and self.rules.reserved_bits(raw, level)):
            raise OptionError(f"GPA {gpa:#x} is in no large page", where="EPT", fix="split 2 MiB or 1 GiB")
        smaller = 1 << shift_of(level - 1)
        self.level_of(smaller)
        first = raw & ~self.rules.level(level).leaf_reserved & (-1 if level == 3 else ~LARGE)
        address = self._new_table(gpa, level - 1, list(range(first, first + ENTRIES * smaller, smaller)))
        table[index] = address | self.rules.present | raw & ACCESSED

    def join(self, gpa: int, size: int) -> None:
        """Turn 512 pages into one (see ``ExtendedPageTables.join``)."""
        level = self.level_of(size)
        check_page(gpa, size)
        if level == 1:
            raise OptionError("a page of 4 KiB is the smallest", where="EPT", fix="join to 2 MiB or 1 GiB")
        table, index = self.table(gpa, level), gpa >> shift_of(level) & ENTRIES - 1
        joined = self._joined(gpa, level, table[index])
        if joined is None:
            what = f"the pages at GPA {gpa:#x} are not one"
            raise OptionError(what, where="EPT", fix="only contiguous, aligned pages that are all alike can be joined")
        self._release(gpa, level, table[index])
        table[index] = joined

    def make_table(self, gpa: int, level: int) -> list[int]:
        """The table of ``level`` for ``gpa``, made if there is none, large pages split."""
        while True:
            table, index, reached = self.find(gpa)
            if reached <= level:
                return self.table(gpa, level)
            if maps_page(table[index], reached):
                self.split(gpa)
            else:
                empty = [self._suppressed] * ENTRIES
                table[index] = self._new_table(gpa, reached - 1, empty) | self.rules.present

    # Inside

    def _attributes(self, permissions: Permission) -> int:
        return WRITE_BACK << MEMORY_TYPE_SHIFT | self.allow[permissions] | self._suppressed

    def _below(self, gpa: int, level: int, raw: int) -> list[int] | None:
        """The table that an entry of ``level`` for ``gpa`` refers to; None unless it was made for this place."""
        if maps_page(raw, level) or self._home.get(raw & ADDRESS_MASK) != (level - 1, gpa & page_mask(level)):
            return None
        return self.tables[raw & ADDRESS_MASK]

    def _new_table(self, gpa: int, level: int, entries: list[int]) -> int:
        address = self._next
        self._next += PAGE
        self.tables[address] = entries
        self._home[address] = level, gpa & page_mask(level + 1)
        return address

    def _release(self, gpa: int, level: int, raw: int) -> None:
        """The table that an entry of ``level`` refers to, and all below it, are not needed any more."""
        below = self._below(gpa, level, raw) if level > 1 else None
        if below is None:
            return
        del self._home[raw & ADDRESS_MASK], self.tables[raw & ADDRESS_MASK]
        first = gpa & page_mask(level)
        for index, entry in enumerate(below):
            self._release(first + (index << shift_of(level - 1)), level - 1, entry)

    def _joined(self, gpa: int, level: int, raw: int) -> int | None:
        """The entry of a page that says the same as the table that ``raw`` refers to; None if there is none."""
        below = self._below(gpa, level, raw)
        if below is None or raw & self.rules.present != self.rules.present:
            return None
        size, first = 1 << shift_of(level - 1), below[0] & ~_FLAGS
        alike = all(entry & ~_FLAGS == first + i * size for i, entry in enumerate(below))
        large = first | LARGE
        if not alike or not maps_page(first, level - 1) or first & ADDRESS_MASK & ~page_mask(level):
            return None
        if not first & _ANYTHING or (level == 2 and first & LARGE) or self.rules.misconfigured(large, level):
            return None
        flags = 0
        for entry in below:
            flags |= entry & _FLAGS
        return large | flags

    # Checks

    def level_of(self, size: int) -> int:
        """The level of a page of ``size`` bytes; raises ``OptionError`` if the processor has none."""
        level, has = _LEVEL_OF_SIZE.get(size, 0), self.rules.profile.capabilities
        if not level or (level == 2 and not has.pages_2m) or (level == 3 and not has.pages_1g):
            what = f"this processor has no pages of {size:#x} bytes"
            raise OptionError(what, where="EPT", fix="choose another size or profile")
        return level

    def check_host(self, hpa: int, size: int) -> None:
        """Raise ``OptionError`` for what reaches beyond the host's memory or the processor's physical addresses."""
        end = min(self._host_size, 1 << self.rules.profile.capabilities.physical_address_width)
        if not 0 <= hpa <= hpa + size <= end:
            what = f"{size:#x} bytes at HPA {hpa:#x} reach beyond the host's memory"
            raise OptionError(what, where="EPT", fix=f"stay below {end:#x}")


def check_page(gpa: int, size: int = PAGE) -> None:
    """Raise ``OptionError`` if ``gpa`` is not the address of a page of ``size`` bytes."""
    if gpa % size or not 0 <= gpa < GPA_LIMIT:
        what = f"GPA {gpa:#x} is not the address of a page"
        raise OptionError(what, where="EPT", fix=f"give a multiple of {size} below 2^48")
