"""Virtual time as devices know it: what time it is, and what is to happen when.

Times are nanoseconds since the machine was switched on. They are a function of what the guest has executed, so that
a run repeats; where they come from is not a device's business.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Final

from attrs import define, field

NANOSECONDS: Final = 1_000_000_000
#: Entries of the heap of alarms from which on it is swept.
_SWEPT: Final = 64

#: Tells the time, in nanoseconds.
Clock = Callable[[], int]


@define(slots=True, eq=False)
class Alarm:
    """One callback that is due at ``when``; None: it is not set."""

    callback: Callable[[], None]
    when: int | None = None


class Timers:
    """The alarms of all devices, in the order in which they are due; those of one moment in the order of setting.

    ``changed`` is called whenever one is set.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._changed = changed
        #: Heap of (when, ticket, alarm). What an alarm does not say any more is passed over, and swept out at times.
        self._due: list[tuple[int, int, Alarm]] = []
        self._tickets: Final = count()

    def make(self, callback: Callable[[], None]) -> Alarm:
        """An alarm that is not set yet."""
        return Alarm(callback)

    def set(self, alarm: Alarm, when: int | None) -> None:
        """Set an alarm, or, with None, unset it; what it was set to before does not count any more."""
        if alarm.when == when:
            return
        alarm.when = when
        if when is not None:
            if len(self._due) >= _SWEPT:
                self._sweep()
            heapq.heappush(self._due, (when, next(self._tickets), alarm))
            self._changed()

    def catch_up(self, alarm: Alarm, now: int) -> None:
        """Call an alarm if it is due; for a device that is about to be told something, after which it might not be."""
        if alarm.when is not None and alarm.when <= now:
            alarm.when = None
            alarm.callback()

    @property
    def next(self) -> int | None:
        """When the first alarm is due; None if none is set."""
        while self._due and self._due[0][2].when != self._due[0][0]:
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def _sweep(self) -> None:
        """Keep one entry for each alarm that is set; a guest may set one to far-off times again and again."""
        kept: dict[int, tuple[int, int, Alarm]] = {}
        for entry in sorted(self._due, key=lambda entry: entry[:2]):
            if entry[2].when == entry[0]:
                kept.setdefault(id(entry[2]), entry)
        self._due = list(kept.values())

    def advance(self, now: int) -> None:
        """Call what is due at ``now`` or was before.

        A callback that sets its alarm to a time that has come is called again.
        """
        while (when := self.next) is not None and when <= now:
            _, _, alarm = heapq.heappop(self._due)
            alarm.when = None
            alarm.callback()


@define(slots=True, eq=False)
class SteppedClock:
    """A clock that stands still until it is moved: for tests of devices, and for hosts that count time themselves."""

    now: int = 0
    timers: Timers = field(factory=Timers)

    def __call__(self) -> int:
        """The time."""
        return self.now

    def advance(self, nanoseconds: int) -> None:
        """Let time pass, moment by moment: each alarm finds the clock at the time it was set to."""
        end = self.now + nanoseconds
        while (when := self.timers.next) is not None and when <= end:
            self.now = max(self.now, when)
            self.timers.advance(self.now)
        self.now = end
