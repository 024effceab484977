"""The first divergence between a script and a run, in people's words."""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.trace.cursor import printable
from vmm.trace.fields import LABELS, FieldType
from vmm.trace.syntax import UNKNOWN, Condition, Literal, Several
from vmm.trace.wording import as_line, number, value_words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.trace.near import NearMiss
    from vmm.trace.syntax import Captures, Json, Pattern, Value

_PLAIN_NUMBER: Final = re.compile(r"\d\w*")
_WIDTH: Final = 110
_SCRIPT_LINES: Final = 2
_BEFORE: Final = 5
_AFTER: Final = 2
_TAKEN: Final = 3
_FOLLOWING: Final = 3

_PLAIN = "\x1b[0m"
_BOLD = "\x1b[1m"
_DIM = "\x1b[2m"
_RED = "\x1b[31m"
_GREEN = "\x1b[32m"
_YELLOW = "\x1b[33m"


@frozen
class RunLine:
    """One record of the run. ``mark``: ">" diverges, "~" is a near miss, "+" was taken by a line."""

    number: int
    text: str
    mark: str
    note: str


@frozen
class Divergence:
    """Where a run first went another way than its script.

    ``line`` is the script's line, ``because`` the reason that its statement gives (empty if none), ``record``
    the number of the record at which the divergence became certain (counted from 1; None if only the end of
    the run decided it), ``what`` the finding in one sentence,
    ``script`` the script's lines around ``line`` with their numbers, ``run`` the records around, ``notes``
    near misses field by field, and what else helps.
    """

    file: str
    line: int
    what: str
    because: str
    record: int | None
    script: tuple[tuple[int, str], ...]
    run: tuple[RunLine, ...]
    notes: tuple[str, ...]

    def render(self, color: bool = False) -> str:  # noqa: FBT001, FBT002 - a published signature
        """The report as text of several lines, with ANSI colours if ``color``."""
        lines = list(self._lines())
        if not color:
            lines = [(_PLAIN, text) for _, text in lines]
        return "\n".join(text if code == _PLAIN else f"{code}{text}{_PLAIN}" for code, text in lines)

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield _BOLD, f"{self.file}:{self.line}: {self.what}"
        if self.because:
            yield _YELLOW, f"because: {printable(self.because)}"
        yield _PLAIN, ""
        yield _DIM, "  script"
        for at, text in self.script:
            here = at == self.line
            yield (
                (_RED if here else _PLAIN),
                f"  {'>' if here else ' '} {at:5} | {_cut(printable(text))}".rstrip(),
            )
        yield _PLAIN, ""
        yield _DIM, "  run"
        yield from self._run_lines()
        if self.notes:
            yield _PLAIN, ""
        for note in self.notes:
            yield _YELLOW, f"  {note}"

    def _run_lines(self) -> Iterator[tuple[str, str]]:
        codes = {">": _RED, "~": _YELLOW, "+": _GREEN, " ": _PLAIN}
        last = 0
        if not self.run:
            yield _PLAIN, "          (no record)"
        for entry in self.run:
            if entry.number > last + 1:
                yield _DIM, f"          … {entry.number - last - 1} more"
            last = entry.number
            note = f"   <- {entry.note}" if entry.note else ""
            yield codes[entry.mark], f"  {entry.mark} {f'#{entry.number}':>6} {entry.text}{note}"


