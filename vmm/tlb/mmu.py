"""Address translation that uses what is cached as long as a processor may."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from attrs import evolve

from vmm.cpu.engine import FETCH, READ, WRITE, Engine, R, W, X
from vmm.cpu.free import FreeRunningEngine
from vmm.ept import CLEAN, HELD, MISCONFIGURED
from vmm.ept.bits import ADDRESS_MASK, page_mask
from vmm.ept.entry import NAMES, maps_page
from vmm.memory import PAGE
from vmm.memory.frames import FrameState
from vmm.mmu import Mmu
from vmm.mmu.refusals import PagingStructureViolation, StaleUse, Stepwise, Unflushed, Violation
from vmm.mmu.structures import NO_WRITER
from vmm.mmu.translation import ACCESSES
from vmm.paging import Translation, entries
from vmm.paging.mode import CR0_USED, CR4_USED, EFER_USED, XD, D
from vmm.paging.rights import SUPERVISOR, USER
from vmm.tlb.mappings import CachedMappings, EntryRead, GuestPhysical, Mapping, StructureRead, tag_of
from vmm.tlb.strict import StrictTlb

if TYPE_CHECKING:
    from vmm.cpu.context import Context
    from vmm.ept.views import View
    from vmm.memory import GuestMemory
    from vmm.memory.frames import Frames
    from vmm.mmu.translation import Control
    from vmm.paging import Entry

_OFFSET: Final = PAGE - 1
_NEEDED: Final = {READ: R, WRITE: W, FETCH: X}
#: Accessed and dirty flags: processors set them, and they change no translation.
_GUEST_FLAGS: Final = 1 << 5 | 1 << 6
_EPT_FLAGS: Final = 1 << 8 | 1 << 9


class _Tables(NamedTuple):
    """What the tables say of a linear page now: the EPT's entries, and what is allowed of the page where it leads."""

    ept: tuple[EntryRead, ...]
    #: The GPA of the page, None where it leads nowhere, and what the EPT says of it.
    gpa: int | None
    leaf: int
    #: The accesses, as bits ``1 << Access``, that the guest's entries allow and the EPT does.
    allowed: int


