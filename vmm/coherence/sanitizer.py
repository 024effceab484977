"""Every execution of stale bytes, reported with who wrote what memory holds by now, and what was missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from vmm.coherence.model import Coherence, Synchronises, has_synchronisation, synchronisation_of
from vmm.coherence.sides import FetchSides, Writer
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frames, FrameState
from vmm.records import StaleExecution
from vmm.reporter import Reporter
from vmm.translation import Span

_MISSING: Final = {Coherence.SERIALISED: "a serialising instruction", Coherence.EXPLICIT: "a flush of these bytes"}
_CAUSE: Final = {Coherence.SERIALISED: "serialised", Coherence.EXPLICIT: "flushed"}


class Sanitizer:
    """Keeps the fetch sides of a machine in its model, and watches what is executed from them."""

    def __init__(
        self, model: Coherence, sides: FetchSides, memory: GuestMemory, frames: Frames, reporter: Reporter
    ) -> None:
        self.model: Final = model
        self.sides: Final = sides
        #: Executions of stale instructions so far.
        self.found = 0
        #: Of them those of what another vCPU has written. Its model permits them until the vCPU synchronises, and a
        #: protocol for cross-modifying code may count on that (SDM vol. 3, 9.1.3), so that they are no mistake as such.
        self.of_others = 0
        self._memory = memory
        self._frames = frames
        self._reporter = reporter

    def wants_steps(self, code: bytes, bits: int) -> bool:
        """Whether a block synchronises somewhere, which only a step tells."""
        return has_synchronisation(code, bits, self.model)

    def synchronised(self, vcpu: int, code: bytes, bits: int, line: Callable[[], int | None]) -> None:
        """A vCPU has completed the instruction at the start of ``code``; ``line`` finds the HPA that it names."""
        match synchronisation_of(code, bits, self.model):
            case Synchronises.EVERYTHING if self.model is Coherence.SERIALISED:
                self.sides.synchronise(vcpu, _CAUSE[self.model])
            case Synchronises.EVERYTHING:
                self.sides.flush_all(_CAUSE[self.model])
            case Synchronises.ITS_LINE:
                hpa = line()
                if hpa is not None:
                    self.sides.flush_line(hpa, _CAUSE[self.model])

    def before_write(self, hpa: int, rip: int | None, vcpu: int) -> None:
        """A frame may change from now on; ``rip`` is the instruction that is about to do it, None for the host."""
        if not self.sides.may_be_written(hpa):
            is_code = self._frames.at(hpa).state not in (FrameState.DATA, FrameState.WINDOW)
            self.sides.copy(hpa, self._writer(rip, vcpu, None), is_code=is_code)

    def written(self, hpa: int, size: int, rip: int | None, vcpu: int, instruction: int) -> None:
        """Bytes of a code frame have changed, by the modification of that number."""
        self.sides.note(hpa, size, self._writer(rip, vcpu, instruction))

    def _writer(self, rip: int | None, vcpu: int, instruction: int | None) -> Writer:
        return Writer(rip, vcpu, instruction, self._reporter.total)

    def look(self, vcpu: int, gva: int, spans: Sequence[Span]) -> StaleExecution | None:
        """What there is to report if a vCPU executes the instruction at a linear address, fetched from these places."""
        stale = [span for span in spans if self._is_stale(*span)]
        if not stale:
            return None
        homes = [(self._memory.home(hpa), size) for hpa, size in stale]
        first = homes[0][0]
        writer = self.sides.writer_of(vcpu, *self._difference(*stale[0])) or Writer(None, 0, None, 0)
        return StaleExecution(
            rip=gva,
            gpa=self._frames.at(first).gpas[0] + first % PAGE,
            executed=b"".join(self._memory.read(*span) for span in stale),
            memory=b"".join(self._memory.read(*span) for span in homes),
            writer=writer.rip,
            writer_vcpu=writer.vcpu,
            instruction=writer.instruction,
            time=writer.time,
            missing=_MISSING[self.model],
        )

    def report(self, found: StaleExecution, vcpu: int) -> bool:
        """A vCPU has executed it; False if the run's budget is used up."""
        self.found += 1
        self.of_others += found.writer is not None and found.writer_vcpu != vcpu
        self._reporter.charge()
        if self._reporter.observed:
            self._reporter.emit(found)
        return not self._reporter.over_budget

    def _is_stale(self, hpa: int, size: int) -> bool:
        home = self._memory.home(hpa)
        return home != hpa and self._memory.read(hpa, size) != self._memory.read(home, size)

    def _difference(self, hpa: int, size: int) -> Span:
        """The bytes of the data side that differ from those executed."""
        home = self._memory.home(hpa)
        pairs = zip(self._memory.read(hpa, size), self._memory.read(home, size), strict=True)
        different = [index for index, (executed, held) in enumerate(pairs) if executed != held]
        return home + different[0], different[-1] - different[0] + 1
