"""What a run is given from outside: ``--input``, ``--time`` and ``--memory``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from vmm.commands.outputs import STDOUT
from vmm.devices import INPUT_LIMIT
from vmm.devices.clock_port import NANOSECONDS
from vmm.errors import OptionError
from vmm.guest.files import read_file, shown
from vmm.guest.inputs import TIME_LIMIT

_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_TIME: Final = re.compile(r"(\d{1,20})(?:\.(\d{1,9}))?", re.ASCII)


def read_input(name: str | None) -> bytes | None:
    """The contents of ``--input``: a file, or ``-`` for all of standard input; None without the option.

    Raises ``OptionError`` if it cannot be read or is larger than a guest can be given.
    """
    if name is None:
        return None
    if name != STDOUT:
        return read_file(Path(name), INPUT_LIMIT, error=OptionError, fix="give --input a file, or - for standard input")
    try:
        data = sys.stdin.buffer.read(INPUT_LIMIT + 1)
    except OSError as problem:
        what = f"cannot be read ({problem.strerror or 'I/O error'})"
        raise OptionError(what, where="standard input", fix="give --input a file") from None
    if len(data) > INPUT_LIMIT:
        raise OptionError(f"more than {INPUT_LIMIT:#x} bytes", where="standard input", fix="give less")
    return data


def parse_time(text: str | None) -> int | None:
    """``--time`` in nanoseconds since 1970; None without the option. Raises ``OptionError`` for what is no time."""
    if text is None:
        return None
    found = _TIME.fullmatch(text)
    if found is None or int(found[1]) > TIME_LIMIT:
        fix = "give seconds since 1970, such as 1700000000 or 1700000000.25"
        raise OptionError(f"{shown(text)} is no time", where="--time", fix=fix)
    return int(found[1]) * NANOSECONDS + int((found[2] or "").ljust(9, "0"))


def parse_size(text: str) -> int:
    """A size of memory: a number of bytes, or one of K, M or G; raises ``OptionError``."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in _UNITS else (text, "")
    if not (number.isascii() and number.isdigit() and len(number) < 16):
        raise OptionError(f"{shown(text)} is no size", where="--memory", fix="write it like 256M or 1G")
    return int(number) * _UNITS.get(unit, 1)
