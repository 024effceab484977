"""The exit qualification of an EPT violation (SDM vol. 3, table 28-7).

======  ==================================================================
bit     meaning
======  ==================================================================
0       the access was a data read
1       the access was a data write
2       the access was an instruction fetch
3       the entry allowed reads
4       the entry allowed writes
5       the entry allowed fetches
7       the guest-linear address is valid
8       the access was to the final translation, not to a paging structure
======  ==================================================================
"""

from __future__ import annotations

from functools import lru_cache

from attrs import frozen

from vmm.ept.entry import Permission


@frozen(slots=True)
class Qualification:
    """One decoded qualification; ``encode`` gives the 64-bit field."""

    read: bool = False
    write: bool = False
    fetch: bool = False
    allowed: Permission = Permission.NONE
    linear_valid: bool = True
    final: bool = True

    def encode(self) -> int:
        """To the exit-qualification field."""
        return (
            self.read
            | self.write << 1
            | self.fetch << 2
            | int(self.allowed) << 3
            | self.linear_valid << 7
            | (self.final and self.linear_valid) << 8
        )

    @classmethod
    def decode(cls, raw: int) -> Qualification:
        """From the exit-qualification field."""
        return cls(
            read=bool(raw & 1),
            write=bool(raw & 2),
            fetch=bool(raw & 4),
            allowed=Permission(raw >> 3 & 7),
            linear_valid=bool(raw & 1 << 7),
            final=bool(raw & 1 << 8),
        )

    def __str__(self) -> str:
        kinds = [name for name in ("read", "write", "fetch") if getattr(self, name)]
        where = "" if self.final else " of a paging structure"
        return f"{'+'.join(kinds) or 'no access'}{where} where the EPT allows {self.allowed}"


@lru_cache(maxsize=128)
def encode(*, read: bool, write: bool, fetch: bool, allowed: int, final: bool) -> int:
    """The exit-qualification field of an access with a linear address; remembered, since exits are many."""
    return Qualification(read, write, fetch, Permission(allowed), final=final).encode()
