"""Expectation scripts: which exits and modifications a run must show, and what to do at them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from vmm.errors import ScriptError
from vmm.trace.grammar import parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.trace.syntax import Program

_MAX_BYTES = 4 << 20


@frozen
class Script:
    """A parsed script, good for any number of runs. ``file`` is its name in messages."""

    file: str
    text: str
    program: Program

    @classmethod
    def parse(cls, text: str, *, file: str, symbols: Mapping[str, int]) -> Script:
        """Parse a script; ``symbols`` are the image's. ``ScriptError`` names line, expectation and token."""
        return cls(file, text, parse(text, file, symbols))

    @classmethod
    def load(cls, path: Path | str, *, symbols: Mapping[str, int]) -> Script:
        """Read and parse a script file (UTF-8, up to 4 MiB); ``ScriptError`` for one that cannot be."""
        file = str(path)
        try:
            with Path(path).open("rb") as stream:
                data = stream.read(_MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ScriptError(
                f"cannot be read: {reason}", where=file, fix="give a script that exists"
            ) from None
        if len(data) > _MAX_BYTES:
            raise ScriptError("is too large", where=file, fix="keep a script below 4 MiB")
        try:
            return cls.parse(data.decode(), file=file, symbols=symbols)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ScriptError("is not UTF-8 text", where=f"{file}:{line}", fix="save it as UTF-8") from None
