"""What a modification did to the code: the instructions before and after.

To read instructions one must know where one begins. The block that died of the modification tells, or the last
one that died around there, or a symbol of the image; where nothing tells, or the symbol is one of data, the bytes
must do.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.decode import MAX_LENGTH, decode, disassemble
from vmm.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.machine import Machine
    from vmm.records import Modification
    from vmm.trace.names import Names
    from vmm.translation import Block

_INT3: Final = 0xCC
#: Instructions shown of each side.
_SHOWN: Final = 4
#: Bytes of a modification that are disassembled.
_LONGEST: Final = 64
#: How far below the patch a symbol may be for its code to be read from there.
_NEAR: Final = 256
#: Frames whose last dead block is remembered, and blocks whose modification is still to come.
_REMEMBERED: Final = 1024


@frozen(slots=True)
class Patch:
    """Code around a modification, in the order in which it is executed.

    ``old`` and ``new`` begin with an instruction, at linear address ``start``. The modified bytes are those from
    ``first`` to ``last`` (exclusive), counted from there. ``bits`` is the size of the code segment.
    """

    start: int
    old: bytes
    new: bytes
    first: int
    last: int
    bits: int

    def difference(self) -> tuple[list[str], list[str]]:
        """The instructions before and after; those that both have alike are left out."""
        old, new = list(self._touched(self.old)), list(self._touched(self.new))
        if len(old) == len(new):
            pairs = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
            old, new = [a for a, _ in pairs], [b for _, b in pairs]
        return _short(old), _short(new)

    def _touched(self, code: bytes) -> Iterator[str]:
        """The instructions with a modified byte."""
        at = 0
        while at < min(self.last, len(code)):
            rest = code[at : at + MAX_LENGTH]
            length = decode(rest, self.bits).length
            if not length and len(rest) < MAX_LENGTH:
                return  # it goes on in another frame
            length = length or 1
            if code[at] == _INT3 and at + length == self.first:
                return  # nobody knows whether an instruction begins behind it
            if at + length > self.first:
                yield disassemble(rest, self.start + at, self.bits, limit=1)[0]
            at += length


class PatchReader:
    """Reads the patches of a machine's run. It must hear of every block that dies."""

    def __init__(self, machine: Machine, names: Names) -> None:
        self._machine = machine
        self._names = names
        #: Dead blocks by number until the modification that killed them is reported.
        self._dead: dict[int, Block] = {}
        #: The last block that died in a frame, by host address.
        self._last: dict[int, Block] = {}

    def died(self, block: Block) -> None:
        """A block was invalidated."""
        self._dead[block.number] = block
        _bound(self._dead)
        for hpa, _ in block.spans:
            self._last.pop(hpa & -PAGE, None)
            self._last[hpa & -PAGE] = block
        _bound(self._last)

    def casualties(self, record: Modification) -> list[Block]:
        """The blocks that died of a modification, as far as they are known; asked once a modification."""
        return [self._dead.pop(number) for number in record.blocks if number in self._dead]

    def read(self, record: Modification) -> Patch | None:
        """The patch, while memory still holds it; None if nobody knows where an instruction begins, or it is data."""
        hpa = (self._machine.ept.host_page(record.gpa) or 0) | record.gpa % PAGE
        block = self._last.get(hpa & -PAGE)
        if block is not None:
            spans = _widened(block)
            first = _offset(spans, hpa)
            if first is not None and first < block.size:
                return self._patch(record, block.gva, spans, first)
        symbol = self._names.near(record.gpa, _NEAR)
        if symbol is None or symbol < record.gpa & -PAGE or self._names.is_data(record.gpa):
            return None
        first = record.gpa - symbol
        room = min(first + len(record.new) + MAX_LENGTH, PAGE - symbol % PAGE)
        return self._patch(record, self._names.linked(symbol), [(hpa - first, room)], first)

    def _patch(self, record: Modification, start: int, spans: list[tuple[int, int]], first: int) -> Patch:
        new = b"".join(self._machine.memory.read(hpa, size) for hpa, size in spans)
        size = min(len(record.new), _LONGEST, len(new) - first)
        old = new[:first] + record.old[:size] + new[first + size :]
        return Patch(start, old, new, first, first + size, self._bits())

    def _bits(self) -> int:
        mode = self._machine.vcpus[self._machine.reporter.vcpu or 0].context.mode
        return 64 if mode == "long" else 32 if mode.endswith("32") else 16


def _widened(block: Block) -> list[tuple[int, int]]:
    """The bytes of a block and, in its last frame, those after it: new instructions may be longer."""
    *before, (hpa, size) = block.spans
    return [*before, (hpa, min(size + _LONGEST, PAGE - hpa % PAGE))]


def _offset(spans: list[tuple[int, int]], hpa: int) -> int | None:
    """How many bytes of ``spans`` come before the one at ``hpa``."""
    done = 0
    for start, size in spans:
        if start <= hpa < start + size:
            return done + hpa - start
        done += size
    return None


def _bound(remembered: dict[int, Block]) -> None:
    if len(remembered) > _REMEMBERED:
        del remembered[next(iter(remembered))]


def _short(instructions: list[str]) -> list[str]:
    """Runs of the same instruction as one line, and not too many lines."""
    runs = [(text, sum(1 for _ in same)) for text, same in groupby(instructions)]
    lines = [text if count == 1 else f"{text} x {count}" for text, count in runs]
    more = len(lines) - _SHOWN
    return lines if more <= 0 else [*lines[:_SHOWN], f"... {more} more"]
