"""Paging modes: which one CR0, CR4 and EFER select, and what its entries look like (SDM vol. 3, 4.1 to 4.5).

Entries of 8 bytes (M is MAXPHYADDR; r: reserved, must be 0; -: ignored; *: reserved unless EFER.NXE)::

              63  62..52   51..M  M-1..30 29..21 20..13  12   11..9  8   7   6   5   4    3    2    1    0
    PML5E     XD*    -       r    next table ------------------  -   -   r   -   A  PCD  PWT  U/S  R/W   P
    PML4E     XD*    -       r    next table ------------------  -   -   r   -   A  PCD  PWT  U/S  R/W   P
    PDPTE     XD*    -       r    next table ------------------  -   -  PS=0 -   A  PCD  PWT  U/S  R/W   P
     1 GiB    XD*    -       r    page       r      r     PAT    -   G  PS=1 D   A  PCD  PWT  U/S  R/W   P
    PDE       XD*    - (1)   r    next table ------------------  -   -  PS=0 -   A  PCD  PWT  U/S  R/W   P
     2 MiB    XD*    - (1)   r    page ------------  r    PAT    -   G  PS=1 D   A  PCD  PWT  U/S  R/W   P
    PTE       XD*    - (1)   r    page ------------------------  -   G  PAT  D   A  PCD  PWT  U/S  R/W   P
    PAE PDPTE r      r       r    next table ------------------  -   r   r   r   r  PCD  PWT   r    r    P

    (1) reserved with PAE paging, which has no bits to ignore there

Entries of 4 bytes (32-bit paging; N is min(40, M), reserved bits exist only with CR4.PSE)::

              31..22     21..N-19   N-20..13      12   11..9  8   7   6   5   4    3    2    1    0
    PDE       next table ---------------------------     -    -  PS=0 -   A  PCD  PWT  U/S  R/W   P
     4 MiB    31..22         r      N-1..32 of GPA PAT   -    G  PS=1 D   A  PCD  PWT  U/S  R/W   P
    PTE       page ---------------------------------     -    G  PAT  D   A  PCD  PWT  U/S  R/W   P
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from attrs import Factory, field, frozen

from vmm.errors import OptionError
from vmm.paging.rights import RightsTable, tabulate

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# Bits of an entry.
P = 1 << 0
RW = 1 << 1
US = 1 << 2
A = 1 << 5
D = 1 << 6
PS = 1 << 7
G = 1 << 8
XD = 1 << 63

CR0_WP = 1 << 16
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_PGE = 1 << 7
CR4_LA57 = 1 << 12
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21
EFER_LME = 1 << 8
EFER_NXE = 1 << 11

# The bits that make a difference to paging.
CR0_USED = CR0_WP | CR0_PG
CR4_USED = CR4_PSE | CR4_PAE | CR4_PGE | CR4_LA57 | CR4_SMEP | CR4_SMAP
EFER_USED = EFER_LME | EFER_NXE

#: Physical-address width that Unicorn's processor reports in CPUID leaf 80000008H.
DEFAULT_MAXPHYADDR = 40

#: Offset within a 4 MiB page; no page of another mode has this size.
OFFSET_4_MIB = (1 << 22) - 1


def high_bits_of_4_mib_page(pde: int) -> int:
    """Return bits 39:32 of the GPA, which a 4 MiB PDE holds from its bit 13 on (PSE-36), in their place.

    Those that the processor's physical addresses do not have are reserved, so a good PDE has none of them.
    """
    return (pde >> 13 & 0xFF) << 32


def _bits(high: int, low: int) -> int:
    """Return a mask of bits ``high`` down to ``low``; none if ``high`` is below ``low``."""
    return (1 << high + 1) - (1 << low) if high >= low else 0


class Step(NamedTuple):
    """One level of the walk. An entry is good if ``entry & check == P``: present, no reserved bit set.

    With ``table_check`` it is one that refers to a table, or that of a page table.
    """

    #: ``gva >> shift & index_mask`` is the entry's offset in its table, in bytes.
    shift: int
    #: The bit that makes an entry of this level a leaf: PS, or P in a page table, or 0 if none can be one.
    leaf_bit: int
    table_check: int
    leaf_check: int
    #: Mask of the offset within a page mapped at this level.
    offset: int


def _derived(compute: Callable[[PagingMode], T]) -> T:
    """Make a field that follows from the ones above it, and has no say in equality."""
    made: T = field(init=False, eq=False, repr=False, default=Factory(compute, takes_self=True))
    return made


@frozen(slots=True)
class PagingMode:
    """All that CR0, CR4 and EFER say about paging, decoded once; make one with :meth:`of`.

    ``name`` is "off", "32-bit", "pae", "4-level" or "5-level"; ``levels`` 0, 2, 3, 4 or 5 tables a walk.
    ``nxe`` is EFER.NXE where it counts, which is not in 32-bit paging. The fields below ``gib_pages`` are
    derived, for the walker.
    """

    name: str
    levels: int
    wp: bool
    nxe: bool
    smep: bool
    smap: bool
    pse: bool
    pge: bool
    #: Physical-address width in bits, 32 to 52.
    maxphyaddr: int = DEFAULT_MAXPHYADDR
    #: Whether PS in a PDPTE of 4- and 5-level paging maps 1 GiB (CPUID.80000001H:EDX[26]) or is reserved.
    gib_pages: bool = True

    #: Size of an entry in bytes.
    entry_size: int = _derived(lambda mode: 4 if mode.levels == 2 else 8)
    #: Mask of an entry's offset in its table.
    index_mask: int = _derived(lambda mode: 0x1000 - mode.entry_size)
    #: Mask of a linear address: 64 bits in IA-32e mode, otherwise 32.
    linear_mask: int = _derived(lambda mode: _bits(63 if mode.levels > 3 else 31, 0))
    #: Mask of the GPA in an entry, and in CR3 (but for the PDPTEs of PAE paging).
    address_mask: int = _derived(lambda mode: _bits(31 if mode.levels == 2 else mode.maxphyaddr - 1, 12))
    #: P and the reserved bits of a PDPTE of PAE paging.
    pdpte_check: int = _derived(lambda mode: P | _bits(2, 1) | _bits(8, 5) | _bits(63, mode.maxphyaddr))
    #: Whether a fetch sets I/D in an error code (SDM vol. 3, 4.7).
    reports_fetch: bool = _derived(lambda mode: mode.smep or mode.nxe)
    #: The levels from the top; without the PDPTEs of PAE paging, which are another kind of thing.
    steps: tuple[Step, ...] = _derived(lambda mode: _steps(mode))  # noqa: PLW0108 - defined below
    #: Who may do what (see ``vmm.paging.rights``).
    rights: RightsTable = _derived(lambda mode: tabulate(wp=mode.wp, smep=mode.smep, smap=mode.smap))  # noqa: RUF009

    @staticmethod
    def of(
        cr0: int, cr4: int, efer: int, *, maxphyaddr: int = DEFAULT_MAXPHYADDR, gib_pages: bool = True
    ) -> PagingMode:
        """Return the mode that these control registers select (SDM vol. 3, 4.1.1).

        Bits that have no part in paging make no difference: equal modes are the same object. Raises
        ``OptionError`` if ``maxphyaddr`` is not in 32..52.
        """
        return _decode(cr0 & CR0_USED, cr4 & CR4_USED, efer & EFER_USED, maxphyaddr, gib_pages)


@lru_cache(maxsize=256)
def _decode(cr0: int, cr4: int, efer: int, maxphyaddr: int, gib_pages: bool) -> PagingMode:  # noqa: FBT001 - lru_cache keys by position
    if not 32 <= maxphyaddr <= 52:
        raise OptionError(f"{maxphyaddr} bits of physical address", where="maxphyaddr", fix="choose 32 to 52")
    name, levels = _select(cr0, cr4, efer)
    return PagingMode(
        name=name,
        levels=levels,
        wp=bool(cr0 & CR0_WP),
        nxe=bool(efer & EFER_NXE and cr4 & CR4_PAE),
        smep=bool(cr4 & CR4_SMEP),
        smap=bool(cr4 & CR4_SMAP),
        pse=bool(cr4 & CR4_PSE),
        pge=bool(cr4 & CR4_PGE),
        maxphyaddr=maxphyaddr,
        gib_pages=gib_pages,
    )


def _select(cr0: int, cr4: int, efer: int) -> tuple[str, int]:
    if not cr0 & CR0_PG:
        return "off", 0
    if not cr4 & CR4_PAE:
        return "32-bit", 2
    if not efer & EFER_LME:
        return "pae", 3
    return ("5-level", 5) if cr4 & CR4_LA57 else ("4-level", 4)


def _steps(mode: PagingMode) -> tuple[Step, ...]:
    if mode.levels == 0:
        return ()
    return _steps_of_4_byte_entries(mode) if mode.levels == 2 else _steps_of_8_byte_entries(mode)


def _steps_of_4_byte_entries(mode: PagingMode) -> tuple[Step, ...]:
    # PSE-36 is always there (CPUID.01H:EDX[17]), and so is the PAT.
    reserved_4_mib = _bits(21, min(40, mode.maxphyaddr) - 19)
    large = PS if mode.pse else 0
    return (
        Step(20, large, P | large, P | reserved_4_mib, OFFSET_4_MIB),
        Step(10, P, P, P, 0xFFF),
    )


def _steps_of_8_byte_entries(mode: PagingMode) -> tuple[Step, ...]:
    pae = mode.levels == 3
    good = P | _bits(62 if pae else 51, mode.maxphyaddr) | (0 if mode.nxe else XD)
    gib = mode.gib_pages
    steps = (
        Step(45, 0, good | PS, 0, 0),
        Step(36, 0, good | PS, 0, 0),
        Step(27, PS, good | PS, good | _bits(29, 13), _bits(29, 0)) if gib else Step(27, 0, good | PS, 0, 0),
        Step(18, PS, good | PS, good | _bits(20, 13), _bits(20, 0)),
        Step(9, P, good, good, 0xFFF),
    )
    return steps[3:] if pae else steps[-mode.levels :]
