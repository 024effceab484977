"""Where the fields of an EPT entry are, as plain integers (SDM vol. 3, 29.3.2; the picture is in ``entry.py``)."""

from __future__ import annotations

from typing import Final

READ: Final = 1 << 0
WRITE: Final = 1 << 1
EXECUTE: Final = 1 << 2
PERMISSION_MASK: Final = READ | WRITE | EXECUTE
MEMORY_TYPE_SHIFT: Final = 3
IGNORE_PAT: Final = 1 << 6
LARGE: Final = 1 << 7
ACCESSED: Final = 1 << 8
DIRTY: Final = 1 << 9
USER_EXECUTE: Final = 1 << 10
ADDRESS_MASK: Final = 0x000F_FFFF_FFFF_F000
VERIFY_GUEST_PAGING: Final = 1 << 57
PAGING_WRITE: Final = 1 << 58
SUPERVISOR_SHADOW_STACK: Final = 1 << 60
SUB_PAGE_WRITE: Final = 1 << 61
SUPPRESS_VE: Final = 1 << 63

#: Memory type of what the VMM maps.
WRITE_BACK: Final = 6

#: Tables on the way to a 4 KiB page, entries in one, and the end of what four of them translate.
LEVELS: Final = 4
ENTRIES: Final = 512
GPA_LIMIT: Final = 1 << 48


def shift_of(level: int) -> int:
    """The lowest GPA bit that selects an entry of ``level`` 1 to 4: 12, 21, 30, 39."""
    return 3 + 9 * level


def page_mask(level: int) -> int:
    """All bits of an address but the offset in what an entry of ``level`` covers (a negative number)."""
    return -1 << shift_of(level)
