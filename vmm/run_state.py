"""Whether and why a run is over: what all vCPUs of a machine share of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from attrs import define, field

from vmm.records import Json
from vmm.reporter import Reporter

#: Seconds between two attempts to stop the engines: one that is about to start does not hear the first.
_AGAIN: Final = 0.02


@define(slots=True, eq=False)
class RunState:
    """The end of a run, once there is one. ``stop_engines`` has every engine stop at its next boundary."""

    reporter: Reporter
    stop_engines: Callable[[], None]
    ending: tuple[str, Json] | None = None
    _interrupted: bool = field(default=False, init=False)
    _time_is_up: bool = field(default=False, init=False)
    #: Set when the engines have to stop at once, and when they have.
    _hurry: threading.Event = field(factory=threading.Event, init=False)
    _done: threading.Event = field(factory=threading.Event, init=False)

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
        self._hurry.set()

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
        watch = threading.Thread(target=self._watch, args=(seconds,), name="vmm-watch", daemon=True)
        watch.start()
        try:
            yield
        finally:
            self._done.set()
            self._hurry.set()
            watch.join()

    def _watch(self, seconds: float) -> None:
        """Stop the engines when the time is over or somebody breaks in, as often as it takes."""
        if not self._hurry.wait(min(seconds, threading.TIMEOUT_MAX)):
            self._time_is_up = True
        while not self._done.is_set():
            self.stop_engines()
            self._done.wait(_AGAIN)
