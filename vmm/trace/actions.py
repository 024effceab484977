"""What a script may do to the run at an exit, and the interface through which it does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from attrs import frozen

if TYPE_CHECKING:
    from vmm.trace.syntax import Captures, Expr, Json

MAX_VECTOR: Final = 0xFF
MAX_32: Final = 0xFFFF_FFFF
MAX_64: Final = 0xFFFF_FFFF_FFFF_FFFF


class Actions(Protocol):
    """What the machine does on a script's behalf, at the exit that is being reported."""

    def inject(self, vector: int, error_code: int | None) -> None:
        """Deliver an event (0..255) through the guest's IDT at the next VM entry."""

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest-physical memory as the host."""

    def protect(self, gpa: int, length: int, access: str) -> None:
        """Give ``length`` bytes from ``gpa`` the EPT access ``access``, written like ``r-x``."""

    def approve(self, gpa: int, length: int) -> None:
        """Let the frames of ``length`` bytes from ``gpa`` be executed as they are, under a W^X policy."""

    def answer(self, value: int) -> None:
        """Let the IN at this I/O exit read ``value`` (up to 32 bits)."""

    def stop(self) -> None:
        """End the run after this exit."""


class ActionError(Exception):
    """An action whose argument has no usable value at this record."""


class Action(Protocol):
    """One ``-> …`` of a script line."""

    def perform(self, on: Actions, record: Json, captures: Captures) -> None:
        """Work out the arguments and call the machine; ``ActionError`` if they cannot be worked out."""


@frozen
class Argument:
    """A number that an action is given, with the largest value that makes sense."""

    name: str
    value: Expr
    wanted: str
    limit: int

    def number(self, record: Json, captures: Captures) -> int:
        """The argument's value, 0..limit."""
        value = self.value.evaluate(record, captures)
        if type(value) is not int:
            raise ActionError(f"{self.name}={self.wanted} is not a number here: it holds {value!r}")
        if not 0 <= value <= self.limit:
            raise ActionError(
                f"{self.name}={self.wanted} is {value:#x} here, which is not in 0..{self.limit:#x}"
            )
        return value


@frozen
class Inject:
    """``inject vector=… [error=…]``."""

    vector: Argument
    error: Argument | None

    def perform(self, on: Actions, record: Json, captures: Captures) -> None:
        """Inject the event."""
        error = None if self.error is None else self.error.number(record, captures)
        on.inject(self.vector.number(record, captures), error)


@frozen
class Write:
    """``write gpa=… bytes=…``."""

    gpa: Argument
    data: Expr
    wanted: str

    def perform(self, on: Actions, record: Json, captures: Captures) -> None:
        """Write the bytes."""
        digits = self.data.evaluate(record, captures)
        try:
            data = bytes.fromhex(digits)
        except (TypeError, ValueError):
            raise ActionError(f"bytes={self.wanted} are not bytes here: it holds {digits!r}") from None
        on.write(self.gpa.number(record, captures), data)


@frozen
class Protect:
    """``protect gpa=… length=… access=…``."""

    gpa: Argument
    length: Argument
    access: str

    def perform(self, on: Actions, record: Json, captures: Captures) -> None:
        """Change the access."""
        on.protect(self.gpa.number(record, captures), self.length.number(record, captures), self.access)


@frozen
class Approve:
    """``approve gpa=… length=…``."""

    gpa: Argument
    length: Argument

    def perform(self, on: Actions, record: Json, captures: Captures) -> None:
        """Approve the frames."""
        on.approve(self.gpa.number(record, captures), self.length.number(record, captures))


@frozen
class Answer:
    """``answer …``."""

    value: Argument

    def perform(self, on: Actions, record: Json, captures: Captures) -> None:
        """Answer the port."""
        on.answer(self.value.number(record, captures))


@frozen
class Stop:
    """``stop``."""

    def perform(self, on: Actions, record: Json, captures: Captures) -> None:
        """End the run."""
        del record, captures
        on.stop()
