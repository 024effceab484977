"""Trace lines: exactly what ``json.dumps`` makes of a record, at a fraction of its cost."""

import json

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import exits
from vmm import records as other_records
from vmm.exits import Exit, Mtf
from vmm.records import (
    BlockEvent,
    DeviceAccess,
    End,
    FrameEvent,
    Injection,
    LogEntry,
    Modification,
    Record,
    RefusedAccess,
    StaleExecution,
    StaleTranslation,
    ViewEvent,
)
from vmm.trace.sink import TraceSink, by_json, line

EXITS = Exit.__subclasses__()
RECORDS = [*EXITS, Modification, BlockEvent, FrameEvent, Injection, RefusedAccess, LogEntry]
RECORDS += [DeviceAccess, StaleExecution, StaleTranslation, ViewEvent]

numbers = st.integers(0, (1 << 64) - 1)
VALUES = {
    "int": numbers,
    "int | None": st.none() | numbers,
    "str": st.text(),
    "str | None": st.none() | st.text(),
    "bytes": st.binary(max_size=40),
    "tuple[int, ...]": st.lists(numbers, max_size=5).map(tuple),
    "tuple[int, ...] | None": st.none() | st.lists(numbers, max_size=5).map(tuple),
}


def records(kind):
    """Any record of a type, by the types of its fields."""
    return st.builds(kind, **{field.name: VALUES[field.type] for field in attrs.fields(kind)})


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@given(data=st.data(), seq=numbers)
def test_a_line_is_what_json_makes_of_the_record(kind, data, seq):
    record = data.draw(records(kind))
    assert line(seq, record) == json.dumps({"seq": seq, **record.to_json()}) + "\n"


def test_every_type_of_record_is_covered():
    """A record type that comes new to vmm.exits or vmm.records is compared as well, or goes the slow way."""
    named = [*vars(exits).values(), *vars(other_records).values()]
    found = {kind for kind in named if isinstance(kind, type) and issubclass(kind, Record)}
    assert found == {*RECORDS, End, Record, Exit}


def test_numbers_that_are_enumerations_are_numbers():
    from vmm.cpu.events import Vector

    record = exits.ExceptionExit(rip=1, vector=Vector.PF, error_code=None, address=2)
    assert json.loads(line(1, record))["vector"] == 14
    assert line(1, record) == by_json(1, record)


class Lines:
    """An output that keeps what it is given."""

    def __init__(self):
        self.pieces = []

    def write(self, data):
        self.pieces.append(data)

    @property
    def objects(self):
        return [json.loads(text) for text in b"".join(self.pieces).decode("ascii").split("\n")[:-1]]


@given(st.lists(st.one_of(records(Mtf), st.text(alphabet="ab\n\r\u2028é", max_size=6)), max_size=30))
def test_console_text_keeps_its_place(steps):
    """All text is there, in order, in whole lines, after the record that came before its last piece."""
    output = Lines()
    sink = TraceSink(output, lambda: {"schema": "vmm-trace/1"})
    for step in steps:
        (sink.console if isinstance(step, str) else sink.record)(step)
    sink.record(End("stopped", 0))
    sink.flush()
    _, *found = output.objects
    texts = [entry["text"] for entry in found if entry["kind"] == "console"]
    assert "".join(texts) == "".join(step for step in steps if isinstance(step, str))
    assert all(text.endswith("\n") for text in texts[:-1])
    assert all(text.count("\n") <= 1 for text in texts)
    assert found[-1]["kind"] == "end"
    assert [entry["seq"] for entry in found] == sorted(entry["seq"] for entry in found)
    assert found[-1]["seq"] == 1 + sum(not isinstance(step, str) for step in steps)


def test_text_without_an_end_of_line_does_not_pile_up():
    output = Lines()
    sink = TraceSink(output, dict)
    for _ in range(10_000):
        sink.console("x")
    sink.flush()
    assert [len(entry["text"]) for entry in output.objects[1:]] == [4096, 4096, 1808]


def test_lines_are_written_in_batches():
    output = Lines()
    sink = TraceSink(output, lambda: {"schema": "vmm-trace/1"})
    for _ in range(5000):
        sink.record(Mtf(1))
    assert 5 <= len(output.pieces) <= 20
    sink.flush()
    assert len(output.objects) == 5001
