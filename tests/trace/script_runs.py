"""Runs for the script tests, written down like script lines: one record a line, ``field=value``."""

from vmm.errors import ScriptError
from vmm.trace.cursor import Cursor
from vmm.trace.lines import Lines
from vmm.trace.matcher import Matcher, Verdict
from vmm.trace.script import Script

SYMBOLS = {"start": 0x1000, "patch_site": 0x1003, "handler": 0x2000, "writer.loop": 0x1800}


class RecordedActions:
    """Stands for the machine: notes what it is asked to do."""

    def __init__(self) -> None:
        self.done: list[tuple] = []

    def inject(self, vector, error_code):
        self.done.append(("inject", vector, error_code))

    def write(self, gpa, data):
        self.done.append(("write", gpa, data))

    def protect(self, gpa, length, access):
        self.done.append(("protect", gpa, length, access))

    def approve(self, gpa, length):
        self.done.append(("approve", gpa, length))

    def answer(self, value):
        self.done.append(("answer", value))

    def stop(self):
        self.done.append(("stop",))


def records(text):
    """The records of a run: ``exit HLT rip=5``, or ``console "text"``; `#` begins a comment."""
    cursor = Cursor(text, "run")
    lines = Lines(cursor, SYMBOLS)
    run = []
    cursor.skip_separators()
    while cursor.position < len(text):
        if cursor.take_word("console"):
            run.append({"kind": "console", "text": lines.values.string()})
        else:
            run.append(_record(lines))
        cursor.skip_separators()
    return run


def _record(lines):
    pattern, _ = lines.pattern(capturing=False)
    record = {"kind": pattern.kind}
    if pattern.label is not None:
        record[pattern.label_field] = pattern.label
    for condition in pattern.conditions:
        assert condition.operator == "="
        record[condition.field] = condition.value.evaluate({}, {})
    return record


def script(body, *, symbols=None):
    """A script without its first line."""
    return Script.parse(
        "vmm-script/1\n" + body, file="expect.script", symbols=SYMBOLS if symbols is None else symbols
    )


def refusal(body) -> ScriptError | None:
    """The error that the parser refuses the script with."""
    try:
        script(body)
    except ScriptError as error:
        return error
    return None


def verdict(body, run, *, actions=None) -> Verdict:
    """How a run compares with a script."""
    matcher = Matcher(script(body), actions)
    for record in records(run) if isinstance(run, str) else run:
        matcher.feed(record)
    return matcher.finish()


def holds(body, run) -> bool:
    """Whether a run holds against a script."""
    return verdict(body, run).ok


def failed_after(body, run) -> int | None:
    """After how many records the matcher is certain; None if it is not before the end."""
    matcher = Matcher(script(body))
    for number, record in enumerate(records(run), 1):
        matcher.feed(record)
        if matcher.failed:
            return number
    return None
