"""How far a vCPU has come, in instructions, so that its turns end at exact places.

Blocks are counted when they are entered, by what they hold, and put right when the engine stops in one. Where the
next block would go beyond the end of the turn the engine is stopped before it (quirk "block-stop"), and the rest of
the turn is stepped. So a turn ends at the same instruction however the guest is run: freely, with whatever capacity
of the block cache, or stepped from end to end.

A string instruction counts once, when its last iteration is done. What the VMM does in a guest's place (the delivery
of an event, SYSCALL, VMCALL) counts as one instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

from vmm.decode import lengths
from vmm.translation import Block

#: Widths of code segments by the last word of a CPU mode's name.
_WIDTHS: Final = {"long": 64, "32": 32, "16": 16, "real": 16, "8086": 16}


class Pace:
    """Counts the instructions that a vCPU completes. ``stop`` stops its engine before the block being entered."""

    def __init__(self, stop: Callable[[], None]) -> None:
        #: Instructions completed since the start.
        self.retired = 0
        #: Whether what is left of the turn has to be stepped.
        self.in_tail = False
        self._stop = stop
        self._end: int | None = None
        self._block: Block | None = None

    def begin(self, instructions: int) -> None:
        """A turn of so many instructions, 1 or more."""
        self._end = self.retired + instructions
        self.in_tail = False

    @property
    def counts(self) -> bool:
        """Whether instructions are counted at all."""
        return self._end is not None

    @property
    def is_over(self) -> bool:
        """Whether the turn is."""
        return self._end is not None and self.retired >= self._end

    def spend(self) -> None:
        """Count what the VMM does in the guest's place."""
        self.retired += 1

    def enter(self, block: Block) -> None:
        """The engine is about to execute a block; the one before it is complete."""
        self._complete(block.gva)
        if self._end is not None and self.retired + len(_instructions(block)) > self._end:
            self.in_tail = True
            self._stop()
        else:
            self._block = block

    def leave(self, pc: int) -> None:
        """The engine has stopped at a linear address: in the middle of the block, or behind it."""
        block, self._block = self._block, None
        if block is None:
            return
        at = block.gva
        for done, (length, _) in enumerate(_instructions(block)):
            if at == pc:
                self.retired += done
                return
            at += length
        self.retired += len(_instructions(block))

    def step(self, *, moved: bool, repeats: bool, complete: bool) -> None:
        """One instruction was stepped: whether RIP ``moved``, it is a string one, nothing kept it from completing."""
        if moved or (complete and not repeats):
            self.retired += 1

    def _complete(self, successor: int) -> None:
        block, self._block = self._block, None
        if block is None:
            return
        instructions = _instructions(block)
        length, repeats = instructions[-1]
        goes_on = repeats and successor == block.gva + block.size - length
        self.retired += len(instructions) - goes_on


def _instructions(block: Block) -> tuple[tuple[int, bool], ...]:
    return _decoded(block.code, _WIDTHS[block.mode.rpartition("-")[2]])


@lru_cache(maxsize=16384)
def _decoded(code: bytes, bits: int) -> tuple[tuple[int, bool], ...]:
    return lengths(code, bits)
