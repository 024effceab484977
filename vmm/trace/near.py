"""The records that came closest to a pattern without matching it, kept for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import frozen

if TYPE_CHECKING:
    from vmm.trace.syntax import Captures, Json, Pattern

#: How many are kept for each awaited record line and each watch.
NEAR_MISSES: Final = 3


@frozen
class NearMiss:
    """A record of the right kind that met ``held`` conditions, with its number and the captures then."""

    held: int
    number: int
    record: Json
    captures: Captures


class NearMisses:
    """The closest few, the closest first; the earlier first among equals."""

    def __init__(self) -> None:
        self.kept: list[NearMiss] = []

    def match(self, pattern: Pattern, record: Json, number: int, captures: Captures) -> bool:
        """Whether the record matches; it is remembered if it nearly does."""
        if not pattern.concerns(record):
            return False
        held = pattern.held(record, captures)
        if held == len(pattern.conditions):
            return True
        if len(self.kept) < NEAR_MISSES or self.kept[-1].held < held:
            self.kept = [*self.kept[: NEAR_MISSES - 1], NearMiss(held, number, record, dict(captures))]
            self.kept.sort(key=lambda miss: -miss.held)
        return False
