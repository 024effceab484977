"""Whether and why a run is over: what all vCPUs of a machine share of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attrs import define, field

from vmm.exits import Json
from vmm.reporter import Reporter


@define(slots=True, eq=False)
class RunState:
    """The end of a run, once there is one. ``stop_engines`` has every engine stop at its next boundary."""

    reporter: Reporter
    stop_engines: Callable[[], None]
    ending: tuple[str, Json] | None = None
    _interrupted: bool = field(default=False, init=False)
    _time_is_up: bool = field(default=False, init=False)

    @property
    def is_over(self) -> bool:
        """Whether no further instruction may execute."""
        return self.ending is not None or self._interrupted or self._time_is_up or self.reporter.over_budget

    def finish(self, reason: str, detail: Json) -> None:
        """End the run at this boundary; the first reason counts."""
        if self.ending is None:
            self.ending = (reason, detail)

    def break_in(self) -> None:
        """End the run from another thread or a signal handler. The machine cannot go on afterwards."""
        self._interrupted = True
        self.stop_engines()

    def settle(self, seconds: float) -> tuple[str, Json]:
        """The reason of the end and its detail, now that nothing executes any more."""
        if self._interrupted:
            self.finish("interrupted", {})
        elif self._time_is_up:
            self.finish("time", {"limit": seconds})
        else:
            self.finish("exits", {"limit": self.reporter.limit})
        assert self.ending is not None
        return self.ending

    @contextmanager
    def time_limit(self, seconds: float) -> Iterator[None]:
        """Break into the guest when its time is over, even if it loops without an exit."""
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._end_of_time)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_of_time(self) -> None:
        self._time_is_up = True
        self.stop_engines()
