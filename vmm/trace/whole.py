"""A whole trace, checked from its header to its end before anything is done with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.inputs import Moment, parse
from vmm.trace.reading import BETWEEN, TraceLine, TraceReader
from vmm.trace.sink import CUT_OFF

if TYPE_CHECKING:
    from vmm.records import Json

#: What a window that is closed because the run has ended leaves in the trace.
_END_OF_RUN: Final = "end of run"
#: Keys of a header in which runs of the same guest may differ without being different.
_NAMES: Final = frozenset({"target", "files"})


@frozen(slots=True)
class WholeTrace:
    """What was found in a trace.

    ``end`` is the object of its last line, ``records`` how many it has with that one, ``inputs`` how many inputs.
    ``state`` is the state hash, None if it has none. ``cut`` is None, or, if the run was cut off at a moment that will
    not come again, the number of the last record before. ``digest`` stands for everything in it but how the guest was
    named: two traces with the same digest are of the same run.
    """

    path: Path
    header: Json
    records: int
    inputs: int
    end: Json
    state: str | None
    cut: int | None
    digest: bytes

    @classmethod
    def read(cls, path: Path | str) -> WholeTrace:
        """Read the trace in ``path``; raises ``InputError`` for a file that is no trace, damaged or not whole."""
        scan = _Scan()
        with TraceReader(path) as trace:
            scan.digest.update(json.dumps(comparable(trace.header), sort_keys=True).encode())
            for line in trace.lines():
                wrong = scan.take(line)
                if wrong is not None:
                    trace.refuse(wrong)
            if scan.end is None:
                trace.refuse("the trace breaks off after this line, without an end")
        return cls(
            path=Path(path),
            header=trace.header,
            records=scan.records,
            inputs=scan.inputs,
            end=scan.end,
            state=scan.state,
            cut=scan.cut if scan.end.get("reason") in CUT_OFF else None,
            digest=scan.digest.digest(),
        )


def comparable(header: Json) -> Json:
    """A header without what may differ between runs of the same guest, which is called after its file at times."""
    names = {*_NAMES, "guest"} if header.get("manifest") is None else _NAMES
    return {key: value for key, value in header.items() if key not in names}


class _Scan:
    """The state of reading one trace."""

    def __init__(self) -> None:
        self.records = 0
        self.inputs = 0
        self.end: Json | None = None
        self.state: str | None = None
        self.cut: int | None = None
        self.digest = hashlib.sha256()

    def take(self, line: TraceLine) -> str | None:
        """Take the next line; what is wrong with it, None if nothing is."""
        if self.end is not None:
            return "the trace goes on after its end"
        self.digest.update(line.text)
        if not line.text.endswith(b"\n"):
            return "the file ends in the middle of a line"
        is_record = line.seq == self.records + 1 and line.kind not in BETWEEN
        if not is_record and line.seq != self.records:
            return f'expected "seq": {self.records + (line.kind not in BETWEEN)}, found {str(line.seq)[:30]}'
        return self._record(line) if is_record else self._between(line)

    def _record(self, line: TraceLine) -> str | None:
        closing = line.kind == "frame" and line.object.get("cause") == _END_OF_RUN
        if self.cut is None and (closing or line.kind == "end"):
            self.cut = self.records
        self.records += 1
        if line.kind == "end":
            if not isinstance(line.object.get("reason"), str):
                return "an end without a reason"
            self.end = line.object
        return None

    def _between(self, line: TraceLine) -> str | None:
        if line.kind == "state":
            self.state = str(line.object.get("sha256"))
        elif line.kind == "input":
            self.inputs += 1
            try:
                parse(line.object)
                Moment.parse(line.object)
            except ValueError as problem:
                return str(problem)
        return None
