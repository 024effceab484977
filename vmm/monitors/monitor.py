"""One monitor, and what it tells of an access."""

from __future__ import annotations

from collections.abc import Callable

from attrs import define, field, frozen

from vmm.cpu.events import Event
from vmm.translation import Span


@frozen(slots=True)
class MonitoredAccess:
    """An access of one instruction to a contiguous run of bytes, some of which are monitored.

    ``access`` is "r", "w" or "x". ``gva`` and ``gpa`` are the linear and guest-physical address of its first byte,
    ``size`` its bytes; one that reaches into another page goes on there, at whatever GPA. ``rip`` is the linear
    address of the instruction, ``length`` its bytes (0 if they are none), ``vcpu`` the vCPU that executes it.

    ``old`` is what the bytes hold before the instruction: for "r" that is the value read, for "x" the instruction
    itself, as it was fetched. ``new`` is what they hold after it, for "w" only; None before an INS, whose value is not
    known yet.
    """

    access: str
    gva: int
    gpa: int
    size: int
    old: bytes
    new: bytes | None
    rip: int
    length: int
    vcpu: int


#: Called before an access: None lets it happen; True says that it is dealt with, and the guest goes on where RIP is;
#: an ``Event`` is delivered in its place.
Before = Callable[[MonitoredAccess], "Event | bool | None"]
After = Callable[[MonitoredAccess], None]
Condition = Callable[[MonitoredAccess], bool]


@define(slots=True, eq=False)
class Monitor:
    """A handle for one monitor (see ``Machine.monitor``).

    ``spans`` are the monitored bytes, as (HPA, bytes), each within one frame. ``hits`` counts the accesses that
    happened and met the condition.
    """

    gpa: int
    size: int
    access: frozenset[str]
    spans: tuple[Span, ...] = field(repr=False)
    before: Before | None = field(repr=False)
    after: After | None = field(repr=False)
    condition: Condition | None = field(repr=False)
    #: Whether only an instruction that starts at the first byte counts as an execution of it.
    at_start: bool
    hits: int = 0
    #: False once it has been removed.
    active: bool = True
    _forget: Callable[[Monitor], None] = field(kw_only=True, repr=False, alias="forget")

    def remove(self) -> None:
        """Stop monitoring, at once; also from a callback. Removing it again does nothing."""
        if self.active:
            self.active = False
            self._forget(self)

    def wants(self, access: MonitoredAccess) -> bool:
        """Whether it is to be told of an access to its bytes: it has not been removed, and the condition holds."""
        return self.active and (self.condition is None or bool(self.condition(access)))
