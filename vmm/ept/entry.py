"""EPT paging-structure entries, bit by bit (SDM vol. 3, 29.3.2, tables 29-2 to 29-7).

Levels are numbered from the page up: 1 (PTE), 2 (PDE), 3 (PDPTE), 4 (PML4E). M is the physical-address width; r:
reserved, must be 0; -: ignored::

                 63  62 61  60  59 58 57 56..52 51..M M-1..30 29..21 20..12 11 10  9 8  7   6   5..3  2 1 0
    4 PML4E      -   -  -   -   -  -  -    -      r   next table ---------- -  XU  - A  r   r    r    X W R
    3 PDPTE      -   -  -   -   -  -  -    -      r   next table ---------- -  XU  - A  0   r    r    X W R
      1 GiB      SVE -  -   SSS -  PW VGP  -      r   page      r      r    -  XU  D A  1  IPAT type  X W R
    2 PDE        -   -  -   -   -  -  -    -      r   next table ---------- -  XU  - A  0   r    r    X W R
      2 MiB      SVE -  -   SSS -  PW VGP  -      r   page ------      r    -  XU  D A  1  IPAT type  X W R
    1 PTE        SVE -  SPP SSS -  PW VGP  -      r   page ---------------- -  XU  D A  -  IPAT type  X W R

A field counts only where a control switches it on: XU "mode-based execute control for EPT" (X is then for
supervisor-mode linear addresses only), A and D bit 6 of the EPTP, SSS its bit 7, VGP "guest-paging verification", PW
"EPT paging-write control", SPP "sub-page write permissions for EPT", SVE "EPT-violation #VE". Elsewhere it is ignored.
"""

from __future__ import annotations

import enum
from typing import Final

from attrs import frozen

from vmm.ept.bits import (
    ACCESSED,
    ADDRESS_MASK,
    DIRTY,
    IGNORE_PAT,
    LARGE,
    MEMORY_TYPE_SHIFT,
    PAGING_WRITE,
    PERMISSION_MASK,
    SUB_PAGE_WRITE,
    SUPERVISOR_SHADOW_STACK,
    SUPPRESS_VE,
    USER_EXECUTE,
    VERIFY_GUEST_PAGING,
    page_mask,
)

#: The manual's names of the entries, by level.
NAMES: Final = {1: "PTE", 2: "PDE", 3: "PDPTE", 4: "PML4E"}


class Permission(enum.IntFlag):
    """What an EPT entry allows. Values are those of entry bits 2:0."""

    NONE = 0
    R = 1
    W = 2
    X = 4

    @classmethod
    def parse(cls, text: str) -> Permission:
        """From the three-letter form, "rw-" or "--x"; raises ``ValueError`` for anything else."""
        if len(text) != 3 or any(c not in (letter, "-") for c, letter in zip(text.lower(), "rwx", strict=True)):
            raise ValueError(text)
        return cls(sum(1 << i for i, c in enumerate(text) if c != "-"))

    def __str__(self) -> str:
        return "".join(letter if self & 1 << i else "-" for i, letter in enumerate("rwx"))


class MemoryType(enum.IntEnum):
    """EPT memory types, entry bits 5:3 (SDM vol. 3, 29.3.7.2). 2, 3 and 7 are reserved, and no members."""

    UC = 0
    WC = 1
    WT = 4
    WP = 5
    WB = 6


