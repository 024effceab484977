"""The trace sink: every record of a run as one line of JSON (schema "vmm-trace/1", ``docs/formats.md``).

A line is the record's ``to_json`` with its sequence number in front, spelled as ``json.dumps`` spells it.
Lines are filled into templates that are worked out once for each type of record, in a fifth of the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from json.encoder import encode_basestring_ascii as quoted
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
from attrs import evolve

from vmm.exits import Exit, IoInstruction
from vmm.records import BlockEvent, End, FrameEvent, Injection, Json, Modification, Record

if TYPE_CHECKING:
    from vmm.inputs import Input, Moment

#: Lines that are collected before they are written.
BATCH: Final = 512
#: Ends that come at another moment each time, or leave the machine in the middle of something: no state goes with them.
CUT_OFF: Final = frozenset({"interrupted", "time", "error"})
#: A piece of console output without an end of line is written when it has this many characters.
_LONGEST_PIECE: Final = 4096

_CONSOLE: Final = '{"seq": %d, "kind": "console", "text": %s}\n'
_IO: Final = (
    '{"seq": %d, "kind": "exit", "reason": "IO_INSTRUCTION", "number": 30, "rip": %d, "port": %d, '
    '"size": %d, "direction": %s, "value": %d, "qualification": %d}\n'
)
_MODIFICATION: Final = (
    '{"seq": %d, "kind": "modification", "gpa": %d, "gva": %s, "rip": %s, "size": %d, "old": "%s", '
    '"new": "%s", "cause": %s, "instruction": %d, "aliases": %s, "blocks": %s%s}\n'
)
_BLOCK: Final = (
    '{"seq": %d, "kind": "block", "event": %s, "block": %d, "gpa": %d, "gva": %d, "size": %d, "mode": %s, '
    '"cause": %s}\n'
)
_FRAME: Final = '{"seq": %d, "kind": "frame", "gpa": %d, "from": %s, "to": %s, "cause": %s}\n'
_INJECTION: Final = (
    '{"seq": %d, "kind": "injection", "vector": %d, "type": %s, "error_code": %s, "rip": %d}\n'
)

#: Spells one record as a line, given its sequence number.
Formatter = Callable[[int, Any], str]


class Output(Protocol):
    """Where the lines go."""

    def write(self, data: bytes, /) -> object:
        """Take some bytes."""


class TraceSink:
    """Writes a trace to ``output``.

    ``record`` is an observer, ``console`` takes the guest's printed text, ``input`` listens to the inputs.
    Records are numbered from 1. A line of printed text, and one of an input, has the number of the record that it came
    after. ``header`` gives the first line's object when the first lines are written, ``state`` the digests of the
    final state when the run has ended. Lines are written in batches of ``batch``; ``flush`` must be called at the end.
    """

    def __init__(
        self,
        output: Output,
        header: Callable[[], Json],
        state: Callable[[], Json] | None = None,
        *,
        batch: int = BATCH,
    ) -> None:
        self.records = 0
        #: The digests of the final state, once the run has ended in a way that comes again.
        self.state: Json | None = None
        self._output = output
        self._header: Callable[[], Json] | None = header
        self._state = state
        self._batch = batch
        self._lines: list[str] = []
        self._text = ""

    def record(self, record: Record) -> None:
        """Take the next record of the run."""
        if isinstance(record, End):
            self._end_text()
            self._end_state(record)
        self.records += 1
        lines = self._lines
        lines.append(line(self.records, record))
        if len(lines) >= self._batch:
            self._write()

    def input(self, given: Input, moment: Moment) -> None:
        """Take the next input."""
        line = {"seq": self.records, "kind": "input", **given.to_json(), **moment.to_json()}
        self._lines.append(json.dumps(line) + "\n")

    def console(self, text: str) -> None:
        """Take the next piece of what the guest prints; it is written line by line."""
        self._text += text
        if len(self._text) >= _LONGEST_PIECE:
            self._end_text()
        elif "\n" in text:
            whole, _, self._text = self._text.rpartition("\n")
            self._pieces(whole.split("\n"), "\n")

    def flush(self) -> None:
        """Write everything that is still collected."""
        self._end_text()
        self._write()

    def _end_text(self) -> None:
        if self._text:
            *whole, rest = self._text.split("\n")
            self._text = ""
            self._pieces(whole, "\n")
            self._pieces([rest] if rest else [], "")

    def _pieces(self, texts: list[str], end: str) -> None:
        for text in texts:
            self._lines.append(_CONSOLE % (self.records, quoted(text + end)))

    def _end_state(self, end: End) -> None:
        if self._state is not None and end.reason not in CUT_OFF:
            self.state = self._state()
            self._lines.append(json.dumps({"seq": self.records, "kind": "state", **self.state}) + "\n")

    def _write(self) -> None:
        if self._header is not None:
            self._lines.insert(0, json.dumps(self._header()) + "\n")
            self._header = None
        data = "".join(self._lines).encode("ascii")
        self._lines.clear()
        self._output.write(data)


def line(seq: int, record: Record) -> str:
    """The trace line of a record, with its end of line."""
    text = _FORMATTERS.get(type(record), by_json)(seq, record)
    if record.vcpu is None or type(record) not in _FORMATTERS:
        return text
    return f'{text[:-2]}, "vcpu": {record.vcpu}}}\n'


def by_json(seq: int, record: Record) -> str:
    """The trace line of any record, the slow way."""
    return json.dumps({"seq": seq, **record.to_json()}) + "\n"


def _exit_formatter(kind: type[Exit]) -> Formatter:
    """For an exit whose fields are all numbers, or None where an exit of this kind lacks one."""
    names = _own(kind)
    pairs = [f', "{name}": %d' for name in names]
    start = f'{{"seq": %d, "kind": "exit", "reason": "{kind.reason.name}", "number": {kind.reason:d}'
    template = f"{start}{''.join(pairs)}}}\n"
    get: Callable[[Any], tuple[int | None, ...]] = (
        attrgetter(*names) if len(names) > 1 else lambda record: (record.rip,)
    )

    def formatted(seq: int, record: Exit) -> str:
        values = get(record)
        if None not in values:
            return template % (seq, *values)
        there = [pair % value for pair, value in zip(pairs, values, strict=True) if value is not None]
        return f"{start % seq}{''.join(there)}}}\n"

    return formatted


def _io(seq: int, r: IoInstruction) -> str:
    return _IO % (seq, r.rip, r.port, r.size, quoted(r.direction), r.value, r.qualification)


def _modification(seq: int, r: Modification) -> str:
    gva = "null" if r.gva is None else r.gva
    rip = "null" if r.rip is None else r.rip
    size, old, new, cause = len(r.new), r.old.hex(), r.new.hex(), quoted(r.cause)
    callers = "" if r.callers is None else f', "callers": {list(r.callers)}'
    return _MODIFICATION % (
        *(seq, r.gpa, gva, rip, size, old, new, cause, r.instruction),
        *(list(r.aliases), list(r.blocks), callers),
    )


def _block(seq: int, r: BlockEvent) -> str:
    if r.owner is not None:
        return by_json(seq, evolve(r, vcpu=None))
    mode, cause = quoted(r.mode), quoted(r.cause)
    return _BLOCK % (seq, quoted(r.event), r.block, r.gpa, r.gva, r.size, mode, cause)


def _frame(seq: int, r: FrameEvent) -> str:
    return _FRAME % (seq, r.gpa, quoted(r.before), quoted(r.after), quoted(r.cause))


def _injection(seq: int, r: Injection) -> str:
    error_code = "null" if r.error_code is None else r.error_code
    return _INJECTION % (seq, r.vector, quoted(r.type), error_code, r.rip)


def _numeric(kind: type[Exit]) -> bool:
    types = {str(getattr(field.type, "__name__", field.type)) for field in attrs.fields(kind)}
    return types <= {"int", "int | None"} and kind._fields is Exit._fields


def _own(kind: type[Record]) -> list[str]:
    """The fields of a class of records besides ``vcpu``, which a line has at its end."""
    return [field.name for field in attrs.fields(kind) if field.name != "vcpu"]


_FORMATTERS: Final[dict[type[Record], Formatter]] = {
    **{kind: _exit_formatter(kind) for kind in Exit.__subclasses__() if _numeric(kind)},
    IoInstruction: _io,
    Modification: _modification,
    BlockEvent: _block,
    FrameEvent: _frame,
    Injection: _injection,
}
