"""Finds where a run repeats itself, so that a loop of a thousand traps takes a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, TypeVar

from attrs import define, field

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")

#: The longest cycle that is recognised, in entries, and how often it is shown before it is folded.
LONGEST_CYCLE: Final = 8
SHOWN_CYCLES: Final = 3


@define(slots=True)
class Folder(Generic[T]):
    """Hands entries on to ``show``, and what repeats them to ``skipped`` as (count of entries, last one).

    Two entries are alike if their shapes are equal. Once ``SHOWN_CYCLES`` equal cycles were shown, further
    whole cycles are held back.
    """

    show: Callable[[T], None]
    skipped: Callable[[int, T], None]
    _shapes: list[Hashable] = field(factory=list)
    #: The cycle that is being held back; empty if none is.
    _cycle: list[Hashable] = field(factory=list)
    #: Entries of a cycle that has begun and is not whole yet.
    _begun: list[T] = field(factory=list)
    _count: int = 0
    _last: T | None = None

    def add(self, entry: T, shape: Hashable) -> None:
        """Take the next entry."""
        if self._cycle and not self._continues(entry, shape):
            self.flush()
        if not self._cycle:
            self.show(entry)
            self._shapes.append(shape)
            del self._shapes[: -LONGEST_CYCLE * SHOWN_CYCLES]
            self._cycle = self._found()

    def flush(self) -> None:
        """Hand on what is held back."""
        if self._count and self._last is not None:
            self.skipped(self._count, self._last)
        for entry in self._begun:
            self.show(entry)
        self._shapes = self._cycle[: len(self._begun)]
        self._cycle, self._begun, self._count, self._last = [], [], 0, None

    def _continues(self, entry: T, shape: Hashable) -> bool:
        if shape != self._cycle[len(self._begun)]:
            return False
        self._begun.append(entry)
        if len(self._begun) == len(self._cycle):
            self._count += len(self._cycle)
            self._last = entry
            self._begun.clear()
        return True

    def _found(self) -> list[Hashable]:
        """The shortest cycle that the last entries consist of."""
        shapes = self._shapes
        for length in range(1, len(shapes) // SHOWN_CYCLES + 1):
            cycle = shapes[-length:]
            if shapes[-length * SHOWN_CYCLES :] == cycle * SHOWN_CYCLES:
                return cycle
        return []
