"""What the vCPUs of a machine share under strict staleness: the changes of entries, and the reports of reliance.

A change of a paging-structure entry of the guest is noticed when it is made: frames that hold entries in use are not
writable in the free-running engines, so that each store to one is stepped. A change of an EPT entry without
invalidation is made by the host, who says so. After each change the engines' own TLBs are flushed, so that the first
use of every mapping comes to ``StrictMmu``, which compares it with the tables as they are now. So what is reported
depends on the guest and the host alone, not on when the engines ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from attrs import define, field, frozen
from iced_x86 import Decoder

from vmm.cpu.engine import READ
from vmm.decode import decode
from vmm.ept.bits import ADDRESS_MASK
from vmm.ept.entry import NAMES
from vmm.memory import PAGE
from vmm.mmu.refusals import StaleUse
from vmm.mmu.translation import ACCESSES
from vmm.paging import Access
from vmm.records import StaleTranslation
from vmm.reporter import Reporter
from vmm.tlb.mappings import CachedMappings, pcid_of

if TYPE_CHECKING:
    from vmm.decode import Decoded
    from vmm.memory import GuestMemory
    from vmm.mmu import CurrentInstruction

#: The INVVPID type single-context-retaining-global-translations.
RETAINING_GLOBALS: Final = 3
#: How many changed entries are remembered with who changed them.
MAX_CHANGES: Final = 1 << 14

#: CR0, CR3 and CR4.
Registers = tuple[int, int, int]


@frozen(slots=True)
class Change:
    """Who changed an entry last: ``rip`` is None for the host, ``time`` how many exits there had been."""

    rip: int | None
    vcpu: int
    time: int


@lru_cache(maxsize=16384)
def changes_mappings(code: bytes, bits: int) -> bool:
    """Whether an instruction of a block may invalidate mappings, so that the block has to be stepped."""
    at = 0
    for instruction in Decoder(bits, code, ip=0):
        if decode(code[at : at + instruction.len], bits).changes_mappings:
            return True
        at += instruction.len
    return False


@define(slots=True, eq=False)
class StrictTlb:
    """The state of strict staleness. ``flush`` makes every engine forget its address translations."""

    memory: GuestMemory
    reporter: Reporter
    flush: Callable[[], None]
    #: The mappings of each vCPU, by number.
    processors: list[CachedMappings] = field(factory=list)
    #: HPAs of the pages with paging-structure entries in use.
    tables: set[int] = field(factory=set)
    #: How many changes of entries there were.
    changes: int = 0
    #: Uses that were owed to a stale mapping.
    found: int = 0
    #: Who changed what: four bytes of a guest's entry, as ("", 0, HPA), and EPT entries by name, EPTRTA and place.
    _authors: dict[tuple[str, int, int], Change] = field(factory=dict)

    # What changes

    def watch(self, hpa: int) -> bool:
        """Entries of a frame are in use; True if it is the first time, so that engines may have it writable."""
        if hpa in self.tables:
            return False
        self.tables.add(hpa)
        return True

    def snapshot(self, hpas: Iterable[int]) -> dict[int, bytes]:
        """The frames with entries in use among these pages, as they are, for ``written``."""
        return {hpa: self.memory.read(hpa, PAGE) for hpa in {hpa & -PAGE for hpa in hpas} if hpa in self.tables}

    def written(self, before: Mapping[int, bytes], rip: int | None) -> None:
        """The guest's instruction at ``rip``, or the host, may have stored to these frames, which held ``before``."""
        for hpa, old in before.items():
            if hpa in self.tables and (new := self.memory.read(hpa, PAGE)) != old:
                for at in range(0, PAGE, 4):
                    if old[at : at + 4] != new[at : at + 4]:
                        self._note(("", 0, hpa + at), rip)
                self._changed()

    def ept_entry_written(self, eptp: int, level: int, gpa: int) -> None:
        """The host has changed the EPT entry of ``level`` whose translations begin at ``gpa``, without an INVEPT."""
        self._note((f"EPT {NAMES[level]}", eptp & ADDRESS_MASK, gpa), None)
        self._changed()

    def _note(self, what: tuple[str, int, int], rip: int | None) -> None:
        if len(self._authors) >= MAX_CHANGES:
            self._authors.clear()
        self._authors[what] = Change(rip, self.reporter.vcpu or 0, self.reporter.total)

    def _changed(self) -> None:
        self.changes += 1
        self.flush()

    # What invalidates

    def executed(self, number: int, decoded: Decoded, linear: int | None, before: Registers, after: Registers) -> None:
        """A vCPU has completed an instruction that may invalidate; ``linear`` is the operand of INVLPG."""
        cached, (cr0, cr3, cr4) = self.processors[number], after
        if linear is not None:
            cached.invlpg(pcid_of(cr3, cr4), linear)
        if decoded.loads_cr3:
            cached.moved_to_cr3(cr3, cr4)
        cached.moved_to_cr0(before[0], cr0)
        cached.moved_to_cr4(before[2], cr4, cr3)

    def invalidate_gpa(self, gpa: int) -> None:
        """The VMM has changed the entry that maps a page, and invalidates what was cached of it."""
        for cached in self.processors:
            cached.invalidate_gpa(gpa)

    def invept_page(self, eptrta: int | None, gpa: int) -> None:
        """The host has changed the entry that maps a page in one EPT, or with None in all, and invalidates."""
        for cached in self.processors:
            cached.invept_page(eptrta, gpa)

    def invept(self, eptrta: int | None) -> None:
        """INVEPT by the host on every processor: single-context, or all-context with None."""
        for cached in self.processors:
            cached.invept(eptrta)

    def invvpid(self, type: int, vpid: int | None, linear: int | None) -> None:  # noqa: A002 - the manual's word
        """INVVPID by the host; the operands are those of ``Machine.invvpid``."""
        for cached in self.processors:
            if vpid not in (None, cached.vpid):
                continue
            if linear is not None:
                cached.invvpid_address(linear)
            else:
                cached.invvpid(retaining_globals=type == RETAINING_GLOBALS)

    # Reports

    def report(self, use: StaleUse, instruction: CurrentInstruction) -> None:
        """The current instruction relies on a stale mapping; it may, from now on."""
        gva = instruction.faulting_address(use.page, use.access)
        modifies = use.access == READ and instruction.modifies(gva)
        access = Access.WRITE if modifies else ACCESSES[use.access]
        accesses = 1 << access | modifies << Access.READ
        if use.cached.name.startswith("EPT"):
            use.mapping.relied_on_ept |= accesses
        else:
            use.mapping.relied_on |= accesses
        self.found += 1
        self.reporter.charge()
        if not self.reporter.observed:
            return
        change = self._author(use)
        self.reporter.emit(
            StaleTranslation(
                rip=instruction.pc,
                access=access.name.lower(),
                gva=gva,
                gpa=use.mapping.translation.gpa | gva % PAGE,
                entry=use.cached.name,
                place=use.cached.place,
                old=use.cached.raw,
                new=use.now,
                writer=None if change is None else change.rip,
                writer_vcpu=None if change is None else change.vcpu,
                time=None if change is None else change.time,
                missing="INVEPT" if use.cached.name.startswith("EPT") else "INVLPG",
                view=use.view.shown,
            )
        )

    def _author(self, use: StaleUse) -> Change | None:
        entry = use.cached
        if entry.name.startswith("EPT"):
            return self._authors.get((entry.name, use.view.eptp & ADDRESS_MASK, entry.place))
        halves = (self._authors.get(("", 0, entry.hpa + half)) for half in (0, 4))
        return next((found for found in halves if found is not None), None)
