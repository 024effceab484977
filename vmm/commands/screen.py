"""Standard output and standard error as the commands use them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from vmm.errors import OptionError
from vmm.trace.painter import Painter

if TYPE_CHECKING:
    from collections.abc import Callable

COLORS: Final = ("auto", "always", "never")


def wants_color(choice: str, stream: TextIO) -> bool:
    """Whether to style what goes to ``stream``; ``auto`` means on a terminal, unless NO_COLOR is set."""
    if choice != "auto":
        return choice == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Screen:
    """Text for people, on one stream. Nobody reading a pipe any more is no error: the rest is thrown away.

    ``before`` is called before anything is written. Raises ``OptionError`` if it cannot be written.
    """

    def __init__(self, stream: TextIO, *, color: str = "auto") -> None:
        self.before: Callable[[], None] = lambda: None
        self.color: Final = wants_color(color, stream)
        self.painter: Final = Painter(self.write, color=self.color)
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> None:
        """Write text with its ends of lines."""
        self.before()
        if not self._gone:
            self._attempt(lambda: self._stream.write(text))

    def flush(self) -> None:
        """See that all of it is out."""
        if not self._gone:
            self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except UnicodeEncodeError as problem:
            self._stream.write(problem.object.encode("ascii", "backslashreplace").decode("ascii"))
        except BrokenPipeError:
            self._gone = True
            discard(self._stream)
        except OSError as problem:
            self._gone = True
            discard(self._stream)
            what = f"cannot be written ({problem.strerror or 'I/O error'})"
            raise OptionError(what, where="standard output", fix="give it a place with room") from None


def discard(stream: TextIO) -> None:
    """Send what is still buffered in a stream, which has failed, to nowhere."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # not a real file: there is nothing to lose
        return
    nowhere = os.open(Path(os.devnull), os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def standard_output(*, color: str = "auto") -> Screen:
    """The screen for what a command is asked for."""
    return Screen(sys.stdout, color=color)


def standard_error(*, color: str = "auto") -> Screen:
    """The screen for complaints."""
    return Screen(sys.stderr, color=color)
