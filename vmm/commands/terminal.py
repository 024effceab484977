"""A terminal as a guest's serial console: what is typed goes to the guest as it is, and time passes as on the wall.

The terminal is in raw mode meanwhile, so that Ctrl-C and its like reach the guest. Ctrl-A is the VMM's: Ctrl-A x ends
the run, Ctrl-A Ctrl-A types a Ctrl-A.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from vmm.devices.virtual_time import NANOSECONDS

if TYPE_CHECKING:
    from vmm.machine import Machine

_ESCAPE: Final = 0x01
_LEAVE: Final = b"xX"
_PIECE: Final = 4096
#: Pieces of input that wait for the guest; whoever pastes more waits.
_PIECES: Final = 256
#: The longest time, in seconds, after which who waits for input looks whether the run is over.
_PATIENCE: Final = 0.1


def is_interactive() -> bool:
    """Whether somebody sits at a terminal that can be a console."""
    return os.name == "posix" and sys.stdin.isatty() and sys.stdout.isatty()


class Terminal:
    """Within the ``with`` block the terminal is raw; ``connect`` has a machine's guest use it."""

    def __init__(self, stream: TextIO) -> None:
        self._file: Final = stream.fileno()
        self._typed: Final[queue.Queue[bytes]] = queue.Queue(_PIECES)
        self._held = b""
        self._escaped = False
        self._leave = threading.Event()
        self._machine: Machine

    def __enter__(self) -> Self:
        import termios  # noqa: PLC0415 - there is none where nobody can be interactive
        import tty  # noqa: PLC0415

        self._before = termios.tcgetattr(self._file)
        tty.setraw(self._file)
        threading.Thread(target=self._listen, name="vmm-terminal", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import termios  # noqa: PLC0415

        termios.tcsetattr(self._file, termios.TCSADRAIN, self._before)

    def connect(self, machine: Machine) -> None:
        """Be the console of a PC."""
        assert machine.pc is not None
        machine.pc.outside = self
        self._machine = machine

    # vmm.pc.Outside

    @property
    def waiting(self) -> bool:
        """Whether something has been typed, or Ctrl-A x."""
        return bool(self._held) or not self._typed.empty() or self._leave.is_set()

    def poll(self) -> bytes:
        """What has been typed; Ctrl-A x ends the run here, where the guest is at a boundary."""
        if self._leave.is_set():
            self._machine.stop()
        typed, self._held = self._held, b""
        try:
            return typed + self._typed.get_nowait()
        except queue.Empty:
            return typed

    def sleep(self, nanoseconds: int | None) -> int:
        """Wait until something is typed, or for so long, at most a moment: as long as it took."""
        start = time.monotonic_ns()
        longest = NANOSECONDS if nanoseconds is None else nanoseconds
        if longest:
            with contextlib.suppress(queue.Empty):
                self._held += self._typed.get(timeout=min(longest / NANOSECONDS, _PATIENCE))
        return min(time.monotonic_ns() - start, longest)

    def _listen(self) -> None:
        while data := os.read(self._file, _PIECE):
            plain = self._without_escapes(data)
            if self._leave.is_set():
                break
            if plain:
                self._typed.put(plain)
        self._leave.set()

    def _without_escapes(self, data: bytes) -> bytes:
        plain = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte in _LEAVE:
                    self._leave.set()
                elif byte == _ESCAPE:
                    plain.append(byte)
            elif byte == _ESCAPE:
                self._escaped = True
            else:
                plain.append(byte)
        return bytes(plain)
