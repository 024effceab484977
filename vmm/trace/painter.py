"""Styled lines of text."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_RESET: Final = "\x1b[0m"


class Style(enum.Enum):
    """What a line is about; the value is its colour on a terminal (an ANSI sequence)."""

    PLAIN = ""
    QUIET = "\x1b[2m"
    TRAP = "\x1b[33m"
    CHANGE = "\x1b[1;36m"
    OLD = "\x1b[31m"
    NEW = "\x1b[32m"
    EVENT = "\x1b[35m"
    BAD = "\x1b[1;31m"
    GOOD = "\x1b[1;32m"
    STRONG = "\x1b[1m"


class Painter:
    """Writes lines, styled if ``color``. ``write`` takes text with its end of line."""

    def __init__(self, write: Callable[[str], None], *, color: bool) -> None:
        self._write = write
        self._color = color

    def line(self, text: str = "", style: Style = Style.PLAIN) -> None:
        """Write one line, without blanks at its end."""
        text = text.rstrip()
        styled = self._color and style.value and text
        self._write(f"{style.value}{text}{_RESET}\n" if styled else f"{text}\n")
