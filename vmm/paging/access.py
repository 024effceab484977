"""The words of a page walk: an access, its translation, its fault, and the memory that holds the tables."""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol

from vmm.errors import GuestError


class Access(enum.IntEnum):
    """What an instruction does to a linear address. Read-modify-write is ``WRITE``."""

    READ = 0
    WRITE = 1
    FETCH = 2


class ErrorCode(enum.IntFlag):
    """The bits of a page fault's error code, SDM vol. 3, figure 4-12.

    ====  ==================================================================================
    bit   set if
    ====  ==================================================================================
    0 P   every entry was present: a right is missing, or a reserved bit is set
    1 W   the access was a write (the access, not what the entry says)
    2 U   the access was a user-mode one
    3 R   a reserved bit is set in an entry that is present (so bit 0 is set too)
    4 I   the access was a fetch, and SMEP or (with PAE) NXE is on
    ====  ==================================================================================
    """

    PRESENT = 1 << 0
    WRITE = 1 << 1
    USER = 1 << 2
    RESERVED = 1 << 3
    FETCH = 1 << 4


class PageFault(Exception):  # noqa: N818 - the manual's name; the guest's exception, not an error of the VMM
    """#PF: ``address`` is what CR2 gets (64 bits), ``error_code`` what is pushed (see :class:`ErrorCode`)."""

    def __init__(self, address: int, error_code: int) -> None:
        super().__init__(address, error_code)
        self.address = address
        self.error_code = error_code

    def __str__(self) -> str:
        return f"#PF at {self.address:#x}, error code {self.error_code:#x}"


class EntryChanged(GuestError):  # noqa: N818 - says what happened; the walk answers it by starting over
    """A page-table entry no longer holds what the walk read (:meth:`PhysicalMemory.compare_and_store`).

    It leaves ``walk`` only if an entry never holds still (a guest that keeps its page tables in a timer).
    """


class Translation(NamedTuple):
    """Where a linear address leads, and what may be cached about it for one privilege level.

    The three rights hold for every later access of the same privilege level (the ``user`` argument of the
    walk) to the same 4 KiB, until the guest invalidates the translation or changes CR0, CR3, CR4 or EFER. A
    right that is missing needs another walk; it is not proof of a fault.
    """

    #: GPA of the 4 KiB page that holds the address, also inside a larger page.
    gpa: int
    readable: bool
    #: Only if the leaf's dirty flag is set, so that no first write passes unseen.
    writable: bool
    executable: bool
    #: Size in bytes of the page that the guest's tables map here: 4 KiB, 2 MiB, 4 MiB or 1 GiB.
    page_size: int
    #: A user-mode address: U/S is set in every entry.
    user: bool
    #: G is set in the leaf and CR4.PGE is on.
    global_: bool
    #: XD is set in some entry.
    nx: bool
    #: ``readable`` and ``writable`` are owed to RFLAGS.AC (SMAP, supervisor, user page): good for this
    #: access, but not to be cached beyond a change of AC, nor for implicit accesses.
    ac_dependent: bool
    #: R/W is set in every entry, whatever that means for who asks.
    read_write: bool


class PhysicalMemory(Protocol):
    """How a walk reaches the guest's page tables. ``size`` is 4 or 8 bytes, ``gpa`` a multiple of it.

    Both methods may raise whatever stands for a guest-physical fault (an EPT violation): it leaves the walk.
    """

    def load(self, gpa: int, size: int) -> int:
        """Return the little-endian entry at ``gpa``."""

    def compare_and_store(self, gpa: int, size: int, old: int, new: int) -> None:
        """Store ``new`` at ``gpa`` in one indivisible step, if ``old`` is still there.

        Raises :class:`EntryChanged`, and stores nothing, if it is not.
        """


def is_canonical(gva: int, la57: bool) -> bool:  # noqa: FBT001 - the name of the control bit
    """Whether ``gva`` (0 to 2**64-1) is canonical: bits 63:47, or 63:56 with CR4.LA57, are all alike.

    SDM vol. 1, section 3.3.7.1.
    """
    sign = 56 if la57 else 47
    return gva >> sign in (0, (1 << (64 - sign)) - 1)
