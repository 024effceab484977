"""What one logical processor caches of translations, and what invalidates it (SDM vol. 3, 29.4 and 4.10.4.1).

==============  ===============================  =======================================================
mappings        tagged with                      invalidated by
==============  ===============================  =======================================================
guest-physical  EPTRTA                           INVEPT; an EPT violation of the address
combined        VPID, PCID (or global), EPTRTA   INVEPT; INVVPID; INVLPG, MOV to CR3, CR0 and CR4; a
                                                 page fault or an EPT violation of the address
==============  ===============================  =======================================================

Nothing else drops a mapping, but want of room. A mapping is kept for 4 KiB, also of a larger page. The VPID is that of
the vCPU, which runs on a logical processor of its own. One deviation keeps the trap invisible to guests: an EPT
violation, or a change of an entry by the trap itself, drops of a combined mapping only what the EPT had to say.
A combined mapping also rests on what the EPT said of the paging structures that were read for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import define, field, frozen

from vmm.memory import PAGE
from vmm.paging import Translation
from vmm.paging.mode import CR0_PG

#: How many mappings of each kind a processor has room for; it then starts with none.
MAX_MAPPINGS: Final = 1 << 15
#: In place of a PCID: a global translation (SDM vol. 3, 4.10.2.4); one without paging, which is a guest-physical
#: mapping in all but its place here, so that nothing that is about linear addresses invalidates it.
GLOBAL: Final = -1
UNPAGED: Final = -2

_PCID: Final = 0xFFF
_CR3_KEEPS: Final = 1 << 63
CR4_PGE: Final = 1 << 7
CR4_PAE: Final = 1 << 5
CR4_PCIDE: Final = 1 << 17
CR4_SMEP: Final = 1 << 20

#: (EPTRTA, PCID or ``GLOBAL``, linear page)
Key = tuple[int, int, int]


def pcid_of(cr3: int, cr4: int) -> int:
    """The current PCID (SDM vol. 3, 4.10.1)."""
    return cr3 & _PCID if cr4 & CR4_PCIDE else 0


def tag_of(cr0: int, cr3: int, cr4: int) -> int:
    """The current PCID, or ``UNPAGED``."""
    return pcid_of(cr3, cr4) if cr0 & CR0_PG else UNPAGED


@frozen(slots=True)
class EntryRead:
    """A paging-structure entry as a walk read it.

    ``name`` is the manual's ("PTE"), with "EPT " in front for one of the EPT's. ``place`` is the GPA of the entry; for
    an EPT entry the GPA whose translation it took part in.
    """

    name: str
    place: int
    raw: int
    #: Of an EPT entry: whether it maps a page rather than refers to a table.
    maps_page: bool = False
    #: Of an entry of the guest: where it lies in memory, -1 if the walk did not get there.
    hpa: int = -1


@frozen(slots=True)
class StructureRead:
    """An entry of the guest's, and the EPT's entries for the place where it lies."""

    entry: EntryRead
    ept_entries: tuple[EntryRead, ...]


@define(slots=True, eq=False)
class Mapping:
    """A combined mapping: where a linear page leads, with all that both stages allowed when it was cached.

    ``leaf`` is what the EPT said of the page (see ``vmm.ept.Leaf``), 0 if that has to be looked up anew, ``dirty``
    whether D was set in the guest's entry.
    """

    translation: Translation
    leaf: int
    dirty: bool
    guest_entries: tuple[StructureRead, ...]
    ept_entries: tuple[EntryRead, ...]
    #: The number of changes of entries (``StrictTlb.changes``) up to which it is known to be what the tables say.
    known_at: int
    #: Accesses, as bits ``1 << Access``, that were reported to be owed to stale entries of the guest, and of the EPT.
    relied_on: int = 0
    relied_on_ept: int = 0


@frozen(slots=True)
class GuestPhysical:
    """A guest-physical mapping: what the EPT said of a page when it was cached."""

    leaf: int
    entries: tuple[EntryRead, ...]
    known_at: int


@define(slots=True, eq=False)
class CachedMappings:
    """The mappings of one logical processor, on which one vCPU runs, with one VPID (1 to 65535)."""

    vpid: int
    _combined: dict[Key, Mapping] = field(factory=dict)
    _guest_physical: dict[tuple[int, int], GuestPhysical] = field(factory=dict)

    def __len__(self) -> int:
        return len(self._combined)

    # Use

    def find(self, eptrta: int, pcid: int, page: int) -> Mapping | None:
        """The combined mapping of a linear page; a global one whatever the PCID."""
        found = self._combined.get((eptrta, pcid, page))
        return found if found is not None or pcid == UNPAGED else self._combined.get((eptrta, GLOBAL, page))

    def find_guest_physical(self, eptrta: int, gpa: int) -> GuestPhysical | None:
        """The guest-physical mapping of the page at ``gpa``."""
        return self._guest_physical.get((eptrta, gpa))

    def keep(self, eptrta: int, pcid: int, page: int, mapping: Mapping) -> bool:
        """Cache a combined mapping; False if there was no room, so that all others are gone."""
        room = len(self._combined) < MAX_MAPPINGS
        if not room:
            self._combined.clear()
        self._combined[eptrta, GLOBAL if mapping.translation.global_ else pcid, page] = mapping
        return room

    def keep_guest_physical(self, eptrta: int, gpa: int, mapping: GuestPhysical) -> None:
        """Cache the guest-physical mapping of the page at ``gpa``."""
        if len(self._guest_physical) >= MAX_MAPPINGS:
            self._guest_physical.clear()
        self._guest_physical[eptrta, gpa] = mapping

    # Instructions of the guest (SDM vol. 3, 4.10.4.1)

    def invlpg(self, pcid: int, linear: int) -> None:
        """INVLPG: the page of ``linear``, of whatever size, in the current PCID, and global ones; for all EPTRTAs."""
        self._drop(lambda key, mapping: key[1] in (pcid, GLOBAL) and _holds(mapping, key[2], linear))

    def moved_to_cr3(self, cr3: int, cr4: int) -> None:
        """MOV to CR3: all of the new PCID but global ones; nothing if PCIDs are on and the source has bit 63 set."""
        if not (cr4 & CR4_PCIDE and cr3 & _CR3_KEEPS):
            pcid = pcid_of(cr3, cr4)
            self._drop(lambda key, _: key[1] == pcid)

    def moved_to_cr0(self, before: int, after: int) -> None:
        """MOV to CR0: everything, if it turns paging off."""
        if before & ~after & CR0_PG:
            self.invvpid()

    def moved_to_cr4(self, before: int, after: int, cr3: int) -> None:
        """MOV to CR4: everything if PGE changes or PCIDE is cleared; the current PCID if PAE changes or SMEP is set."""
        changed = before ^ after
        if changed & CR4_PGE or before & ~after & CR4_PCIDE:
            self.invvpid()
        elif changed & CR4_PAE or after & ~before & CR4_SMEP:
            pcid = pcid_of(cr3, after)
            self._drop(lambda key, _: key[1] in (pcid, GLOBAL))

    # Faults (SDM vol. 3, 4.10.4.1 and 29.4.3.1)

    def page_fault(self, pcid: int, page: int) -> None:
        """A page fault: the mappings of the linear page in the current PCID, and global ones."""
        self._drop(lambda key, _: key[2] == page and key[1] in (pcid, GLOBAL))

    def ept_violation(self, eptrta: int, gpa: int) -> None:
        """An EPT violation: what is cached of the EPT for its address."""
        self._guest_physical.pop((eptrta, gpa & -PAGE), None)
        self._drop_second_stage(lambda key, mapping: key[0] == eptrta and mapping.translation.gpa == gpa & -PAGE)

    # Operations of the host (SDM vol. 3, 29.4.3.1, INVEPT, INVVPID)

    def invept(self, eptrta: int | None) -> None:
        """Single-context INVEPT, or with None all-context: guest-physical and combined mappings of that EPTRTA."""
        if eptrta is None:
            self._guest_physical.clear()
        for key in [key for key in self._guest_physical if key[0] == eptrta]:
            del self._guest_physical[key]
        self._drop(lambda key, _: eptrta in (None, key[0]))

    def invvpid_address(self, linear: int) -> None:
        """Individual-address INVVPID: combined mappings of the linear address, in all PCIDs and global."""
        self._drop(lambda key, mapping: key[1] != UNPAGED and _holds(mapping, key[2], linear))

    def invvpid(self, *, retaining_globals: bool = False) -> None:
        """Single-context INVVPID, all-context, or single-context retaining globals: combined mappings only."""
        kept = (UNPAGED, GLOBAL) if retaining_globals else (UNPAGED,)
        self._drop(lambda key, _: key[1] not in kept)

    def invept_page(self, eptrta: int | None, gpa: int) -> None:
        """Of an INVEPT, what a change of the entry of one page asks for, in one EPTRTA or with None in all of them.

        Besides what is cached of the EPT for the page, that is every combined mapping whose walk went through it.
        """
        for key in [key for key in self._guest_physical if key[1] == gpa and eptrta in (None, key[0])]:
            del self._guest_physical[key]
        self._drop(lambda key, mapping: eptrta in (None, key[0]) and _is_walked_through(mapping, gpa))
        self._drop_second_stage(lambda key, mapping: eptrta in (None, key[0]) and mapping.translation.gpa == gpa)

    def invalidate_gpa(self, gpa: int) -> None:
        """What the VMM's trap invalidates when it changes the entry of a page: what is cached of the EPT for it."""
        for key in [key for key in self._guest_physical if key[1] == gpa]:
            del self._guest_physical[key]
        self._drop_second_stage(lambda _, mapping: mapping.translation.gpa == gpa)

    def _drop_second_stage(self, wanted: Callable[[Key, Mapping], bool]) -> None:
        for key, mapping in self._combined.items():
            if wanted(key, mapping):
                mapping.leaf = 0

    def _drop(self, wanted: Callable[[Key, Mapping], bool]) -> None:
        for key in [key for key, mapping in self._combined.items() if wanted(key, mapping)]:
            del self._combined[key]


def _is_walked_through(mapping: Mapping, gpa: int) -> bool:
    """Whether an entry that a mapping was made from lies in the page at ``gpa``."""
    return any(read.entry.place & -PAGE == gpa for read in mapping.guest_entries)


def _holds(mapping: Mapping, page: int, linear: int) -> bool:
    """Whether the guest's page that a mapping is part of holds a linear address."""
    mask = -mapping.translation.page_size
    return page & mask == linear & mask
