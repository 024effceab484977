"""What a modification did to the code: the instructions before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.decode import MAX_LENGTH, decode, disassemble
from vmm.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.exits import Modification
    from vmm.translation import Block

#: Instructions shown of each side.
_SHOWN: Final = 4
#: Bytes of a modification that are disassembled.
_LONGEST: Final = 64


@frozen(slots=True)
class Patch:
    """Code around a modification.

    ``old`` and ``new`` begin at linear address ``start``, an instruction's if one is known. The modified
    bytes are those from ``first`` to ``last`` (exclusive), counted from ``start``. ``bits`` is the size of the
    code segment: 16, 32 or 64.
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
        return _cut(old), _cut(new)

    def _touched(self, code: bytes) -> Iterator[str]:
        """The instructions with a modified byte."""
        at = 0
        while at < min(self.last, len(code)):
            rest = code[at : at + MAX_LENGTH]
            length = decode(rest, self.bits).length or 1
            if at + length > self.first:
                yield disassemble(rest, self.start + at, self.bits, limit=1)[0]
            at += length


def capture(
    record: Modification,
    *,
    begin: int,
    linked: int,
    bits: int,
    read: Callable[[int, int], bytes],
) -> Patch:
    """The patch that ``record`` tells of, while memory still holds it.

    ``begin`` is the GPA where an instruction begins, at or below the record's and on its page, ``linked`` the
    linear address of that byte, and ``read`` gives bytes of guest-physical memory.
    """
    first = record.gpa - begin
    size = min(len(record.new), _LONGEST)
    end = min(record.gpa + size + MAX_LENGTH, (record.gpa + size + PAGE - 1) & -PAGE)
    new = read(begin, end - begin)
    old = new[:first] + record.old[:size] + new[first + size :]
    return Patch(linked, old, new, first, first + size, bits)


def block_start(block: Block, gpa: int) -> int | None:
    """The GPA where a block on the page of ``gpa`` begins, if ``gpa`` is one of its bytes."""
    if len(block.spans) > 1:
        return None
    start = (gpa & -PAGE) + block.hpa % PAGE
    return start if start <= gpa < start + block.size else None


def _cut(instructions: list[str]) -> list[str]:
    more = len(instructions) - _SHOWN
    return instructions if more <= 0 else [*instructions[:_SHOWN], f"... {more} more"]
