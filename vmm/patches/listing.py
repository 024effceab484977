"""Each patch for people: where, by whom, through what, and the instructions before and after."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Final

from vmm.decode import disassemble
from vmm.patches.mapping import Mapping
from vmm.patches.mechanism import Attribution, Mechanism
from vmm.trace.names import named_instruction
from vmm.trace.painter import Painter, Style

if TYPE_CHECKING:
    from vmm.patches.joined import Patch
    from vmm.patches.symbols import KernelSymbols

#: Bytes of a patch that are disassembled, instructions that are shown of each side, and bytes that are shown.
_LONGEST: Final = 64
_SHOWN: Final = 6
_BYTES: Final = 16
#: Nobody means the bytes of these as instructions.
_CONTENTS: Final = frozenset({Mechanism.REUSE, Mechanism.USER_MEMORY, Mechanism.BEFORE_KERNEL})
#: Prefixes that are patched by themselves: the kernel takes LOCK away where there is one processor.
_PREFIXES: Final = {b"\xf0": "lock", b"\x3e": "ds"}
#: Mappings that go without saying.
_SAME: Final = frozenset({Mapping.OWN, Mapping.USER_OWN})
_MEMORY: Final = re.compile(r"\[(0x[0-9a-f]+)\]")


class Listing:
    """Writes patches one by one."""

    def __init__(self, painter: Painter, symbols: KernelSymbols | None) -> None:
        self._painter = painter
        self._symbols = symbols

    def show(self, patch: Patch, attribution: Attribution) -> None:
        """Write one patch."""
        first = patch.first
        numbers = f"{first.seq}" if first.seq == patch.last_seq else f"{first.seq}-{patch.last_seq}"
        steps = ", behind an INT3" if patch.behind_int3 else ""
        who = attribution.function
        by = f" by {who} ({attribution.mechanism.value})" if who else f", {attribution.mechanism.value}"
        through = ""
        if first.gva is not None and patch.mapping not in _SAME:
            through = f", through {patch.mapping.value} at {patch.start:#x}"
        size = len(patch.new)
        count = f"{size} byte{'' if size == 1 else 's'}"
        self._painter.line(f"{numbers}  {self._place(patch)}: {count}{by}{through}{steps}", Style.CHANGE)
        self._instructions(patch, attribution)

    def _place(self, patch: Patch) -> str:
        place = patch.executed_at
        if place is None:
            return f"GPA {patch.gpa:#x}"
        return self._label(place) or f"{place:#x}"

    def _instructions(self, patch: Patch, attribution: Attribution) -> None:
        if patch.old == patch.new:
            self._painter.line("    the same bytes", Style.QUIET)
        elif attribution.mechanism in _CONTENTS or len(patch.new) > _LONGEST:
            self._painter.line(f"    {_hex(patch.old)} -> {_hex(patch.new)}", Style.QUIET)
        else:
            for sign, code, style in (("-", patch.old, Style.OLD), ("+", patch.new, Style.NEW)):
                for number, text in enumerate(self._disassembled(patch, code)):
                    data = f"  {_hex(code)}" if not number else ""
                    self._painter.line(f"    {sign} {text:<56}{data}", style)

    def _disassembled(self, patch: Patch, code: bytes) -> list[str]:
        """The instructions of one side, runs of the same one as one line."""
        if code in _PREFIXES:
            return [_PREFIXES[code]]
        start = patch.gpa if patch.executed_at is None else patch.executed_at
        texts = [self._named(text) for text in disassemble(code, start, 64, limit=_LONGEST)]
        runs = [(text, sum(1 for _ in same)) for text, same in groupby(texts)]
        lines = [text if count == 1 else f"{text} x {count}" for text, count in runs]
        more = len(lines) - _SHOWN
        return lines if more <= 0 else [*lines[:_SHOWN], f"... {more} more"]

    def _named(self, text: str) -> str:
        named = named_instruction(text, self._label)
        found = _MEMORY.search(named)
        label = self._label(int(found[1], 16)) if found else None
        return f"{named} <{label}>" if label else named

    def _label(self, address: int) -> str | None:
        return None if self._symbols is None else self._symbols.label(address)


def _hex(data: bytes) -> str:
    more = len(data) - _BYTES
    return data.hex() if more <= 0 else f"{data[:_BYTES].hex()}... ({len(data)} bytes)"
