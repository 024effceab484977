"""Finds where a run repeats itself, so that a loop of a thousand traps takes a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from attrs import define, field, frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

#: How often a cycle is shown before it is folded.
SHOWN_CYCLES: Final = 3
#: The longest cycles that are recognised: of records, and of what the folding of those leaves.
INNER_CYCLE: Final = 8
OUTER_CYCLE: Final = 24


class Item(Protocol):
    """Records ``first`` to ``seq`` of a run. Two items are alike if their shapes are equal."""

    @property
    def first(self) -> int:
        """The number of its first record."""

    @property
    def seq(self) -> int:
        """The number of its last record."""

    @property
    def shape(self) -> Hashable:
        """What items of a loop have in common."""


@frozen(slots=True)
class Skipped:
    """Records that are like the ones before them. ``cycle`` are the shapes that they repeat."""

    first: int
    seq: int
    cycle: tuple[Hashable, ...]

    @property
    def shape(self) -> Hashable:
        """How often a loop goes round does not matter to the loop around it."""
        return Skipped, self.cycle


@define(slots=True)
class Folder:
    """Hands items on to ``show``, and a ``Skipped`` for those that repeat the items before them.

    Once ``SHOWN_CYCLES`` equal cycles of at most ``longest`` items were shown, further whole cycles are held
    back until something else comes.
    """

    show: Callable[[Item], None]
    longest: int
    _shapes: list[Hashable] = field(factory=list)
    #: The cycle that is being held back; empty if none is.
    _cycle: list[Hashable] = field(factory=list)
    #: Items of a cycle that has begun and is not whole yet.
    _begun: list[Item] = field(factory=list)
    _skipped: Skipped | None = None

    def add(self, item: Item) -> None:
        """Take the next item."""
        if self._cycle and not self._continues(item):
            self.flush()
        if not self._cycle:
            self.show(item)
            self._shapes.append(item.shape)
            del self._shapes[: -self.longest * SHOWN_CYCLES]
            self._cycle = self._found()

    def flush(self) -> None:
        """Hand on what is held back."""
        if self._skipped is not None:
            self.show(self._skipped)
            self._shapes.clear()
        for item in self._begun:
            self.show(item)
            self._shapes.append(item.shape)
        self._cycle, self._begun, self._skipped = [], [], None

    def _continues(self, item: Item) -> bool:
        if item.shape != self._cycle[len(self._begun)]:
            return False
        self._begun.append(item)
        if len(self._begun) == len(self._cycle):
            first = (self._skipped or self._begun[0]).first
            self._skipped = Skipped(first, item.seq, tuple(self._cycle))
            self._begun.clear()
        return True

    def _found(self) -> list[Hashable]:
        """The shortest cycle that the last items consist of."""
        shapes = self._shapes
        for length in range(1, len(shapes) // SHOWN_CYCLES + 1):
            cycle = shapes[-length:]
            if shapes[-length * SHOWN_CYCLES :] == cycle * SHOWN_CYCLES:
                return cycle
        return []


@define(slots=True)
class NestedFolder:
    """Folds loops, and loops of loops."""

    show: Callable[[Item], None]
    _inner: Folder = field(init=False)
    _outer: Folder = field(init=False)

    def __attrs_post_init__(self) -> None:
        """Put the two behind each other."""
        self._outer = Folder(self.show, OUTER_CYCLE)
        self._inner = Folder(self._outer.add, INNER_CYCLE)

    def add(self, item: Item) -> None:
        """Take the next item."""
        self._inner.add(item)

    def flush(self) -> None:
        """Hand on what is held back."""
        self._inner.flush()
        self._outer.flush()
