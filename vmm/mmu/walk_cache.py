"""Walks of the guest's page tables that need not be done again, because nothing that they read has changed.

The engine forgets translations all the time (each change of a frame's state flushes its TLB), and asks again for pages
whose page-table entries are as they were. A walk that set no flag is a function of the entries it read and of what the
EPT said of the frames they lie in: while all of those are the same, so is its result. Comparing them costs a quarter of
a walk. Nothing has to be invalidated, since nothing is believed.
"""

from __future__ import annotations

from typing import Final

from vmm.ept import ExtendedPageTables
from vmm.ept.bits import ADDRESS_MASK
from vmm.memory import PAGE, GuestMemory
from vmm.paging import Translation

#: Walks that are remembered; then all are forgotten at once.
CAPACITY: Final = 1 << 16

#: CR3, linear page, kind of access, whether it is from ring 3.
Key = tuple[int, int, int, bool]
#: (GPA of an entry, what the EPT says of it, its place in ``GuestMemory.words``, its value).
Read = tuple[int, int, int, int]


class WalkCache:
    """Remembers walks in one paging mode with entries of 8 bytes; ``clear`` when the mode changes."""

    def __init__(self, memory: GuestMemory, ept: ExtendedPageTables) -> None:
        self._words: Final = memory.words
        self._translate = ept.translate
        self._walks: Final[dict[Key, tuple[Translation, tuple[Read, ...]]]] = {}

    def use(self, ept: ExtendedPageTables) -> None:
        """Walks are by another EPT from now on; what is remembered holds where that says the same."""
        self._translate = ept.translate

    def find(self, key: Key) -> tuple[Translation, tuple[Read, ...]] | None:
        """The translation that a walk would give, and what it read; None if that has to be found out."""
        known = self._walks.get(key)
        if known is None:
            return None
        words, translate = self._words, self._translate
        for gpa, leaf, place, entry in known[1]:
            if words[place] != entry or translate(gpa) != leaf:
                return None
        return known

    def keep(
        self, key: Key, translation: Translation, trail: list[tuple[int, int]]
    ) -> tuple[Read, ...]:  # fmt: skip
        """Remember a walk that read these (GPA, entry) and has set no flag; what it depends on."""
        if len(self._walks) >= CAPACITY:
            self._walks.clear()
        reads = []
        for gpa, entry in trail:
            leaf = self._translate(gpa)
            reads.append((gpa, leaf, (leaf & ADDRESS_MASK | gpa & PAGE - 1) >> 3, entry))
        self._walks[key] = translation, tuple(reads)
        return self._walks[key][1]

    def clear(self) -> None:
        """Forget everything."""
        self._walks.clear()
