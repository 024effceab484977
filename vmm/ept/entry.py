"""EPT entries, bit by bit (SDM vol. 3, 28.3.2, tables 28-1 to 28-6).

======  ==================================================================
bits    meaning in an entry that maps a 4 KiB page
======  ==================================================================
0       R   data reads
1       W   data writes
2       X   instruction fetches
5:3     memory type (6 is write-back); must be zero in a non-leaf entry
6       ignore PAT memory type
7       1 in a leaf of 1 GiB or 2 MiB
51:12   host-physical page, or the next table
======  ==================================================================
"""

from __future__ import annotations

import enum
from typing import Final

from attrs import frozen

MEMORY_TYPE_SHIFT: Final = 3
WRITE_BACK: Final = 6
ADDRESS_MASK: Final = 0x000F_FFFF_FFFF_F000
PERMISSION_MASK: Final = 7


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


@frozen(slots=True)
class EptEntry:
    """One decoded entry."""

    permissions: Permission
    memory_type: int
    address: int

    @classmethod
    def decode(cls, raw: int) -> EptEntry:
        """From the 64 bits of an entry that maps a 4 KiB page."""
        return cls(Permission(raw & PERMISSION_MASK), raw >> MEMORY_TYPE_SHIFT & 7, raw & ADDRESS_MASK)

    def encode(self) -> int:
        """To the 64 bits."""
        return self.address | self.memory_type << MEMORY_TYPE_SHIFT | int(self.permissions)

    @property
    def mapped(self) -> bool:
        """Whether it leads to a host page, even if it allows nothing at the moment."""
        return bool(self.address or self.memory_type)

    @property
    def present(self) -> bool:
        """Whether any of R, W, X is set (SDM vol. 3, 28.3.2)."""
        return bool(self.permissions)

    @property
    def misconfigured(self) -> bool:
        """Whether the processor would report a misconfiguration: W without R, or a reserved memory type."""
        bad_type = self.memory_type in (2, 3, 7)
        return self.present and (bool(self.permissions & 3 == Permission.W) or bad_type)
