"""One EPT: what the processor finds in its paging structures, and what is cached of that.

``translate`` is the processor's walk, with every rule of SDM vol. 3, 29.3. It is on the way of every TLB fill, so its
answers are cached by GPA page as a processor caches guest-physical mappings (29.4.1). Every change of an entry drops
exactly what was cached of the GPAs that it translates, which is what an INVEPT after each change does on hardware.
Splitting and joining pages changes no translation, so that it drops none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from vmm.ept.bits import (
    ACCESSED,
    ADDRESS_MASK,
    DIRTY,
    ENTRIES,
    GPA_LIMIT,
    LEVELS,
    MEMORY_TYPE_SHIFT,
    READ,
    SUB_PAGE_WRITE,
    SUPPRESS_VE,
    USER_EXECUTE,
    WRITE_BACK,
    page_mask,
    shift_of,
)
from vmm.ept.capabilities import EptProfile
from vmm.ept.entry import EptEntry, Permission, maps_page
from vmm.ept.leaf_cache import LeafCache
from vmm.ept.log import PageModificationLog
from vmm.ept.rules import RESERVED_TYPES, EntryRules
from vmm.ept.structures import PagingStructures, check_page
from vmm.ept.sub_pages import SubPageTable
from vmm.errors import OptionError
from vmm.memory import PAGE

#: The translation of a page: host page address | what all entries allow (bits 2:0, and bit 10 with mode-based execute
#: control) | ``CLEAN``; or ``MISCONFIGURED``; or 0 where an entry is not present.
Leaf = int
#: An entry on the way is misconfigured.
MISCONFIGURED: Final = 1 << 3
#: Accessed and dirty flags are on, and the page's dirty flag is clear: a write has to go through ``dirty`` first.
CLEAN: Final = 1 << 4
#: An accessed flag would have to be set first, and cannot be: the page-modification log is full (29.3.6).
HELD: Final = 1 << 5

_WRITE_BACK: Final = WRITE_BACK << MEMORY_TYPE_SHIFT
_NO_REGION: Final = (None, 0)
_PAGE_IN_REGION: Final = (1 << 21) - PAGE


class ExtendedPageTables:
    """Guest-physical to host-physical, with what is allowed, in pages of 4 KiB, 2 MiB and 1 GiB.

    ``profile`` says what the processor can do; ``host_size`` is where host-physical memory ends, in bytes.
    """

    def __init__(self, profile: EptProfile | None = None, *, host_size: int = 1 << 52) -> None:
        self.profile: Final = profile or EptProfile()
        self.rules: Final = EntryRules.of(self.profile)
        #: Told of each ``write_entry``: the EPTP, the level, and the first GPA that the entry translates.
        self.entry_written: Callable[[int, int, int], None] | None = None
        self._structures = PagingStructures(self.rules, host_size)
        #: Sub-page write permissions; None without that control.
        self.sub_pages = (
            SubPageTable(self.profile.capabilities.physical_address_width) if self.profile.sub_page_write else None
        )
        #: What is cached of it; for looking only.
        self.leaves: Final = LeafCache()
        self._low: Final = self.leaves.low
        #: By GPA bits 47:21, where the way down is in order: the page table and what the entries above it allow; or,
        #: for a large page, None and the leaf of its first 4 KiB in this region. A paging-structure cache.
        self._regions: dict[int, tuple[list[int] | None, int]] = {}
        self._present: Final = self.rules.present
        self._needs_read: Final = self.rules.needs_read
        self._clean: Final = CLEAN if self.profile.accessed_dirty else 0
        #: Gets each page whose dirty flag is set: the log of the vCPU at work. None if nothing is logged.
        self.log = PageModificationLog() if self._clean and self.profile.page_modification_log else None
        self._pte_reserved: Final = self.rules.level(1).leaf_reserved
        #: For ``protect``, a short cut: the bits of a PTE that decide about misconfigurations, besides permissions; and
        #: by permissions, whether a PTE is then present and well-formed, so that it is the leaf but for what is above.
        self._checked: Final = self._pte_reserved | 7 << MEMORY_TYPE_SHIFT
        self._sound: Final = tuple(
            bool(bits) and not self._clean and not self.rules.misconfigured(bits | _WRITE_BACK, 1) for bits in range(8)
        )

    def copy(self, root: int) -> ExtendedPageTables:
        """An EPT with the same entries, its PML4 table at the host-physical address ``root``; nothing is cached."""
        made = ExtendedPageTables(self.profile)
        made._structures = self._structures.copy(root)
        made.log, made.sub_pages, made.entry_written = self.log, self.sub_pages, self.entry_written
        return made

    # The processor's way

    @property
    def is_log_full(self) -> bool:
        """Whether there is a page-modification log in which nothing has room."""
        return self.log is not None and self.log.is_full

    @property
    def eptp(self) -> int:
        """The EPT pointer that selects this EPT (SDM vol. 3, 25.6.11)."""
        return self.profile.eptp(self._structures.root)

    def translate(self, gpa: int) -> Leaf:
        """What the processor finds for the page of ``gpa``; with accessed and dirty flags on, it sets A on the way."""
        try:
            return self._low[gpa >> 12] or self._walk(gpa)
        except IndexError:
            return self.leaves.high.get(gpa >> 12) or self._walk(gpa)

    def look(self, gpa: int) -> Leaf:
        """The same for the VMM's own eyes: no flag is set, and nothing cached that would hide the setting of one."""
        known = self.leaves.get(gpa >> 12)
        if known:
            return known
        return self._leaf(gpa, list(self.entries(gpa))) if self._clean and gpa < GPA_LIMIT else self.translate(gpa)

    def entries(self, gpa: int) -> Iterator[tuple[int, int]]:
        """(level, entry) for each entry that the processor reads for ``gpa``, from the PML4E on; sets nothing.

        The last one maps the page, is not present, or is misconfigured (SDM vol. 3, 29.3.3.3, step 1).
        """
        rules, table = self.rules, self._structures.tables[self._structures.root]
        for level in range(LEVELS, 0, -1):
            raw = table[gpa >> shift_of(level) & ENTRIES - 1]
            yield level, raw
            if not raw & rules.present or raw & rules.level(level).leaf_bit or rules.misconfigured(raw, level):
                return
            table = self._structures.tables[raw & ADDRESS_MASK]

    def allowed_above(self, gpa: int) -> int:
        """What the entries above the one that maps ``gpa`` allow together (bits 2:0 and 10); 0 if one ends the walk."""
        region = self._regions.get(gpa >> 21, _NO_REGION)
        if region[0] is not None:
            return region[1]
        path = list(self.entries(gpa)) if gpa < GPA_LIMIT else [(LEVELS, 0)]
        if not maps_page(path[-1][1], path[-1][0]):
            return 0
        allowed = self._present
        for _, entry in path[:-1]:
            allowed &= entry
        return allowed

    def dirty(self, gpa: int) -> Leaf:
        """Set D for a write to a page whose leaf is ``CLEAN`` (SDM vol. 3, 29.3.5); its leaf from now on.

        Not to be called while the page-modification log is full.
        """
        table, index, level = self._structures.find(gpa)
        table[index] |= DIRTY
        if self.log is not None:
            self.log.add(gpa)
        self._forget(gpa & page_mask(level), 1 << shift_of(level))
        return self.translate(gpa)

    def clean(self, gpa: int) -> None:
        """Clear the dirty flag of the page that ``gpa`` lies in, of whatever size."""
        table, index, level = self._structures.find(gpa)
        table[index] &= ~DIRTY
        self._forget(gpa & page_mask(level), 1 << shift_of(level))

    def _walk(self, gpa: int) -> Leaf:
        if gpa >= GPA_LIMIT:
            return 0
        known = self._regions.get(gpa >> 21)
        if known is None:
            leaf = self._walk_from_root(gpa)
        elif known[0] is None:
            leaf = known[1] | gpa & _PAGE_IN_REGION
            if not self._clean:
                self.leaves.put_region(gpa >> 21 << 9, known[1])
                return leaf
        else:
            leaf = self._leaf_of_page_table(known[0], gpa >> 12 & ENTRIES - 1, known[1])
        if leaf & HELD:
            return leaf
        self.leaves.put(gpa >> 12, leaf)
        return leaf

    def _leaf_of_page_table(self, table: list[int], index: int, above: int) -> Leaf:
        """The leaf by a PTE, where the entries above it are in order and allow ``above``."""
        raw = table[index]
        if not raw & self._present:
            return 0
        wrong = raw & self._pte_reserved or RESERVED_TYPES >> (raw >> MEMORY_TYPE_SHIFT & 7) & 1
        if wrong or (not raw & READ and raw & self._needs_read):
            return MISCONFIGURED
        leaf = raw & (ADDRESS_MASK | above)
        if self._clean:
            if not raw & DIRTY:
                leaf |= CLEAN
            if not raw & ACCESSED and self.is_log_full:
                return leaf | HELD
            table[index] = raw | ACCESSED
        return leaf

    def _walk_from_root(self, gpa: int) -> Leaf:
        path = list(self.entries(gpa))
        leaf = self._leaf(gpa, path)
        level, raw = path[-1]
        if level > 1 and (not leaf or leaf == MISCONFIGURED):
            return leaf
        if self._clean:
            if not raw & self._present or leaf == MISCONFIGURED:
                return leaf
            if self.is_log_full and not all(entry & ACCESSED for _, entry in path):
                return leaf | HELD
            for used, entry in path:
                self._structures.table(gpa, used)[gpa >> shift_of(used) & ENTRIES - 1] = entry | ACCESSED
        if level > 1:
            self._regions[gpa >> 21] = None, leaf & ~_PAGE_IN_REGION
        else:
            above = self._present
            for _, entry in path[:-1]:
                above &= entry
            self._regions[gpa >> 21] = self._structures.table(gpa, 1), above
        return leaf

    def _leaf(self, gpa: int, path: list[tuple[int, int]]) -> Leaf:
        """The leaf that a walk over these entries ends with."""
        level, raw = path[-1]
        if not raw & self._present:
            return 0
        if self.rules.misconfigured(raw, level):
            return MISCONFIGURED
        allowed = self._present
        for _, entry in path:
            allowed &= entry
        mask = page_mask(level)
        clean = 0 if raw & DIRTY else self._clean
        return raw & ADDRESS_MASK & mask | gpa & ~mask & -PAGE | allowed | clean

    # The VMM's way

    def host_page(self, gpa: int) -> int | None:
        """The host page that a GPA leads to, whatever its entries allow; None where nothing is mapped."""
        return self._structures.host_page(gpa) if 0 <= gpa < GPA_LIMIT else None

    def entry(self, gpa: int) -> EptEntry:
        """The decoded entry that maps ``gpa``, of whatever size; an empty one where nothing is mapped."""
        table, index, level = self._structures.find(gpa)
        raw = table[index]
        return EptEntry.decode(raw, level) if maps_page(raw, level) else EptEntry.decode(0)

    def read_entry(self, gpa: int, level: int) -> int:
        """The 64 bits of the entry of ``level`` 1 to 4 on the way to ``gpa``; ``OptionError`` if that ends above."""
        return self._structures.table(gpa, level)[gpa >> shift_of(level) & ENTRIES - 1]

    def write_entry(self, gpa: int, level: int, raw: int) -> None:
        """Put any 64 bits into the entry of ``level`` 1 to 4 on the way to ``gpa``.

        For whoever tests an EPT: nothing is checked but that a present, well-formed entry leads to a table that was
        made for this place, or to memory of the host. Raises ``OptionError`` otherwise, and if the way ends above.
        """
        table = self._structures.table(gpa, level)
        self._structures.check_write(gpa, level, raw)
        table[gpa >> shift_of(level) & ENTRIES - 1] = raw
        self._forget(gpa & page_mask(level), 1 << shift_of(level))
        if self.entry_written is not None:
            self.entry_written(self.eptp, level, gpa & page_mask(level))

    def map(self, gpa: int, hpa: int, permissions: Permission, *, size: int = PAGE) -> None:
        """Map one page of ``size`` bytes (4 KiB, 2 MiB or 1 GiB) at ``gpa`` to ``hpa``, as write-back memory.

        Replaces whatever was there. Raises ``OptionError`` for an address that is no multiple of the size, beyond the
        host's memory or from GPA 2^48 on, and for a size that the processor does not have.
        """
        covered = self._covered(gpa, size)
        self._structures.put_page(gpa, hpa, permissions, size)
        self._forget(*covered)

    def map_range(self, gpa: int, hpa: int, size: int, permissions: Permission) -> None:
        """Map ``size`` bytes, a multiple of 4096, with the largest pages that fit."""
        check_page(gpa)
        if size:
            check_page(gpa + size - PAGE)
        self._structures.check_host(hpa, size)
        changed = [self._covered(page, PAGE) for page in (gpa, gpa + size - PAGE)] if size else []
        try:
            self._put_range(gpa, hpa, size, permissions)
        finally:
            for covered in (*changed, (gpa, size)):
                self._forget(*covered)

    def protect(self, gpa: int, permissions: Permission, *, user_execute: bool | None = None) -> None:
        """Change what the entry of a mapped 4 KiB page allows; a large page that it lies in is split.

        With mode-based execute control X stands for supervisor- and user-mode linear addresses, unless
        ``user_execute`` says something else of the latter. Raises ``OptionError`` where nothing is mapped.
        """
        table, above = self._regions.get(gpa >> 21, _NO_REGION)
        if table is None:
            table, above = self._page_table(gpa), 0
        index = gpa >> 12 & ENTRIES - 1
        if not table or not table[index] & ~SUPPRESS_VE:
            raise OptionError(f"GPA {gpa:#x} is not mapped", where="EPT", fix="map it first")
        allow = self._structures.allow[permissions]
        if user_execute is not None:
            allow = allow & ~USER_EXECUTE | user_execute * USER_EXECUTE
        raw = table[index] = table[index] & ~self._present | allow
        if above and raw & self._checked == _WRITE_BACK and user_execute is None and self._sound[permissions]:
            self.leaves.put(gpa >> 12, raw & (ADDRESS_MASK | above))
        else:
            self.leaves.put(gpa >> 12, 0)

    def guard_sub_pages(self, gpa: int, *, guarded: bool) -> None:
        """Set or clear the sub-page write permission bit of the entry that maps a 4 KiB page."""
        table = self._structures.table(gpa, 1)
        index = gpa >> 12 & ENTRIES - 1
        table[index] = table[index] & ~SUB_PAGE_WRITE | guarded * SUB_PAGE_WRITE

    def unmap(self, gpa: int) -> None:
        """Make a 4 KiB page not present; a large page that it lies in is split."""
        check_page(gpa)
        covered = self._covered(gpa, PAGE)
        self._structures.clear(gpa)
        self._forget(*covered)

    def suppress(self, gpa: int, *, on: bool) -> None:
        """Set or clear "suppress #VE" for a 4 KiB page, which a large page that it lies in is split for."""
        check_page(gpa)
        self._structures.suppress(gpa, on=on)
        self._forget_regions(gpa & page_mask(LEVELS), 1 << shift_of(LEVELS))

    def is_convertible(self, gpa: int) -> bool:
        """Whether a violation at ``gpa`` would be converted to #VE, as far as the entry says (SDM vol. 3, 26.5.7.1)."""
        level, raw = list(self.entries(gpa))[-1]
        return not raw & SUPPRESS_VE and (maps_page(raw, level) or not raw & self._present)

    def split(self, gpa: int) -> None:
        """Turn the large page that maps ``gpa`` into 512 of the next size, with the same attributes and flags.

        Raises ``OptionError`` if no large page does, if it has reserved bits set, or if the processor has no 2 MiB
        pages.
        """
        self._structures.split(gpa)

    def join(self, gpa: int, *, size: int) -> None:
        """Turn 512 pages into the one page of ``size`` bytes (2 MiB or 1 GiB) at ``gpa`` that says the same.

        Accessed and dirty flags are those of all of them together. Raises ``OptionError`` if they are not 512 pages of
        one size, contiguous, aligned and alike, or if the entry that leads to them allows less than everything.
        """
        self._structures.join(gpa, size)
        if self._clean:
            self._forget(gpa, size)
        else:
            self._forget_regions(gpa, size)

    def _put_range(self, gpa: int, hpa: int, size: int, permissions: Permission) -> None:
        done = 0
        while done < size:
            page = self._largest_page(gpa + done | hpa + done, size - done)
            if page > PAGE:
                self._structures.put_page(gpa + done, hpa + done, permissions, page)
                done += page
            else:
                done += self._structures.put_small_pages(gpa + done, hpa + done, size - done, permissions)

    def _page_table(self, gpa: int) -> list[int] | None:
        table = self._structures.page_table(gpa)
        self._regions.pop(gpa >> 21, None)
        return table

    def _largest_page(self, alignment: int, size: int) -> int:
        has = self.profile.capabilities
        for page, capable in ((1 << 30, has.pages_1g), (1 << 21, has.pages_2m)):
            if capable and size >= page and not alignment % page:
                return page
        return PAGE

    # What is cached

    def _covered(self, gpa: int, size: int) -> tuple[int, int]:
        """The GPAs, (first, bytes), of which something else may hold once a page is put at ``gpa``.

        More than the page only where its tables have still to be made, in place of an entry that leads nowhere.
        """
        table, index, level = self._structures.find(gpa)
        if maps_page(table[index], level):
            return gpa, size
        return gpa & page_mask(level), max(size, 1 << shift_of(level))

    def _forget(self, gpa: int, size: int) -> None:
        """Forget all that is cached of a range; a page table that stays in place goes on being cached."""
        self.leaves.forget(gpa >> 12, size >> 12)
        if size > PAGE or self._regions.get(gpa >> 21, _NO_REGION)[0] is None:
            self._forget_regions(gpa, size)

    def _forget_regions(self, gpa: int, size: int) -> None:
        first, last = gpa >> 21, gpa + size - 1 >> 21
        for region in [region for region in self._regions if first <= region <= last]:
            del self._regions[region]
