"""Where a guest reads what is not in its image: ``[input]`` and ``[clock]`` of a manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.devices import INPUT_LIMIT, ClockPort, InputPort
from vmm.errors import ManifestError
from vmm.guest.fields import U16_MAX, U64_MAX, Table
from vmm.guest.files import read_file

if TYPE_CHECKING:
    from pathlib import Path

#: The last second that a clock can show, so that its nanoseconds have room in 64 bits.
TIME_LIMIT: Final = U64_MAX // 1_000_000_000 - 1


@frozen(slots=True)
class InputSpec:
    """The first of the two ports of ``vmm.devices.InputPort``, and the file that is read there by default."""

    port: int
    file: Path | None = None

    def read(self) -> bytes:
        """The contents of the file, nothing without one; raises ``ManifestError``."""
        fix = "correct [input].file in the manifest, or give --input"
        return b"" if self.file is None else read_file(self.file, INPUT_LIMIT, error=ManifestError, fix=fix)


@frozen(slots=True)
class ClockSpec:
    """The first of the three ports of ``vmm.devices.ClockPort``.

    ``time`` is what it always shows by default, in seconds since 1970; None: the host's time.
    """

    port: int
    time: int | None = None


def input_of(top: Table, folder: Path, taken: dict[int, str]) -> InputSpec | None:
    """The manifest's ``[input]``, its file relative to ``folder``; its ports must not be among ``taken``."""
    if "input" not in top:
        return None
    table = top.table("input", ("port", "file"))
    file = folder / table.string("file", longest=1000) if "file" in table else None
    return InputSpec(_ports(table, "[input]", InputPort.PORTS, taken), file)


def clock_of(top: Table, taken: dict[int, str]) -> ClockSpec | None:
    """The manifest's ``[clock]``; its ports must not be among ``taken``."""
    if "clock" not in top:
        return None
    table = top.table("clock", ("port", "time"))
    return ClockSpec(_ports(table, "[clock]", ClockPort.PORTS, taken), table.maybe_integer("time", 0, TIME_LIMIT))


def _ports(table: Table, owner: str, count: int, taken: dict[int, str]) -> int:
    """The first of ``count`` ports that nobody has yet; they are ``taken`` from then on."""
    first = table.integer("port", 0, U16_MAX + 1 - count)
    for port in range(first, first + count):
        if port in taken:
            what = f"its {count} ports from {first:#x} on include {port:#x}, which is {taken[port]}"
            raise table.error("port", what, "give it another number")
        taken[port] = f"{owner}'s"
    return first
