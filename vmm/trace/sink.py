"""The trace sink: every record of a run as one line of JSON (schema "vmm-trace/1", ``docs/formats.md``).

A line is the record's ``to_json`` with its sequence number in front, spelled as ``json.dumps`` spells it.
Lines are filled into templates that are worked out once for each type of record, in a fifth of the time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from json.encoder import encode_basestring_ascii as quoted
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
from attrs import evolve

from vmm.errors import ImageError
from vmm.exits import BlockEvent, Exit, FrameEvent, Injection, IoInstruction, Json, Modification, Record
from vmm.guest.files import read_file
from vmm.guest.image import ELF_FILE_LIMIT

if TYPE_CHECKING:
    from vmm.guest.loader import Guest

SCHEMA: Final = "vmm-trace/1"
#: Lines that are collected before they are written.
_BATCH: Final = 512
#: A piece of console output without an end of line is written when it has this many characters.
_LONGEST_PIECE: Final = 4096

_CONSOLE: Final = '{"seq": %d, "kind": "console", "text": %s}\n'
_IO: Final = (
    '{"seq": %d, "kind": "exit", "reason": "IO_INSTRUCTION", "number": 30, "rip": %d, "port": %d, '
    '"size": %d, "direction": %s, "value": %d, "qualification": %d}\n'
)
_MODIFICATION: Final = (
    '{"seq": %d, "kind": "modification", "gpa": %d, "gva": %s, "rip": %s, "size": %d, "old": "%s", '
    '"new": "%s", "cause": %s, "instruction": %d, "aliases": %s, "blocks": %s}\n'
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


def header(guest: Guest) -> Json:
    """The object of a trace's first line; ``image`` is the SHA-256 of the image file."""
    fix = "leave the image in its place"
    image = read_file(guest.manifest.image.file, ELF_FILE_LIMIT, error=ImageError, fix=fix)
    return {
        "schema": SCHEMA,
        "guest": guest.name,
        "image": hashlib.sha256(image).hexdigest(),
        "memory": guest.manifest.machine.memory,
        "policy": attrs.asdict(guest.manifest.policy),
    }


class TraceSink:
    """Writes a trace to ``output``: ``record`` is an observer, ``console`` takes the guest's printed text.

    Records are numbered from 1. A line of printed text has the number of the record that it came after. Lines
    are written in batches; ``flush`` must be called at the end.
    """

    def __init__(self, output: Output, header: Json) -> None:
        self.records = 0
        self._output = output
        self._lines = [json.dumps(header) + "\n"]
        self._text = ""

    def record(self, record: Record) -> None:
        """Take the next record of the run."""
        if record.kind == "end":
            self._end_text()
        self.records += 1
        lines = self._lines
        lines.append(line(self.records, record))
        if len(lines) >= _BATCH:
            self._write()

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

    def _write(self) -> None:
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
    return _MODIFICATION % (
        *(seq, r.gpa, gva, rip, size, old, new, cause, r.instruction),
        *(list(r.aliases), list(r.blocks)),
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