class StrictMmu(Mmu):
    """An ``Mmu`` with the mappings of a logical processor; each use of one that is stale is refused once, on record."""

    def __init__(
        self,
        memory: GuestMemory,
        view: View,
        frames: Frames,
        context: Context,
        *,
        tlb: StrictTlb,
        number: int,
    ) -> None:
        super().__init__(memory, view, frames, context)
        self.cached: Final = CachedMappings(vpid=number + 1)
        #: What the last fill was served from.
        self._served: Mapping | None = None
        self._tlb = tlb
        tlb.processors.append(self.cached)

    def translate(
        self, control: Control, page: int, access: int, engine: Engine
    ) -> tuple[Translation, int] | None:
        """Both stages for a fill, by what is cached if anything is; None with ``refusal`` set if it is not allowed."""
        found = self._translate(control, page, access, engine)
        if found is None or not isinstance(engine, FreeRunningEngine):
            return found
        translation, leaf = found
        if leaf & ADDRESS_MASK not in self._tlb.tables:
            return found
        if access == WRITE and leaf & W:
            self.refusal = Stepwise(page, access)
            return None
        return translation._replace(writable=False), leaf

    def used(self, page: int, access: int, gpa: int, leaf: int) -> int:
        """As ``Mmu.used``; a processor that sets a dirty flag has cached the entry with it."""
        found = super().used(page, access, gpa, leaf)
        if access == WRITE and found and self._served is not None:
            self._served.leaf = found
            known = self.cached.find_guest_physical(self._eptrta, gpa)
            if known is not None:
                self.cached.keep_guest_physical(self._eptrta, gpa, evolve(known, leaf=found))
        return found

    def _translate(
        self, control: Control, page: int, access: int, engine: Engine
    ) -> tuple[Translation, int] | None:
        self._served = None
        cr0, cr3, cr4, efer, _ = control
        if self._mode_of != (cr0 & CR0_USED, cr4 & CR4_USED, efer & EFER_USED):
            self._select_mode(cr0, cr4, efer)
        known = self.cached.find(self._eptrta, tag_of(cr0, cr3, cr4), page)
        if known is not None and self._suffices(known, control, access):
            if self._renewed(known, access):
                return self._use(known, control, page, access)
            return known.translation, self._ept.translate(known.translation.gpa)
        if access == FETCH and isinstance(engine, FreeRunningEngine) and engine.pc & -PAGE != page:
            self.refusal = Stepwise(page, access)  # quirk "early-fetch": perhaps nobody gets there
            return None
        return self._anew(control, page, access, engine)

    @property
    def _remembers(self) -> bool:
        """What is cached is tracked here."""
        return False

    @property
    def _eptrta(self) -> int:
        return self._ept.eptp & ADDRESS_MASK

    def _peek_fetch(self, gva: int) -> int | None:
        """Fetches, too, go where a cached mapping leads."""
        context = self._context
        known = self.cached.find(self._eptrta, tag_of(context.cr0, context.cr3, context.cr4), gva & -PAGE)
        if known is None:
            return super()._peek_fetch(gva)
        host = known.leaf & ADDRESS_MASK or self._ept.host_page(known.translation.gpa)
        if host is None:
            return None
        side = self.fetch_side
        return host | gva & _OFFSET if side is None else side.host(host | gva & _OFFSET)

    # What is not cached

    def _anew(self, control: Control, page: int, access: int, engine: Engine) -> tuple[Translation, int] | None:
        """By the tables; cache what is allowed, invalidate what a fault or an EPT violation does."""
        pcid = tag_of(*control[:3])
        found = super().translate(control, page, access, engine)
        if found is None:
            self.cached.page_fault(pcid, page)
            if isinstance(self.refusal, Violation):
                self.cached.ept_violation(self._eptrta, self.refusal.gpa)
            return None
        translation, leaf = found
        by_ept = self._guest_physical(translation, leaf, access)
        if by_ept is None:
            return found
        return self._cache(control, page, access, translation, by_ept)

    def _guest_physical(self, translation: Translation, leaf: int, access: int) -> GuestPhysical | None:
        """The guest-physical mapping that serves an access, cached by now; None for an EPT violation."""
        gpa, needed = translation.gpa, self._needed(access, translation)
        known = self.cached.find_guest_physical(self._eptrta, gpa)
        if known is not None and known.leaf & needed and not _sets_flag(known.leaf, access):
            return known
        if leaf == MISCONFIGURED or not leaf & needed:
            self.cached.ept_violation(self._eptrta, gpa)
            return None
        made = GuestPhysical(leaf, self._ept_entries(gpa), self._tlb.changes)
        self.cached.keep_guest_physical(self._eptrta, gpa, made)
        return made

    def _cache(
        self, control: Control, page: int, access: int, translation: Translation, by_ept: GuestPhysical
    ) -> tuple[Translation, int] | None:
        """Make the combined mapping, and use it."""
        read = self._guest_entries(control[1], page)
        dirty = bool(not read or read[-1].raw & D)
        mapping = Mapping(translation, by_ept.leaf, dirty, self._structures_read(read), by_ept.entries, by_ept.known_at)
        room = self.cached.keep(self._eptrta, tag_of(*control[:3]), page, mapping)
        fresh = [self._watch(entry.gpa) for entry in read]
        if any(fresh) or not room:
            self.refusal = Unflushed(page, access)
            return None
        return self._use(mapping, control, page, access)

    def _watch(self, gpa: int) -> bool:
        host = self._ept.host_page(gpa)
        return host is not None and self._tlb.watch(host)

    # What is cached

    def _needed(self, access: int, translation: Translation) -> int:
        return self._user_fetch if access == FETCH and translation.user else _NEEDED[access]

    def _suffices(self, mapping: Mapping, control: Control, access: int) -> bool:
        """Whether the guest's part of a mapping allows an access; otherwise a processor may walk before it faults."""
        allowed = self._rights(mapping.translation, control)
        return bool(allowed >> ACCESSES[access] & 1) and (mapping.dirty or access != WRITE)

    def _renewed(self, mapping: Mapping, access: int) -> bool:
        """Look up anew what a mapping lacks of the EPT for an access; False for an EPT violation."""
        if mapping.leaf & self._needed(access, mapping.translation) and not _sets_flag(mapping.leaf, access):
            return True
        gpa = mapping.translation.gpa
        by_ept = self._guest_physical(mapping.translation, self._ept.translate(gpa), access)
        if by_ept is None:
            return False
        mapping.leaf, mapping.ept_entries, mapping.relied_on_ept = by_ept.leaf, by_ept.entries, 0
        mapping.known_at = min(mapping.known_at, by_ept.known_at)
        return True

    def _rights(self, translation: Translation, control: Control) -> int:
        """The accesses, as bits ``1 << Access``, that the guest's tables allowed whoever is at work now."""
        if not self._mode.levels:
            return 0b111
        index = translation.read_write | translation.user << 1 | translation.nx << 2
        return self._mode.rights[USER if control[4] else SUPERVISOR][index].allowed

    def _use(
        self, mapping: Mapping, control: Control, page: int, access: int
    ) -> tuple[Translation, int] | None:
        """What a mapping that suffices gives: all that it allows, unless it is stale."""
        allowed = self._rights(mapping.translation, control)
        if mapping.known_at != self._tlb.changes:
            now = self._tables(control, page)
            differing = self._difference(mapping, now)
            if differing is None:
                mapping.known_at = self._tlb.changes
            else:
                allowed &= self._owed_to_nobody(mapping, now) | mapping.relied_on | mapping.relied_on_ept
                if not allowed >> ACCESSES[access] & 1:
                    self.refusal = StaleUse(page, access, mapping, *differing, self.view)
                    return None
        self._served = mapping
        readable, writable, executable = (bool(allowed >> bit & 1) for bit in range(3))
        translation = mapping.translation._replace(
            readable=readable, writable=writable and mapping.dirty, executable=executable
        )
        return translation, mapping.leaf

    def _owed_to_nobody(self, mapping: Mapping, now: _Tables) -> int:
        """The accesses that a walk would allow as well, and take to the same place."""
        same = now.gpa == mapping.translation.gpa and (now.leaf ^ mapping.leaf) & ADDRESS_MASK == 0
        return now.allowed if same else 0

    def _difference(self, mapping: Mapping, now: _Tables) -> tuple[EntryRead, int] | None:
        """The first entry that a mapping was made from and that is another now, and what it is; None if none counts."""
        size = self._mode.entry_size
        for read in mapping.guest_entries:
            entry, host = read.entry, self._host_of_structure(read.entry.place)
            if host != entry.hpa:
                return _ept_difference(read.ept_entries, self._ept_entries(entry.place))
            raw = int.from_bytes(self._memory.read(host, size), "little")
            if (entry.raw ^ raw) & ~_GUEST_FLAGS:
                return entry, raw
        if (mapping.leaf ^ now.leaf) & ~(CLEAN | HELD) == 0 or not now.ept:
            return None
        return _ept_difference(mapping.ept_entries, now.ept)

    # What the tables say now, without setting any flag

    def _guest_entries(self, cr3: int, page: int) -> list[Entry]:
        """The entries that a walk would read; none if the EPT maps no memory to one of them."""
        try:
            with self.structures.reached_by(NO_WRITER):
                return entries(self.structures, self._mode, cr3, page)
        except PagingStructureViolation:
            return []

    def _structures_read(self, read: list[Entry]) -> tuple[StructureRead, ...]:
        """These entries, with the EPT's entries for the places where they lie."""
        return tuple(
            StructureRead(
                EntryRead(entry.name, entry.gpa, entry.raw, hpa=self._host_of_structure(entry.gpa)),
                self._ept_entries(entry.gpa),
            )
            for entry in read
        )

    def _host_of_structure(self, gpa: int) -> int:
        """Where a walk would read an entry at ``gpa``, an HPA; -1 if the EPT is against it, not counting the trap."""
        needed, leaf = self.structures.needed, self._ept.look(gpa)
        host = self._ept.host_page(gpa)
        if host is None or leaf == MISCONFIGURED:
            return -1
        is_code = self._frames.at(host).state not in (FrameState.DATA, FrameState.WINDOW)
        if leaf & needed != needed and not (is_code and self.view.can_allow(gpa, needed)):
            return -1
        return host | gpa & _OFFSET

    def _ept_entries(self, gpa: int) -> tuple[EntryRead, ...]:
        return tuple(
            EntryRead(f"EPT {NAMES[level]}", gpa & page_mask(level), raw, maps_page=maps_page(raw, level))
            for level, raw in self._ept.entries(gpa)
        )

    def _tables(self, control: Control, page: int) -> _Tables:
        gpa: int | None = page
        allowed = 0b111
        if self._mode.levels:
            gpa, allowed = self._by_guest(control, page, self._guest_entries(control[1], page))
        if gpa is None:
            return _Tables((), None, 0, 0)
        leaf = self._ept.look(gpa)
        if leaf in (0, MISCONFIGURED):
            return _Tables(self._ept_entries(gpa), gpa, leaf, 0)
        fetches = leaf & self.executable == self.executable
        allowed &= bool(leaf & R) | bool(leaf & W) << 1 | fetches << 2
        return _Tables(self._ept_entries(gpa), gpa, leaf, allowed)

    def _by_guest(self, control: Control, page: int, read: list[Entry]) -> tuple[int | None, int]:
        """The GPA of a linear page by these entries, and the accesses that they allow; None if they lead nowhere."""
        leaf = read[-1] if read else None
        if leaf is None or any(self._host_of_structure(entry.gpa) < 0 for entry in read):
            return None, 0
        if leaf.page_size is None or leaf.reserved or not leaf.present:
            return None, 0
        every, some = -1, 0
        for entry in read:
            if entry.writable is not None:  # a PDPTE of PAE paging has no rights
                every, some = every & entry.raw, some | entry.raw
        index = every >> 1 & 3 | (bool(some & XD and self._mode.nxe) << 2)
        who = USER if control[4] else SUPERVISOR
        return leaf.address | page & leaf.page_size - PAGE, self._mode.rights[who][index].allowed


def _sets_flag(leaf: int, access: int) -> bool:
    """Whether an access has to set an accessed or dirty flag of the EPT first, which takes a walk."""
    return bool(leaf & HELD or (access == WRITE and leaf & CLEAN))


def _ept_difference(before: tuple[EntryRead, ...], now: tuple[EntryRead, ...]) -> tuple[EntryRead, int]:
    """The first entry of a walk of the EPT that is another now, and what it is."""
    for old, new in zip(before, now, strict=False):
        if (old.raw ^ new.raw) & ~_EPT_FLAGS and old.maps_page == new.maps_page:
            return old, new.raw
    last = now[-1]  # of a large page that was split
    return EntryRead(last.name, last.place, before[-1].raw), last.raw
