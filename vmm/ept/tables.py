"""One EPT: four levels of tables with 64-bit entries, and the mappings cached from them.

Tables live in host memory that no guest can reach; a table's "physical address" is its number shifted by 12.
``translate`` is on the way of every TLB fill, so leaves are cached by GPA page as the processor caches
guest-physical mappings (SDM vol. 3, 28.4.1); every change of an entry drops what was cached of it, which is what
an INVEPT after each change does on hardware.
"""

from __future__ import annotations

from typing import Final

from vmm.ept.entry import ADDRESS_MASK, MEMORY_TYPE_SHIFT, PERMISSION_MASK, WRITE_BACK, EptEntry, Permission
from vmm.errors import OptionError
from vmm.memory import PAGE

ENTRIES: Final = 512
LEVELS: Final = 4
GPA_LIMIT: Final = 1 << 48

_LEAF: Final = ADDRESS_MASK | PERMISSION_MASK

#: A translated leaf: host page address | permissions (bits 2:0); 0 where nothing is mapped.
Leaf = int


class ExtendedPageTables:
    """Guest-physical to host-physical, with R, W and X for each 4 KiB page."""

    def __init__(self) -> None:
        self._tables: list[list[int]] = [[0] * ENTRIES]
        self._leaves: dict[int, Leaf] = {}
        #: The tables of the last level by the 2 MiB that they map: a walk's paging-structure cache.
        self._last_level: dict[int, list[int]] = {}

    def translate(self, gpa: int) -> Leaf:
        """Host page address and permissions for the page of ``gpa``; 0 if an entry on the way is not present."""
        try:
            return self._leaves[gpa >> 12]
        except KeyError:
            return self._walk(gpa)

    def entry(self, gpa: int) -> EptEntry:
        """The decoded leaf entry for ``gpa``; not present if a table on the way is missing."""
        table = self._leaf_table(gpa)
        return EptEntry.decode(table[gpa >> 12 & 511] if table else 0)

    def map(self, gpa: int, hpa: int, permissions: Permission) -> None:
        """Map the 4 KiB page at ``gpa`` to the host page at ``hpa`` (write-back memory)."""
        _check_page(gpa)
        self._set(gpa, hpa & ADDRESS_MASK | WRITE_BACK << MEMORY_TYPE_SHIFT | int(permissions))

    def map_range(self, gpa: int, hpa: int, size: int, permissions: Permission) -> None:
        """Map ``size`` bytes, a multiple of 4096, page by page."""
        _check_page(gpa)
        bits = WRITE_BACK << MEMORY_TYPE_SHIFT | int(permissions)
        done = 0
        while done < size:
            table = self._make_leaf_table(gpa + done)
            first = gpa + done >> 12 & ENTRIES - 1
            count = min(ENTRIES - first, (size - done) // PAGE)
            start = hpa + done | bits
            table[first : first + count] = range(start, start + count * PAGE, PAGE)
            done += count * PAGE
        self._leaves.clear()

    def protect(self, gpa: int, permissions: Permission) -> None:
        """Change what the entry of a mapped page allows."""
        table = self._last_level.get(gpa >> 21) or self._leaf_table(gpa)
        index = gpa >> 12 & 511
        if not table or not table[index]:
            raise OptionError(f"GPA {gpa:#x} is not mapped", where="EPT", fix="map it first")
        raw = table[index] = table[index] & ~PERMISSION_MASK | int(permissions)  # plain: an IntFlag is slow to test
        self._leaves[gpa >> 12] = raw & _LEAF if permissions else 0

    def unmap(self, gpa: int) -> None:
        """Make the page not present."""
        _check_page(gpa)
        self._set(gpa, 0)

    def _walk(self, gpa: int) -> Leaf:
        table = self._leaf_table(gpa) if gpa < GPA_LIMIT else None
        if table is None:
            return 0
        raw = table[gpa >> 12 & 511]
        leaf = raw & _LEAF if raw & PERMISSION_MASK else 0
        self._leaves[gpa >> 12] = leaf
        return leaf

    def _leaf_table(self, gpa: int) -> list[int] | None:
        table = self._last_level.get(gpa >> 21)
        if table is not None:
            return table
        table = self._tables[0]
        for shift in (39, 30, 21):
            raw = table[gpa >> shift & ENTRIES - 1]
            if not raw:
                return None
            table = self._tables[raw >> 12]
        self._last_level[gpa >> 21] = table
        return table

    def _make_leaf_table(self, gpa: int) -> list[int]:
        table = self._tables[0]
        for shift in (39, 30, 21):
            index = gpa >> shift & ENTRIES - 1
            if not table[index]:
                self._tables.append([0] * ENTRIES)
                table[index] = len(self._tables) - 1 << 12 | PERMISSION_MASK
            table = self._tables[table[index] >> 12]
        return table

    def _set(self, gpa: int, raw: int) -> None:
        self._make_leaf_table(gpa)[gpa >> 12 & ENTRIES - 1] = raw
        self._leaves.pop(gpa >> 12, None)


def _check_page(gpa: int) -> None:
    if gpa % PAGE or not 0 <= gpa < GPA_LIMIT:
        what = f"GPA {gpa:#x} is not the address of a page"
        raise OptionError(what, where="EPT", fix="give a multiple of 4096 below 2^48")
