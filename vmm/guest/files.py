"""Reading the user's files, and showing the user's values, without trusting either."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.errors import InputError

_SHOWN = 48


def one_line(text: object) -> str:
    """``text`` with everything that could leave its line or drive a terminal escaped."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shown(value: object) -> str:
    """A value of the user's for an error message: one line, of bounded length."""
    if isinstance(value, int) and not isinstance(value, bool):
        # repr() refuses integers of more than 4300 digits, hex() does not.
        text = hex(value) if abs(value) >= 10 else str(value)
    elif isinstance(value, dict | list):
        text = "a table" if isinstance(value, dict) else "an array"
    elif isinstance(value, bool):
        text = str(value).lower()
    else:
        text = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
    return one_line(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def read_file(path: Path, limit: int, *, error: type[InputError], fix: str) -> bytes:
    """The contents of a regular file of at most ``limit`` bytes; raises ``error``, advising ``fix``."""
    data = read_head(path, limit + 1, error=error, fix=fix)
    if len(data) > limit:
        raise error(f"larger than {limit:#x} bytes", where=one_line(path), fix="give a smaller file")
    return data


def read_head(path: Path, size: int, *, error: type[InputError], fix: str) -> bytes:
    """The first ``size`` bytes of a regular file, fewer if it is shorter; raises ``error``.

    Devices, pipes and folders are refused before they are opened: a guest's description may not make the
    host wait or drain ``/dev/zero``.
    """
    where = one_line(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error("not a regular file", where=where, fix=fix)
        with path.open("rb") as file:
            return file.read(size)
    except OSError as problem:
        raise error(f"cannot be read ({problem.strerror or 'I/O error'})", where=where, fix=fix) from None
    except ValueError:  # a NUL in the name
        raise error("not a file name", where=where, fix=fix) from None