@frozen(slots=True)
class EptEntry:
    """One decoded entry of ``level`` 1 (PTE) to 4 (PML4E).

    Decoding judges nothing: what is reserved or ignored is said by ``vmm.ept.rules``. Fields that this kind of entry
    does not have are None in a decoded entry, and their bits are in ``rest`` with all others that have no field.
    """

    permissions: Permission
    #: Bits 5:3, 0 to 7, in an entry that maps a page (see :class:`MemoryType`).
    memory_type: int | None
    #: Host-physical address of the page or the next table, up to bit 51.
    address: int
    level: int = 1
    #: Whether it maps a page, of 4 KiB, 2 MiB or 1 GiB, rather than refers to a table.
    leaf: bool = True
    accessed: bool = False
    user_execute: bool = False
    dirty: bool | None = False
    ignore_pat: bool | None = False
    verify_guest_paging: bool | None = False
    paging_write: bool | None = False
    supervisor_shadow_stack: bool | None = False
    sub_page_write: bool | None = False
    suppress_ve: bool | None = False
    rest: int = 0

    @classmethod
    def decode(cls, raw: int, level: int = 1) -> EptEntry:
        """From the 64 bits of an entry of ``level`` 1 to 4."""
        leaf = maps_page(raw, level)
        address_mask = ADDRESS_MASK & page_mask(level) if leaf else ADDRESS_MASK
        return cls(
            permissions=Permission(raw & PERMISSION_MASK),
            memory_type=raw >> MEMORY_TYPE_SHIFT & 7 if leaf else None,
            address=raw & address_mask,
            level=level,
            leaf=leaf,
            accessed=bool(raw & ACCESSED),
            user_execute=bool(raw & USER_EXECUTE),
            dirty=bool(raw & DIRTY) if leaf else None,
            ignore_pat=bool(raw & IGNORE_PAT) if leaf else None,
            verify_guest_paging=bool(raw & VERIFY_GUEST_PAGING) if leaf else None,
            paging_write=bool(raw & PAGING_WRITE) if leaf else None,
            supervisor_shadow_stack=bool(raw & SUPERVISOR_SHADOW_STACK) if leaf else None,
            sub_page_write=bool(raw & SUB_PAGE_WRITE) if level == 1 else None,
            suppress_ve=bool(raw & SUPPRESS_VE) if leaf else None,
            rest=raw & ~(address_mask | _fields(level, leaf=leaf)),
        )

    def encode(self) -> int:
        """To the 64 bits."""
        raw = self.address | int(self.permissions) | self.rest
        for flag, bit in (
            (self.accessed, ACCESSED),
            (self.user_execute, USER_EXECUTE),
            (self.dirty, DIRTY),
            (self.ignore_pat, IGNORE_PAT),
            (self.verify_guest_paging, VERIFY_GUEST_PAGING),
            (self.paging_write, PAGING_WRITE),
            (self.supervisor_shadow_stack, SUPERVISOR_SHADOW_STACK),
            (self.sub_page_write, SUB_PAGE_WRITE),
            (self.suppress_ve, SUPPRESS_VE),
            (self.leaf and self.level > 1, LARGE),
        ):
            if flag:
                raw |= bit
        return raw | (self.memory_type or 0) << MEMORY_TYPE_SHIFT

    @property
    def name(self) -> str:
        """The manual's name of this kind of entry: "PTE", "PDE", "PDPTE" or "PML4E"."""
        return NAMES[self.level]

    @property
    def page_size(self) -> int | None:
        """Bytes that it maps; None if it refers to a table."""
        return -page_mask(self.level) if self.leaf else None

    @property
    def mapped(self) -> bool:
        """Whether the VMM has put anything there, even if it allows nothing at the moment."""
        return bool(self.address or self.memory_type or self.permissions)

    @property
    def present(self) -> bool:
        """Whether any of R, W, X is set (SDM vol. 3, 29.3.2); with mode-based execute control XU counts, too."""
        return bool(self.permissions)


def maps_page(raw: int, level: int) -> bool:
    """Whether an entry of ``level`` 1 to 4 maps a page: every PTE does, a PDE or PDPTE with bit 7 set."""
    return level == 1 or (level < 4 and bool(raw & LARGE))


def _fields(level: int, *, leaf: bool) -> int:
    """The bits of an entry that have a field of the record, without the address."""
    if not leaf:
        return PERMISSION_MASK | ACCESSED | USER_EXECUTE
    bits = PERMISSION_MASK | ACCESSED | USER_EXECUTE | DIRTY | IGNORE_PAT | 7 << MEMORY_TYPE_SHIFT
    bits |= VERIFY_GUEST_PAGING | PAGING_WRITE | SUPERVISOR_SHADOW_STACK | SUPPRESS_VE
    return bits | (SUB_PAGE_WRITE if level == 1 else LARGE)
