"""Addresses as people know them: a symbol of the image and an offset, through whichever alias."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.guest.loader import Guest

_BRANCH: Final = re.compile(r"(?:j\w+|call|loop\w*|xbegin) .*?(0x[0-9a-f]+)$")
_NUMBER: Final = re.compile(r"\b0x[0-9a-fA-F]+\b")


class Names:
    """Names the addresses of one guest."""

    def __init__(self, guest: Guest) -> None:
        self._symbols = guest.image.symbols
        self._segments = guest.image.segments
        self._paging = guest.manifest.paging
        self._memory = guest.manifest.machine.memory

    def linked(self, gpa: int) -> int:
        """The linear address that the byte at ``gpa`` was linked for; ``gpa`` itself outside of the image."""
        for segment in self._segments:
            if segment.gpa <= gpa < segment.end:
                return segment.gva + gpa - segment.gpa
        return gpa

    def code(self, linear: int) -> str:
        """Where code runs: ``name+0x1c``, ``name@0x40001000`` through an alias, or a number."""
        label = self._symbols.label(linear)
        if label is not None:
            return label
        found = None if self._paging is None else self._paging.resolve(linear, self._memory)
        label = None if found is None else self._symbols.label(self.linked(found[0]))
        return f"{linear:#x}" if label is None else f"{label}@{linear:#x}"

    def memory(self, gpa: int, gva: int | None) -> str:
        """What memory is meant: its symbol, then the addresses that are not the symbol's own."""
        linked = self.linked(gpa)
        label = self._symbols.label(linked)
        words = [label or f"{gpa:#x}"]
        if label and gpa != linked:
            words.append(f"at GPA {gpa:#x}")
        if gva is not None and gva != linked:
            words.append(f"through {gva:#x}")
        return " ".join(words)

    def near(self, gpa: int, distance: int) -> int | None:
        """The GPA of the nearest symbol at or below ``gpa``, at most ``distance`` bytes away."""
        found = self._symbols.lookup(self.linked(gpa))
        return gpa - found[1] if found is not None and found[1] <= distance else None

    def is_data(self, gpa: int) -> bool:
        """Whether the image says that the byte at ``gpa`` is data, wherever it lies."""
        return self._symbols.is_data(self.linked(gpa))

    def instruction(self, instruction: str) -> str:
        """The text of an instruction, with numbers as everywhere else, and the name of where it branches to."""
        return named_instruction(instruction, self._symbols.label)


def named_instruction(instruction: str, label_of: Callable[[int], str | None]) -> str:
    """The text of an instruction, with numbers as everywhere else, and what ``label_of`` calls where it branches to."""
    text = _NUMBER.sub(lambda number: hex(int(number[0], 16)), instruction)
    found = _BRANCH.match(text)
    label = label_of(int(found[1], 16)) if found else None
    return f"{text} <{label}>" if label else text


def symbols_of(guest: Guest) -> dict[str, int]:
    """The symbols of a guest's image by name, as a script wants them."""
    symbols = guest.image.symbols
    return {name: address for name in symbols if (address := symbols.address(name)) is not None}
