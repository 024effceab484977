"""Two traces side by side, to the first line in which they differ."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.trace.cursor import printable
from vmm.trace.fields import LABELS, FieldType, Schema
from vmm.trace.painter import Style
from vmm.trace.reading import BETWEEN, TraceLine
from vmm.trace.wording import as_line, value_words

if TYPE_CHECKING:
    from vmm.records import Json
    from vmm.trace.painter import Painter

_BEFORE: Final = 4
#: Lines that are kept after the first pair that differs.
AFTER: Final = 2
_WIDTH: Final = 110
_BETWEEN_LABELS: Final = {"input": "input"}
#: Fields that say where a line stands, or what it is, and not what happened.
_PLACE: Final = frozenset({"seq", "kind", "number"})
_ABSENT: Final = object()


class Comparison:
    """Takes the lines of two traces pairwise, and keeps the first pair that differs with a few lines around."""

    def __init__(self) -> None:
        self.pair: tuple[TraceLine | None, TraceLine | None] | None = None
        self._before: deque[TraceLine] = deque(maxlen=_BEFORE)
        self._after: list[tuple[TraceLine | None, TraceLine | None]] = []

    @property
    def complete(self) -> bool:
        """Whether a difference has been found, and nothing more is kept."""
        return self.pair is not None and len(self._after) >= AFTER

    def take(self, one: TraceLine | None, other: TraceLine | None) -> None:
        """The next line of each; None where a trace has ended."""
        if self.pair is not None:
            self._after.append((one, other))
        elif one is not None and other is not None and one.text == other.text:
            if "kind" in one.object:  # else it is the header
                self._before.append(one)
        else:
            self.pair = one, other

    def difference(self) -> Difference | None:
        """What was found; None if all lines were the same."""
        if self.pair is None:
            return None
        one, other = self.pair
        after = [[pair[side] for pair in self._after[:AFTER]] for side in (0, 1)]
        kept = [tuple(line.object for line in lines if line is not None) for lines in after]
        return Difference(
            one=None if one is None else one.object,
            other=None if other is None else other.object,
            before=tuple(line.object for line in self._before),
            one_after=kept[0],
            other_after=kept[1],
        )


@frozen(slots=True)
class Difference:
    """The first pair of lines that differ, as their objects (None: the trace has ended), and the lines around."""

    one: Json | None
    other: Json | None
    before: tuple[Json, ...]
    one_after: tuple[Json, ...]
    other_after: tuple[Json, ...]

    @property
    def place(self) -> str:
        """Where the two part."""
        there = [line for line in (self.one, self.other) if line is not None]
        number = min((line["seq"] for line in there if type(line.get("seq")) is int), default=0)
        is_record = any(line.get("kind") not in BETWEEN for line in there if line.get("seq") == number)
        return f"at #{number}" if is_record or not number else f"after #{number}"

    def notes(self, one: str, other: str) -> list[str]:
        """What differs, field by field; ``one`` and ``other`` are the names of the two."""
        if self.one is None or self.other is None:
            return [f"{one if self.one is None else other} has ended there"]
        if _title(self.one) != _title(self.other):
            return [f"{one}: {_title(self.one)}; {other}: {_title(self.other)}"]
        keys = dict.fromkeys([*self.one, *self.other])
        pairs = [(key, self.one.get(key, _ABSENT), self.other.get(key, _ABSENT)) for key in keys if key not in _PLACE]
        found = [f"{key}: {one} {_words(a)}, {other} {_words(b)}" for key, a, b in pairs if a != b]
        return found or ["only the spelling of the line differs"]

    def show(self, painter: Painter, one: str, other: str) -> None:
        """Write the lines of both around the place, then what differs."""
        if self.before:
            painter.line("  both", Style.QUIET)
            for earlier in self.before:
                painter.line(_row(earlier, " "))
        for name, line, after in ((one, self.one, self.one_after), (other, self.other, self.other_after)):
            painter.line(f"  {name}", Style.QUIET)
            painter.line("  > (nothing)" if line is None else _row(line, ">"), Style.BAD)
            for later in after:
                painter.line(_row(later, " "))
        painter.line()
        for note in self.notes(one, other):
            painter.line(f"  {printable(note)}", Style.TRAP)


def line_words(line: Json) -> str:
    """A line of a trace in the words of a script; one that is no record in the like."""
    kind = line.get("kind")
    if kind in Schema.of_records().kinds:
        return as_line(line)
    fields = [f"{key}={_words(value)}" for key, value in line.items() if key not in {"seq", "kind", "input"}]
    return " ".join([_title(line), *fields])


def _title(line: Json) -> str:
    kind = str(line.get("kind"))
    label = line.get({**LABELS, **_BETWEEN_LABELS}.get(kind, ""))
    return f"{kind} {label}" if isinstance(label, str) else kind


def _words(value: object) -> str:
    if value is _ABSENT:
        return "has none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}={_words(each)}" for key, each in value.items()) + "}"
    return value_words(value, FieldType.TEXT)


def _row(line: Json, mark: str) -> str:
    text = printable(line_words(line))
    seq = line.get("seq")
    number = f"#{seq}" if line.get("kind") not in BETWEEN else ""
    return f"  {mark} {number:>6} {text if len(text) <= _WIDTH else text[: _WIDTH - 1] + '…'}"
