"""The fetch side as one vCPU has it: what its MMU and its engines ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import frozen

from vmm.coherence.sanitizer import Sanitizer
from vmm.records import StaleExecution
from vmm.translation import Span


@frozen(slots=True)
class FetchView:
    """Implements ``vmm.mmu.FetchSide`` for the vCPU of this number."""

    sanitizer: Sanitizer
    number: int

    def host(self, hpa: int) -> int:
        """Where the vCPU fetches what lies at an HPA of the data side."""
        return self.sanitizer.sides.of(self.number, hpa)

    def may_be_written(self, hpa: int) -> bool:
        """Whether a store to the frame needs no attention any more."""
        return self.sanitizer.sides.may_be_written(hpa)

    def before_write(self, hpa: int, rip: int | None) -> None:
        """The frame may change from now on, first by the instruction at ``rip`` (None: by the host)."""
        self.sanitizer.before_write(hpa, rip, self.number)

    def look(self, gva: int, spans: Sequence[Span]) -> StaleExecution | None:
        """What there is to report if the vCPU executes the instruction at a linear address, fetched from there."""
        return self.sanitizer.look(self.number, gva, spans)

    def report(self, found: StaleExecution) -> bool:
        """It was executed; False if the run's budget is used up."""
        return self.sanitizer.report(found, self.number)

    def synchronised(self, code: bytes, bits: int, line: Callable[[], int | None]) -> None:
        """The vCPU has completed the instruction at the start of ``code``; ``line`` finds the HPA that it names."""
        self.sanitizer.synchronised(self.number, code, bits, line)
