"""Holds a finished trace, a JSON Lines file, against a script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmm.trace.fields import Schema
from vmm.trace.matcher import Matcher, Verdict
from vmm.trace.reading import TraceReader

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.trace.script import Script

_CONSOLE: Final = "console"


def check_trace(path: Path | str, script: Script) -> Verdict:
    """Hold the trace in ``path`` against ``script``; ``InputError`` for a file that is not a trace.

    The script's actions are not done: they belong to the run that the trace is of. Lines of a kind that no script
    can name are passed over.
    """
    matcher = Matcher(script)
    known = {*Schema.of_records().kinds, _CONSOLE}
    with TraceReader(path) as trace:
        for line in trace.lines():
            if line.kind in known:
                matcher.feed(line.object)
    return matcher.finish()
