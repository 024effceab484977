"""Sub-page write permissions: which refused stores may go through after all (SDM vol. 3, 29.3.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from attrs import define

from vmm.cpu.engine import WRITE, R, Stop, W
from vmm.cpu.events import Event
from vmm.ept.bits import SUB_PAGE_WRITE
from vmm.ept.sub_pages import SUB_PAGE, SubPageTable, SubPageVerdict
from vmm.exits import ExitReason, SppEvent
from vmm.memory import PAGE
from vmm.mmu import CurrentInstruction, Mmu, Violation
from vmm.records import Json
from vmm.reporter import Reporter

_MISS: Final = 1 << 11


@define(slots=True)
class SubPages:
    """Judges stores of one vCPU to pages whose EPT entry allows reads, no writes, and has the sub-page bit set."""

    mmu: Mmu
    table: SubPageTable
    instruction: CurrentInstruction
    reporter: Reporter
    #: Ends the run, with a reason and its detail.
    finish: Callable[[str, Json], None]

    def judge(self, violation: Violation) -> tuple[SubPageVerdict, int] | None:
        """What the table says of a refused store, and of which GPA; None if the store is not eligible.

        An access to a paging structure never is, nor is a store whose place or size the instruction does not tell. All
        sub-pages that a store touches in the page have to be allowed.
        """
        if violation.access != WRITE or not violation.final or violation.leaf & (R | W) != R:
            return None
        level, entry = list(self.mmu.view.ept.entries(violation.gpa))[-1]
        if level != 1 or not entry & SUB_PAGE_WRITE:
            return None
        verdict = None
        for gpa in self._touched(violation):
            verdict = self.table.look_up(gpa)
            if verdict is not SubPageVerdict.ALLOWED:
                return verdict, gpa
        return None if verdict is None else (verdict, violation.gpa)

    def event(self, violation: Violation, verdict: SubPageVerdict, gpa: int) -> Event | Stop:
        """An SPP-related event, a VM exit: only a handler can mend the table."""
        self.reporter.count(ExitReason.SPP_RELATED_EVENT)
        decision: Event | bool | None = None
        gva = violation.page + gpa % PAGE
        if self.reporter.observed:
            qualification = _MISS if verdict is SubPageVerdict.MISS else 0
            decision = self.reporter.exit(SppEvent(self.instruction.pc, qualification, gpa, gva))
        if isinstance(decision, Event):
            return decision
        where: Json = {"gpa": gpa, "gva": gva}
        if decision is None and verdict is SubPageVerdict.MISS:
            self.finish("SPP miss", where)
        elif decision is None:
            self.finish("SPP misconfiguration", where)
        return Stop.ASKED

    def _touched(self, violation: Violation) -> Iterator[int]:
        """A GPA in each sub-page of the page that the instruction stores to; none if it does not tell."""
        page = violation.page
        stores = [operand for operand in self.instruction.decoded.operands if operand.writes]
        if not all(operand.size for operand in stores):
            return
        for operand in stores:
            address = self.instruction.address_of(operand)
            first, last = max(address, page), min(address + operand.size, page + PAGE) - 1
            while first <= last:
                yield violation.gpa + first - page
                first = first - first % SUB_PAGE + SUB_PAGE
