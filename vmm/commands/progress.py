"""A status line on a terminal for runs that take longer than a moment."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from vmm.machine import Machine

#: Seconds before the first line, and between two.
_FIRST: Final = 2.0
_NEXT: Final = 0.25
_CLEAR: Final = "\r\x1b[K"


class Progress:
    """Shows on standard error how far a run has come. ``line`` says it: from another thread, so that it only reads.

    ``hide`` takes the line away, so that something else can be written; it comes back by itself.
    """

    def __init__(self, line: Callable[[], str], *, wanted: bool) -> None:
        self._line = line
        self._lock = threading.Lock()
        self._shown = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if wanted and sys.stderr.isatty():
            self._thread = threading.Thread(target=self._show, name="vmm-progress", daemon=True)

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.hide()

    def hide(self) -> None:
        """Take the line away."""
        if self._shown:
            with self._lock:
                self._shown = False
                _write(_CLEAR)

    def _show(self) -> None:
        wait = _FIRST
        while not self._over.wait(wait):
            wait = _NEXT
            with self._lock:
                self._shown = True
                _write(f"{_CLEAR}{self._line()}")


def of_machine(machine: Machine) -> Callable[[], str]:
    """Says how far a machine has come."""

    def line() -> str:
        exits, modifications = machine.reporter.total, machine.door.modifications
        return f"{machine.guest.name}: {exits:,} exits, {modifications:,} modifications so far"

    return line


def _write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):  # the terminal is gone
        return