class History:
    """The few records of a run that a report may need."""

    def __init__(self) -> None:
        self._tail: deque[tuple[int, Json]] = deque(maxlen=_BEFORE)
        self._taken: deque[tuple[int, Json, int]] = deque(maxlen=_TAKEN)
        self._following: list[tuple[int, Json]] = []
        self._after: list[tuple[int, Json]] = []

    def add(self, at: int, record: Json) -> None:
        """Note a record."""
        entry = (at, record)
        self._tail.append(entry)
        if len(self._following) < _FOLLOWING:
            self._following.append(entry)

    def add_after(self, at: int, record: Json) -> None:
        """Note a record that came after the divergence."""
        if len(self._after) < _AFTER:
            self._after.append((at, record))

    def took(self, line: int) -> None:
        """Note that a script line has taken the record noted last."""
        self._taken.append((*self._tail[-1], line))
        self._following.clear()

    def lines(self, culprit: int | None, near: list[NearMiss]) -> tuple[RunLine, ...]:
        """All that was noted, in the order of the run."""
        records = dict([*self._following, *self._tail, *self._after])
        records |= {at: record for at, record, _ in self._taken}
        records |= {miss.number: miss.record for miss in near}
        taken = {at: f"line {line}" for at, _, line in self._taken}
        marks = dict.fromkeys(taken, "+") | {miss.number: "~" for miss in near}
        if culprit is not None:
            marks[culprit] = ">"
        return tuple(
            RunLine(at, _cut(printable(as_line(records[at]))), marks.get(at, " "), taken.get(at, ""))
            for at in sorted(records)
        )


def script_lines(text: str, line: int) -> tuple[tuple[int, str], ...]:
    """The lines of the script around ``line``."""
    lines = text.split("\n")
    first = max(1, line - _SCRIPT_LINES)
    return tuple(
        (at, lines[at - 1].rstrip()) for at in range(first, min(len(lines), line + _SCRIPT_LINES) + 1)
    )


def explain_near(pattern: Pattern, near: list[NearMiss]) -> list[str]:
    """For each near miss, what kept it from matching."""
    notes = []
    for miss in near:
        title = f"#{miss.number} {miss.record.get('kind')}{_place(miss.record)}"
        failed = [
            _explain(condition, miss) for condition in pattern.conditions if not _holds(condition, miss)
        ]
        notes.append(f"{printable(title)}: line {pattern.line} wants {'; and '.join(failed)}")
    return notes


def explain_other(pattern: Pattern, at: int, record: Json, captures: Captures) -> str:
    """Why this record is not the one that had to come."""
    if not pattern.concerns(record):
        kind = str(record.get("kind"))
        label = record.get(LABELS.get(kind, ""))
        other = kind if label is None else f"{kind} {label}"
        return f"line {pattern.line} wants {pattern.title()}, but #{at} is {printable(other)}"
    failed = [c for c in pattern.conditions if not c.holds(record, captures)]
    wants = "; and ".join(_explain_in(c, record, captures) for c in failed)
    return f"#{at} {printable(str(record.get('kind')))}{_place(record)}: line {pattern.line} wants {wants}"


def _place(record: Json) -> str:
    gpa = record.get("gpa")
    return f" at {number(gpa)}" if type(gpa) is int else ""


def _holds(condition: Condition, miss: NearMiss) -> bool:
    return condition.holds(miss.record, miss.captures)


def _explain(condition: Condition, miss: NearMiss) -> str:
    return _explain_in(condition, miss.record, miss.captures)


def _explain_in(condition: Condition, record: Json, captures: Captures) -> str:
    name, actual = condition.field, record.get(condition.field)
    wanted = condition.value.evaluate(record, captures)
    words = f"{name} {condition.operator} {condition.wanted}"
    if wanted is UNKNOWN:
        return f"{words}, but `{condition.wanted}` has no value yet"
    words += _resolved(condition, wanted)
    if actual is None:
        return f"{words}, but the record has no {name}"
    found = f"{words}, but it is {value_words(actual, condition.type)}"
    if condition.operator == "has" and type(actual) is int and type(wanted) is int:
        return f"{found} (without bits {wanted & ~actual:#x})"
    return found


def _resolved(condition: Condition, wanted: Value) -> str:
    """What the script's words stand for, where that is not plain."""
    if isinstance(condition.value, Several):
        shown = [value_words(part, FieldType.NUMBER) for part in wanted]
        words = "..".join(shown) if condition.operator == "in" else f"[{', '.join(shown)}]"
    else:
        words = value_words(wanted, condition.type)
    if not isinstance(condition.value, Literal):
        return f" ({words})"
    is_symbol = condition.type is FieldType.NUMBER and not _PLAIN_NUMBER.fullmatch(condition.wanted)
    return f" ({words})" if is_symbol and words != condition.wanted else ""


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
