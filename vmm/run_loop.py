"""The run loop: let the vCPUs take turns until the run is over."""

from __future__ import annotations

from typing import Final

from vmm.processor import Processor
from vmm.records import End
from vmm.reporter import Reporter
from vmm.run_state import RunState
from vmm.scheduler import Scheduler


class RunLoop:
    """Runs all vCPUs of a machine: the only one without interruption, several by turns that ``scheduler`` draws."""

    def __init__(
        self, processors: list[Processor], scheduler: Scheduler, state: RunState, reporter: Reporter
    ) -> None:
        self.processors: Final = processors
        #: The one at work.
        self.current = processors[0]
        self._scheduler = scheduler
        self._state = state
        self._reporter = reporter

    def run(self, seconds: float) -> End:
        """Run to the end; ``seconds`` is the wall-clock limit. Raises ``GuestError`` if the VMM has to give up."""
        take_turn = self._take_turn if len(self.processors) > 1 else self._run_only
        with self._state.time_limit(seconds):
            while not self._state.is_over:
                take_turn()
        reason, detail = self._state.settle(seconds)
        self.current.trap.close_windows()
        for processor in self.processors:
            if processor.log is not None:
                processor.log.report()
        end = End(reason, self.current.vcpu.context.rip, detail, vcpu=self._reporter.vcpu)
        self._reporter.emit(end)
        return end

    def _run_only(self) -> None:
        self.current.take_turn(None)
        if not self.current.ready:
            self._state.finish("halt", {})

    def _take_turn(self) -> None:
        ready = [number for number, processor in enumerate(self.processors) if processor.ready]
        if not ready:
            self._state.finish("halt", {})
            return
        number, instructions = self._scheduler.draw(ready)
        self.current, self._reporter.vcpu = self.processors[number], number
        if self.current.log is not None:
            self.current.log.select()
        self.current.take_turn(instructions)
