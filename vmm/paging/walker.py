"""The page walk (SDM vol. 3, 4.3 to 4.8)."""

from __future__ import annotations

from typing import NoReturn

from vmm.paging.access import Access, EntryChanged, ErrorCode, PageFault, PhysicalMemory, Translation
from vmm.paging.mode import OFFSET_4_MIB, A, D, G, P, PagingMode, high_bits_of_4_mib_page
from vmm.paging.rights import SUPERVISOR, SUPERVISOR_AC, USER, Rights

#: How often a walk starts over because an entry changed under it, before it gives up.
_ATTEMPTS = 64

#: Error-code bits of a walk that found no translation: an entry with P clear; one with a reserved bit set.
_NOT_PRESENT = 0
_RESERVED = int(ErrorCode.PRESENT | ErrorCode.RESERVED)
_DENIED = int(ErrorCode.PRESENT)

_FLAGS = {Access.READ: A, Access.WRITE: A | D, Access.FETCH: A}
_translation = Translation._make  # half the time of calling the class; the walk is on the path of every fill


def walk(
    memory: PhysicalMemory,
    mode: PagingMode,
    cr3: int,
    gva: int,
    access: Access,
    *,
    user: bool,
    ac: bool = False,
    implicit: bool = False,
    set_bits: bool = True,
    trail: list[tuple[int, int]] | None = None,
) -> Translation:
    """Translate ``gva`` for one access and set the accessed and dirty flags that it sets.

    ``user`` is CPL = 3; ``ac`` is RFLAGS.AC; ``implicit`` marks an access to a system structure (GDT, IDT, TSS), which
    is a supervisor-mode one at any CPL and ignores AC. ``gva`` must be canonical in 4- and 5-level paging (its upper
    bits take no part in the walk); in the other modes bits 63:32 are ignored. PCID and cache bits of CR3 are ignored.
    With ``set_bits`` false nothing is stored, and ``writable`` is only true of a page that is dirty already. ``trail``,
    an empty list, gets (GPA, entry) of all that was read, unless flags had to be set.

    Raises :class:`PageFault`, and whatever ``memory`` raises. No flag is set before every check has passed; the manual
    leaves open whether a walk that faults sets A in the entries that it has used.
    """
    gva &= mode.linear_mask
    if not mode.levels:
        return _untranslated(gva)
    if implicit:
        user = ac = False
    load, size, address_mask, index_mask = memory.load, mode.entry_size, mode.address_mask, mode.index_mask
    attempts = 0
    while True:
        entry = cr3 if mode.levels != 3 else _load_pdpte(memory, mode, cr3, gva, access, user=user)
        every, some = -1, 0
        used = []
        for shift, leaf_bit, table_check, leaf_check, offset in mode.steps:  # noqa: B007 - needed after the loop
            where = entry & address_mask | gva >> shift & index_mask
            entry = load(where, size)
            used.append((where, entry))
            every &= entry
            some |= entry
            if entry & table_check == P:
                continue  # the next level, or with the entry of a page table the end
            if entry & leaf_bit and entry & leaf_check == P:
                break
            _no_translation(mode, entry, gva, access, user=user)
        who = USER if user else SUPERVISOR_AC if ac else SUPERVISOR
        rights = mode.rights[who][every >> 1 & 3 | some >> 61 & 4]
        if not rights[0] >> access & 1:
            _fault(mode, _DENIED, gva, access, user=user)

        flags = _FLAGS[access]
        if set_bits and (not every & A or entry & flags != flags):
            attempts += 1
            if not _set_flags(memory, size, used, flags, last=attempts == _ATTEMPTS):
                continue
            entry, used = entry | flags, []
        if trail is not None:
            trail += used
        return _result(mode, entry, gva, offset, rights)


def _result(mode: PagingMode, entry: int, gva: int, offset: int, rights: Rights) -> Translation:
    """What a leaf gives."""
    _, readable, writable, executable, user_page, nx, ac_dependent, read_write = rights
    gpa = entry & mode.address_mask & ~offset | gva & offset & ~0xFFF
    if offset == OFFSET_4_MIB:
        gpa |= high_bits_of_4_mib_page(entry)
    if writable and not entry & D:
        writable = False
    size, global_ = offset + 1, entry & G != 0 and mode.pge
    return _translation((gpa, readable, writable, executable, size, user_page, global_, nx, ac_dependent, read_write))


def _untranslated(gva: int) -> Translation:
    """Paging off: the linear address is the physical one, and nothing is protected."""
    return Translation(
        gpa=gva & ~0xFFF,
        readable=True,
        writable=True,
        executable=True,
        page_size=4096,
        user=True,
        global_=False,
        nx=False,
        ac_dependent=False,
        read_write=True,
    )


def _load_pdpte(
    memory: PhysicalMemory, mode: PagingMode, cr3: int, gva: int, access: Access, *, user: bool
) -> int:
    """Return the PDPTE of PAE paging that ``gva`` selects. It has no rights and no flags of its own.

    Deviation: a processor loads all four into registers when CR3 is written (or CR0 and CR4 switch PAE paging
    on), refuses that write with #GP if a reserved bit is set, and does not see later changes of the table in
    memory (SDM vol. 3, 4.4.1). Here the PDPTE is read at each walk and a reserved bit is a page fault, as on
    processors that have no such registers under nested paging.
    """
    entry = memory.load(cr3 & 0xFFFF_FFE0 | gva >> 27 & 0x18, 8)
    if entry & mode.pdpte_check != P:
        _no_translation(mode, entry, gva, access, user=user)
    return entry


def _set_flags(
    memory: PhysicalMemory, size: int, used: list[tuple[int, int]], flags: int, *, last: bool
) -> bool:
    """Set A in each entry from the top, and ``flags`` in the leaf; False if one changed since it was read.

    ``last`` says that there will be no other attempt: then ``EntryChanged`` leaves the walk.

    Each store is a locked read-modify-write (SDM vol. 3, 4.8). One entry can serve at several levels (a
    recursive table), hence by address.
    """
    wanted = {where: (entry, entry | A) for where, entry in used}
    where, entry = used[-1]
    wanted[where] = (entry, entry | flags)
    try:
        for gpa, (old, new) in wanted.items():
            if old != new:
                memory.compare_and_store(gpa, size, old, new)
    except EntryChanged:
        if last:
            raise
        return False
    return True


def _no_translation(mode: PagingMode, entry: int, gva: int, access: Access, *, user: bool) -> NoReturn:
    _fault(mode, _RESERVED if entry & P else _NOT_PRESENT, gva, access, user=user)


def _fault(mode: PagingMode, code: int, gva: int, access: Access, *, user: bool) -> NoReturn:
    if access == Access.WRITE:
        code |= ErrorCode.WRITE
    if user:
        code |= ErrorCode.USER
    if access == Access.FETCH and mode.reports_fetch:
        code |= ErrorCode.FETCH
    raise PageFault(gva, int(code))
