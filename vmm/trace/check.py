"""Holds a finished trace, a JSON Lines file, against a script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn

from vmm.errors import InputError
from vmm.trace.matcher import Matcher, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.trace.script import Script
    from vmm.trace.syntax import Json

SCHEMA: Final = "vmm-trace/1"

#: The longest line of a trace that is read, in bytes.
MAX_LINE: Final = 16 << 20

_FIX = "give a trace that `vmm run --trace` has written to its end"


def check_trace(path: Path | str, script: Script) -> Verdict:
    """Hold the trace in ``path`` against ``script``; ``InputError`` for a file that is not a trace.

    The script's actions are not done: they belong to the run that the trace is of.
    """
    matcher = Matcher(script)
    try:
        with Path(path).open("rb") as stream:
            for record in _records(stream, str(path)):
                matcher.feed(record)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot be read: {reason}", where=str(path), fix=_FIX) from None
    return matcher.finish()


def _records(stream: IO[bytes], file: str) -> Iterator[Json]:
    lines = _objects(stream, file)
    _, header = next(lines, (1, {}))
    if header.get("schema") != SCHEMA:
        _refuse(file, 1, f'expected a header with "schema": "{SCHEMA}", found {_shown(header)}')
    for at, record in lines:
        kind = record.get("kind")
        if not isinstance(kind, str):
            _refuse(file, at, f'expected a record with a "kind", found {_shown(record)}')
        yield record


def _objects(stream: IO[bytes], file: str) -> Iterator[tuple[int, Json]]:
    at = 0
    while line := stream.readline(MAX_LINE + 1):
        at += 1
        if len(line) > MAX_LINE:
            _refuse(file, at, "the line is too long")
        try:
            value = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            cut = "" if line.endswith(b"\n") else " (the file ends in the middle of a line)"
            _refuse(
                file, at, f"expected a JSON object, found {_shown(line[:60].decode('utf-8', 'replace'))}{cut}"
            )
        if not isinstance(value, dict):
            _refuse(file, at, f"expected a JSON object, found {_shown(value)}")
        yield at, value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _shown(value: Any) -> str:  # noqa: ANN401 - a JSON value
    text = ascii(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _refuse(file: str, line: int, what: str) -> NoReturn:
    raise InputError(what, where=f"{file}:{line}", fix=_FIX)
