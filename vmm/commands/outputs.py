"""Files that a command writes: checked before the run, whole or not there at all afterwards.

A file is written under a temporary name in its own folder and takes its real name when everything that
belongs to the run has been written. Devices and pipes are written directly, and ``-`` is standard output.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Self

from vmm.errors import OptionError
from vmm.guest.files import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

STDOUT: Final = "-"
_BUFFER: Final = 1 << 18


class OutputFile:
    """One file being written. ``option`` is the option that named it, for messages.

    Raises ``OptionError`` if it cannot be written, at once or later.
    """

    def __init__(self, option: str, name: str) -> None:
        self.option: Final = option
        self.name: Final = name
        self.target: Path | None = None
        self._temporary: Path | None = None
        try:
            self._stream = self._open()
        except (OSError, ValueError, RuntimeError) as problem:  # RuntimeError: links in a circle
            raise self._error(problem) from None

    def write(self, data: bytes, /) -> None:
        """Take some bytes."""
        try:
            self._stream.write(data)
        except BrokenPipeError:
            self._ignore_the_rest()
        except OSError as problem:
            raise self._error(problem) from None

    def close(self) -> None:
        """Write what is left; the file does not have its name yet."""
        try:
            self._stream.flush()
            if self._stream is not sys.stdout.buffer:
                self._stream.close()
        except BrokenPipeError:
            self._ignore_the_rest()
        except OSError as problem:
            raise self._error(problem) from None

    def commit(self) -> None:
        """Give the file its name."""
        if self._temporary is None or self.target is None:
            return
        try:
            self._temporary.replace(self.target)
        except OSError as problem:
            raise self._error(problem) from None
        self._temporary = None

    def abandon(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):
            if self._stream is not sys.stdout.buffer:
                self._stream.close()
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            self._temporary = None

    def _open(self) -> BinaryIO:
        if self.name == STDOUT:
            return sys.stdout.buffer
        self.target = target = Path(self.name).resolve()
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if _is_special(target):
            return target.open("wb", buffering=_BUFFER)
        return self._open_temporary(target)

    def _open_temporary(self, target: Path) -> BinaryIO:
        mode = None
        if target.exists():
            target.open("ab").close()  # may it be written?
            mode = stat.S_IMODE(target.stat().st_mode)
        temporary = target.with_name(f".vmm-{secrets.token_hex(8)}.tmp")
        stream = temporary.open("xb", buffering=_BUFFER)
        self._temporary = temporary
        if mode is not None:
            with contextlib.suppress(OSError):
                temporary.chmod(mode)
        return stream

    def _ignore_the_rest(self) -> None:
        """Nobody reads the pipe any more, which is no error."""
        self._stream = Path(os.devnull).open("wb")  # noqa: SIM115 - closed by close()

    def _error(self, problem: Exception) -> OptionError:
        reason = getattr(problem, "strerror", None) or "not a file name"
        where = f"{self.option} {one_line(self.name)}"
        fix = "give a file that can be written"
        return OptionError(f"cannot be written ({reason})", where=where, fix=fix)


class Outputs:
    """All files of a run: with a clean exit of the ``with`` block all are there, else none."""

    def __init__(self, inputs: Iterable[Path]) -> None:
        self._inputs = [path.resolve() for path in inputs]
        self._files: list[OutputFile] = []

    def __enter__(self) -> Self:
        return self

    def add(self, option: str, name: str | None) -> OutputFile | None:
        """Open a file for writing; None if no name was given.

        Raises ``OptionError`` if it cannot be written, is written already or is an input of the run.
        """
        if name is None:
            return None
        self._check_distinct(option, name)
        file = OutputFile(option, name)
        self._files.append(file)
        return file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for file in self._files:
                    file.close()
                for file in self._files:
                    file.commit()
        finally:
            for file in self._files:
                file.abandon()

    def _check_distinct(self, option: str, name: str) -> None:
        other = next((file for file in self._files if _is_same(name, file)), None)
        if other is not None:
            what = f"the same file as {other.option}"
            raise OptionError(what, where=f"{option} {one_line(name)}", fix="give two different files")
        if name != STDOUT and any(_same_file(Path(name), given) for given in self._inputs):
            what = "is read by this run"
            raise OptionError(what, where=f"{option} {one_line(name)}", fix="give another file")


def _is_same(name: str, file: OutputFile) -> bool:
    if STDOUT in (name, file.name):
        return name == file.name
    target = file.target
    return target is not None and not _is_special(target) and _same_file(Path(name), target)


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _same_file(one: Path, other: Path) -> bool:
    try:
        if one.resolve() == other.resolve():
            return True
        return one.exists() and other.exists() and one.samefile(other)
    except (OSError, ValueError, RuntimeError):
        return False
