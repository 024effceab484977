"""Ctrl-C while a guest runs.

Python runs signal handlers between its own instructions, and there are none while an engine executes guest
code. So the signal's number goes to a socket (``signal.set_wakeup_fd``); a thread that waits there breaks in.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

#: Seconds between two attempts: one that comes between two VM entries has no effect.
_AGAIN: Final = 0.02
#: Seconds after the first signal from which on another one ends the command at any price.
_PATIENCE: Final = 2.0
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Within the ``with`` block SIGINT and SIGTERM call ``break_in`` until ``settle``, and nothing else.

    A signal that comes before ``break_in`` is set waits for it. Does nothing outside of the main thread,
    where Python handles no signals. ``received`` is the number of the first signal, 0 while there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self.break_in: Callable[[], None] = lambda: None
        self._since = 0.0
        self._settled = threading.Event()
        self._ours = threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if not self._ours:
            return self
        self._ear, self._mouth = socket.socketpair()
        self._mouth.settimeout(0)
        self._watcher = threading.Thread(target=self._watch, name="vmm-interrupt", daemon=True)
        self._watcher.start()
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        self._old_fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        return self

    def settle(self) -> None:
        """The run is over: signals are held off while its files are finished."""
        self._settled.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ours:
            return
        self._settled.set()
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._before.items():
            # A command that was interrupted is about to exit, and must not die of the next signal instead.
            signal.signal(number, signal.SIG_IGN if self.received else handler or signal.SIG_DFL)
        self._mouth.close()
        self._watcher.join()
        self._ear.close()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
        elif now - self._since > _PATIENCE:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while (heard := self._ear.recv(64)) and not any(number in heard for number in _SIGNALS):
            pass
        while heard and not self._settled.wait(_AGAIN):
            self.break_in()
