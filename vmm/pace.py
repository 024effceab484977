"""How far a vCPU has come, in instructions, so that its turns end at exact places.

Blocks are counted when they are entered, by what they hold, and put right when the engine stops in one. Where the
next block would go beyond the end of the turn the engine is stopped before it (quirk "block-stop"), and the rest of
the turn is stepped. So a turn ends at the same instruction however the guest is run: freely, with whatever capacity
of the block cache, or stepped from end to end.

A string instruction counts once, when its last iteration is done. What the VMM does in a guest's place (the delivery
of an event, SYSCALL, VMCALL) counts as one instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final

from vmm.decode import lengths
from vmm.translation import Block, Span

#: Widths of code segments by the last word of a CPU mode's name.
_WIDTHS: Final = {"long": 64, "32": 32, "16": 16, "real": 16, "8086": 16}


class Pace:
    """Counts the instructions that a vCPU completes. ``stop`` stops its engine before the block being entered.

    ``completed`` is told of each block by how many of its instructions were executed.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        #: Instructions completed since the start.
        self.retired = 0
        #: Whether what is left of the turn has to be stepped.
        self.in_tail = False
        #: Whether instructions are counted at all.
        self.counts = False
        self.completed: Callable[[Block, int], None] | None = None
        self._stop = stop
        self._end: int | None = None
        self._block: Block | None = None

    def begin(self, instructions: int) -> None:
        """A turn of so many instructions, 1 or more."""
        self._end = self.retired + instructions
        self.in_tail = False

    @property
    def is_over(self) -> bool:
        """Whether the turn is."""
        return self._end is not None and self.retired >= self._end

    def spend(self) -> None:
        """Count what the VMM does in the guest's place."""
        self.retired += 1

    def complete(self, successor: int) -> None:
        """The block that was entered last is complete; the engine goes on at a linear address, perhaps inside of it."""
        block, self._block = self._block, None
        if block is None:
            return
        instructions = _instructions(block)
        length, repeats = instructions[-1]
        goes_on = repeats and successor == block.gva + block.size - length
        self._retire(block, len(instructions) - goes_on)

    def enter(self, block: Block) -> None:
        """The engine is about to execute a block; the one before it is complete."""
        self.complete(block.gva)
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
                self._retire(block, done)
                return
            at += length
        self._retire(block, len(_instructions(block)))

    def step(self, *, moved: bool, repeats: bool, complete: bool) -> None:
        """One instruction was stepped: whether RIP ``moved``, it is a string one, nothing kept it from completing."""
        if moved or (complete and not repeats):
            self.retired += 1

    def _retire(self, block: Block, count: int) -> None:
        self.retired += count
        if self.completed is not None:
            self.completed(block, count)


def places(block: Block, count: int) -> Iterator[tuple[int, tuple[Span, ...]]]:
    """(linear address, where it was fetched from) of the first ``count`` instructions of a block."""
    at = 0
    for length, _ in _instructions(block)[:count]:
        yield block.gva + at, block.cut(at, length)
        at += length


def _instructions(block: Block) -> tuple[tuple[int, bool], ...]:
    return _decoded(block.code, width(block.mode))


def width(mode: str) -> int:
    """The width of a code segment in a CPU mode: 16, 32 or 64."""
    return _WIDTHS[mode.rpartition("-")[2]]


@lru_cache(maxsize=16384)
def _decoded(code: bytes, bits: int) -> tuple[tuple[int, bool], ...]:
    return lengths(code, bits)
