"""Pushes to a stack in a segment with a limit, in real, virtual-8086 and protected mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from vmm.cpu.entry import AR_D, Write, wrapped_writes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vmm.cpu.state import Segment

_EXPAND_DOWN = 4


def within_limit(segment: Segment, offset: int, size: int) -> bool:
    """Whether ``size`` bytes at ``offset`` lie in a data segment (SDM vol. 3, 5.3)."""
    last = offset + size - 1
    if segment.access_rights & _EXPAND_DOWN:
        return offset > segment.limit and last <= _offset_mask(segment)
    return last <= segment.limit


def _offset_mask(stack: Segment) -> int:
    """Find the bits of ESP that the stack uses: SS.B decides."""
    return 0xFFFF_FFFF if stack.access_rights & AR_D else 0xFFFF


@frozen(slots=True)
class Stack:
    """SS:ESP before the pushes; ``pointer`` is all of ESP, also where only SP is used."""

    segment: Segment
    pointer: int
    user: bool

    def push(self, values: Sequence[int], size: int) -> tuple[tuple[Write, ...], int] | None:
        """Plan the writes that push ``values`` in this order in slots of ``size`` bytes, and ESP after them.

        None if the stack has no room for all of them. ESP bits that the stack does not use stay as they are.
        """
        mask = _offset_mask(self.segment)
        slots = []
        offset = self.pointer & mask
        for value in values:
            offset = offset - size & mask
            if not within_limit(self.segment, offset, size):
                return None
            slots.append((offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little")))
        return tuple(self._writes(slots)), self.pointer & ~mask | offset

    def _writes(self, slots: list[tuple[int, bytes]]) -> Iterable[Write]:
        """One write for each run of slots without a wrap of the stack pointer, lowest slot last pushed."""
        while slots:
            start, data = slots.pop()
            while slots and slots[-1][0] == start + len(data):
                data += slots.pop()[1]
            yield from wrapped_writes(self.segment.base + start, data, 32, user=self.user)
