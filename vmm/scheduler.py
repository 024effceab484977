"""Which vCPU is next, and for how long: a function of the seed alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

#: The longest of the turns that half of all are: where most interleavings of a few instructions show.
_SHORT = 8


class Scheduler:
    """Draws turns. The same seed and the same sequence of ready vCPUs give the same turns on every machine.

    ``quantum`` is the length of the longest turn, in instructions, 1 or more.
    """

    def __init__(self, seed: int, quantum: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - it has to be repeatable, not secret
        self._quantum = quantum

    def draw(self, ready: Sequence[int]) -> tuple[int, int]:
        """One of ``ready`` (not empty), and the number of instructions of its turn."""
        who = ready[self._below(len(ready))]
        longest = min(_SHORT, self._quantum) if self._below(2) else self._quantum
        return who, 1 + self._below(longest)

    def _below(self, limit: int) -> int:
        # random() is the one method whose sequence Python promises to keep.
        return int(self._random.random() * limit)
