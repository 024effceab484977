"""One translated block, and the counters that account for all of them."""

from __future__ import annotations

import hashlib
from typing import Final

from attrs import define, field

GRANULE_SHIFT: Final = 7

#: A run of bytes in host memory: (address, size). A block has one, or two if it straddles frames.
Span = tuple[int, int]

#: What makes two translations the same: vCPU, linear address, host address of the first byte, CPU mode digest.
Key = tuple[int, int, int, int]


@define(slots=True, eq=False)
class Block:
    """A block that the engine holds a translation of.

    ``number`` is the count of blocks created when it was made, starting at 1: the identity that traces show.
    ``code`` are the bytes that were translated, ``vcpu`` is whose engine holds the translation.
    """

    number: int
    gva: int
    spans: tuple[Span, ...]
    mode_flags: int
    mode: str
    code: bytes
    vcpu: int = 0
    #: Linear addresses of blocks seen to follow this one; None without an auditor, which tells.
    successors: set[int] | None = None
    #: What makes two translations the same.
    key: Key = field(init=False)
    #: The granules of host memory that it touches (see ``BlockCache``).
    granules: tuple[int, ...] = field(init=False)

    def __attrs_post_init__(self) -> None:
        address, size = self.spans[0]
        self.key = (self.vcpu, self.gva, address, self.mode_flags)
        self.granules = granules_of(address, size)
        for address, size in self.spans[1:]:
            self.granules += granules_of(address, size)

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

    def cut(self, offset: int, size: int) -> tuple[Span, ...]:
        """Where ``size`` bytes of it lie, from the byte at ``offset`` on."""
        found = []
        for start, length in self.spans:
            first, last = max(offset, 0), min(offset + size, length)
            if first < last:
                found.append((start + first, last - first))
            offset -= length
        return tuple(found)

    def overlaps(self, address: int, size: int) -> bool:
        """Whether any byte of it lies in [address, address + size)."""
        for start, length in self.spans:  # noqa: SIM110 - on the way of every trapped write; any() costs twice that
            if start < address + size and address < start + length:
                return True
        return False


def granules_of(address: int, size: int) -> tuple[int, ...]:
    """The granules of 128 bytes that [address, address + size) touches."""
    first, last = address >> GRANULE_SHIFT, address + size - 1 >> GRANULE_SHIFT
    return (first,) if first == last else tuple(range(first, last + 1))


@define(slots=True)
class Counters:
    """created = live + invalidated + evicted, always."""

    created: int = 0
    invalidated: int = 0
    evicted: int = 0
