"""The exit qualification of an EPT violation (SDM vol. 3, table 28-7).

======  ==================================================================================================
bit     meaning
======  ==================================================================================================
0       the access was a data read
1       the access was a data write; a read-modify-write, and with EPT accessed and dirty flags each access
        to a guest paging structure, sets 0 and 1
2       the access was an instruction fetch
5:3     the AND of R, W, X of the EPT entries used; 0 if one is not present
6       with mode-based execute control: the AND of XU; else 0
7       the guest-linear address is valid
8       the access was to the translation of the linear address, not to a paging structure (needs bit 7)
9       the linear address is a user-mode one                   ) advanced information, where the processor
10      the guest's paging translates it to a read/write page   ) has it, for bits 7 and 8 set; else 0
11      ... and to an execute-disable page                      )
12      NMI unblocking due to IRET
13      the access was to a shadow stack
14      the page's supervisor shadow-stack bit, with EPTP bit 7
15      caused by guest-paging verification
16      the access was asynchronous to instruction execution
======  ==================================================================================================
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from attrs import frozen

from vmm.ept.entry import Permission

_ALLOWED: Final = 3
#: Bits 9 to 11 of a violation of the final access, as the MMU keeps them (``advanced``).
ADVANCED: Final = 7 << 9

_BITS: Final = {
    "read": 0,
    "write": 1,
    "fetch": 2,
    "user_executable": 6,
    "linear_valid": 7,
    "final": 8,
    "user_mode": 9,
    "read_write_page": 10,
    "execute_disable_page": 11,
    "nmi_unblocking": 12,
    "shadow_stack": 13,
    "supervisor_shadow_stack": 14,
    "guest_paging_verification": 15,
    "asynchronous": 16,
}
_NEED_LINEAR: Final = {"final", "user_mode", "read_write_page", "execute_disable_page"}
_NEED_FINAL: Final = _NEED_LINEAR - {"final"}


@frozen(slots=True)
class Qualification:
    """One decoded qualification; ``encode`` gives the 64-bit field."""

    read: bool = False
    write: bool = False
    fetch: bool = False
    allowed: Permission = Permission.NONE
    linear_valid: bool = True
    final: bool = True
    user_executable: bool = False
    user_mode: bool = False
    read_write_page: bool = False
    execute_disable_page: bool = False
    nmi_unblocking: bool = False
    shadow_stack: bool = False
    supervisor_shadow_stack: bool = False
    guest_paging_verification: bool = False
    asynchronous: bool = False

    def encode(self) -> int:
        """To the exit-qualification field; bits that have no meaning without others are clear without them."""
        without = set() if self.linear_valid else _NEED_LINEAR
        if not self.final:
            without = without | _NEED_FINAL
        flags = sum(1 << bit for name, bit in _BITS.items() if getattr(self, name) and name not in without)
        return flags | int(self.allowed) << _ALLOWED

    @classmethod
    def decode(cls, raw: int) -> Qualification:
        """From the exit-qualification field; bits from 17 on are not defined, and ignored."""
        flags = {name: bool(raw >> bit & 1) for name, bit in _BITS.items()}
        return cls(**flags, allowed=Permission(raw >> _ALLOWED & 7))

    def __str__(self) -> str:
        kinds = [name for name in ("read", "write", "fetch") if getattr(self, name)]
        where = "" if self.final else " of a paging structure"
        user = "u" if self.user_executable else ""
        return f"{'+'.join(kinds) or 'no access'}{where} where the EPT allows {self.allowed}{user}"


@lru_cache(maxsize=512)
def encode(*, read: bool, write: bool, fetch: bool, allowed: int, final: bool, advanced: int) -> int:
    """The exit-qualification field of an access with a linear address; remembered, since exits are many.

    ``allowed`` is what all entries allow as in an entry, bits 2:0 and 10; ``advanced`` are bits 9 to 11 of the field.
    """
    of_linear = Qualification(read, write, fetch, Permission(allowed & 7), final=final)
    return of_linear.encode() | (advanced & ADVANCED if final else 0) | (allowed >> 10 & 1) << 6


def advanced(*, user: bool, read_write: bool, execute_disable: bool) -> int:
    """Bits 9 to 11 of the field from what the guest's paging says of a linear address."""
    return user << 9 | read_write << 10 | execute_disable << 11
