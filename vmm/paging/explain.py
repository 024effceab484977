"""A page walk laid open for people: the entries that took part, decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from vmm.paging.mode import OFFSET_4_MIB, RW, US, XD, A, D, G, P, high_bits_of_4_mib_page

if TYPE_CHECKING:
    from vmm.paging.access import PhysicalMemory
    from vmm.paging.mode import PagingMode, Step

_NAMES = {5: "PML5E", 4: "PML4E", 3: "PDPTE", 2: "PDE", 1: "PTE"}


@frozen(slots=True)
class Entry:
    """One paging-structure entry. A field is None where this kind of entry has no such bit."""

    #: 5 (PML5E) down to 1 (PTE).
    level: int
    #: The manual's name: "PML4E", "PDPTE", "PDE", "PTE" …
    name: str
    gpa: int
    #: The entry as it is in memory, 4 or 8 bytes.
    raw: int
    present: bool
    writable: bool | None
    user: bool | None
    accessed: bool | None
    dirty: bool | None
    global_: bool | None
    nx: bool | None
    #: Whether it maps a page (of ``page_size`` bytes) rather than refers to a table.
    leaf: bool
    page_size: int | None
    #: GPA of the page or of the next table. Means something only if the entry is present.
    address: int
    #: The reserved bits that are set; not zero in a present entry means #PF with RSVD.
    reserved: int


def entries(memory: PhysicalMemory, mode: PagingMode, cr3: int, gva: int) -> list[Entry]:
    """Return the entries that take part in the translation of ``gva``, from the top; none with paging off.

    The last one is the leaf, or the first that is not present or has a reserved bit set. Changes nothing and
    raises no page fault; what ``memory.load`` raises comes through.
    """
    gva &= mode.linear_mask
    found: list[Entry] = []
    table = cr3 & mode.address_mask
    if mode.levels == 3:
        where = cr3 & 0xFFFF_FFE0 | gva >> 27 & 0x18
        found.append(_pdpte_of_pae(mode, where, memory.load(where, 8)))
        table = found[-1].address
    for level, step in zip(range(len(mode.steps), 0, -1), mode.steps, strict=True):
        if found and _ends(found[-1]):
            break
        where = table | gva >> step.shift & mode.index_mask
        found.append(_decode(mode, step, level, where, memory.load(where, mode.entry_size)))
        table = found[-1].address
    return found


def _ends(entry: Entry) -> bool:
    return entry.leaf or not entry.present or entry.reserved != 0


def _decode(mode: PagingMode, step: Step, level: int, where: int, raw: int) -> Entry:
    leaf = raw & step.leaf_bit != 0
    address = raw & mode.address_mask
    if leaf:
        address &= ~step.offset
        if step.offset == OFFSET_4_MIB:
            address |= high_bits_of_4_mib_page(raw)
    return Entry(
        level=level,
        name=_NAMES[level],
        gpa=where,
        raw=raw,
        present=raw & P != 0,
        writable=raw & RW != 0,
        user=raw & US != 0,
        accessed=raw & A != 0,
        dirty=raw & D != 0 if leaf else None,
        global_=raw & G != 0 if leaf else None,
        nx=raw & XD != 0 if mode.nxe else None,
        leaf=leaf,
        page_size=step.offset + 1 if leaf else None,
        address=address,
        reserved=raw & (step.leaf_check if leaf else step.table_check) & ~P,
    )


def _pdpte_of_pae(mode: PagingMode, where: int, raw: int) -> Entry:
    return Entry(
        level=3,
        name=_NAMES[3],
        gpa=where,
        raw=raw,
        present=raw & P != 0,
        writable=None,
        user=None,
        accessed=None,
        dirty=None,
        global_=None,
        nx=None,
        leaf=False,
        page_size=None,
        address=raw & mode.address_mask,
        reserved=raw & mode.pdpte_check & ~P,
    )
