"""One translated block, and the counters that account for all of them."""

from __future__ import annotations

import hashlib

from attrs import define, field

from vmm.memory import PAGE

#: A run of bytes in host memory: (address, size). A block has one, or two if it straddles frames.
Span = tuple[int, int]

#: What makes two translations the same: linear address, host address of the first byte, CPU mode digest.
Key = tuple[int, int, int]


@define(slots=True, eq=False)
class Block:
    """A block that the engine holds a translation of.

    ``number`` is the count of blocks created when it was made, starting at 1: the identity that traces show.
    ``code`` are the bytes that were translated.
    """

    number: int
    gva: int
    spans: tuple[Span, ...]
    mode_flags: int
    mode: str
    code: bytes
    #: Linear addresses of blocks seen to follow this one; filled by the auditor.
    successors: set[int] = field(factory=set)

    @property
    def key(self) -> Key:
        """What makes two translations the same."""
        return self.gva, self.spans[0][0], self.mode_flags

    @property
    def hpa(self) -> int:
        """Host address of the first byte."""
        return self.spans[0][0]

    @property
    def size(self) -> int:
        """Bytes of guest code."""
        return len(self.code)

    @property
    def digest(self) -> str:
        """SHA-256 of the translated bytes, hexadecimal."""
        return hashlib.sha256(self.code).hexdigest()

    @property
    def frames(self) -> tuple[int, ...]:
        """Host addresses of the frames that it lies in."""
        return tuple(address & -PAGE for address, _ in self.spans)

    def overlaps(self, address: int, size: int) -> bool:
        """Whether any byte of it lies in [address, address + size)."""
        return any(start < address + size and address < start + length for start, length in self.spans)


@define(slots=True)
class Counters:
    """created = live + invalidated + evicted, always."""

    created: int = 0
    invalidated: int = 0
    evicted: int = 0
