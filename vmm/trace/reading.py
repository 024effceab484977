"""Reading a trace line by line, in bounded memory, whatever is in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn, Self

from attrs import frozen

from vmm.errors import InputError
from vmm.guest.files import one_line
from vmm.trace.header import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from vmm.records import Json

#: The longest line of a trace that is read, in bytes.
MAX_LINE: Final = 16 << 20
#: Kinds of lines that are no records: their ``seq`` is that of the record before them.
BETWEEN: Final = frozenset({"console", "input", "state"})
_FIX: Final = "give a trace that `vmm run --trace` has written to its end"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant)


@frozen(slots=True)
class TraceLine:
    """A line: its number in the file from 1 on, its bytes, and its object."""

    at: int
    text: bytes
    object: Json

    @property
    def kind(self) -> str:
        """What the line is: that of a record, or one of ``BETWEEN``."""
        return str(self.object["kind"])

    @property
    def seq(self) -> int:
        """The number of the record, or of the record before; -1 for a line without a usable one."""
        value = self.object.get("seq")
        return value if type(value) is int else -1


class TraceReader:
    """An open trace: its header's object, and all other lines one by one.

    Raises ``InputError``, with file and line, for a file that cannot be read or is no trace, at once or later.
    """

    def __init__(self, path: Path | str) -> None:
        self.name: Final = one_line(path)
        try:
            self._stream: IO[bytes] = Path(path).open("rb")  # noqa: SIM115 - closed by close()
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from None
        #: The header's line.
        self.header_text = b""
        self._at = 0
        self._objects = self._read()
        try:
            self.header: Final = self._header()
        except InputError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def lines(self) -> Iterator[TraceLine]:
        """The lines that follow."""
        for text, value in self._objects:
            if not isinstance(value.get("kind"), str):
                self.refuse(f'expected a record with a "kind", found {_shown(value)}')
            yield TraceLine(self._at, text, value)

    def refuse(self, what: str) -> NoReturn:
        """Raise the error about the line that was read last."""
        raise InputError(what, where=f"{self.name}:{self._at}", fix=_FIX)

    def _header(self) -> Json:
        self.header_text, header = next(self._objects, (b"", {}))
        if header.get("schema") != SCHEMA:
            self._at = 1
            self.refuse(f'expected a header with "schema": "{SCHEMA}", found {_shown(header)}')
        return header

    def _read(self) -> Iterator[tuple[bytes, Json]]:
        try:
            while line := self._stream.readline(MAX_LINE + 1):
                self._at += 1
                yield line, self._parse(line)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from None

    def _parse(self, line: bytes) -> Json:
        if len(line) > MAX_LINE:
            self.refuse("the line is too long")
        try:
            value = _DECODER.decode(line.decode())
        except (ValueError, RecursionError):
            cut = "" if line.endswith(b"\n") else " (the file ends in the middle of a line)"
            self.refuse(f"expected a JSON object, found {_shown(line[:60].decode('utf-8', 'replace'))}{cut}")
        if not isinstance(value, dict):
            self.refuse(f"expected a JSON object, found {_shown(value)}")
        return value

    def _unreadable(self, error: Exception) -> InputError:
        reason = getattr(error, "strerror", None) or str(error)
        return InputError(f"cannot be read: {reason}", where=self.name, fix=_FIX)


def _shown(value: Any) -> str:  # noqa: ANN401 - a JSON value
    text = ascii(value)
    return text if len(text) <= 60 else text[:59] + "…"
