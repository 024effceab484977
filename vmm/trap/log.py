"""The VMM's side of page-modification logging: what it does when a log is full, and how one is read.

The PML address and the PML index are fields of the VMCS, so that each vCPU has a log of its own. Dirty flags are in the
EPT's entries, which vCPUs share: whoever sets one has it in its log.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import define

from vmm.ept import PageModificationLog
from vmm.ept.log import FIRST_INDEX
from vmm.ept.views import Views
from vmm.exits import ExitReason, PageModificationLogFull
from vmm.records import LogEntry
from vmm.reporter import Reporter
from vmm.tlb import StrictTlb


@define(slots=True, eq=False)
class LogKeeper:
    """Reads the page-modification log of one vCPU. ``flush`` makes every engine forget its address translations."""

    vcpu: int
    log: PageModificationLog
    views: Views
    reporter: Reporter
    flush: Callable[[], None]
    #: Strict staleness, None without it.
    tlb: StrictTlb | None = None

    def select(self) -> None:
        """The vCPU is at work from now on: what is logged goes into its log."""
        for view in self.views.all:
            view.ept.log = self.log

    def full(self, rip: int) -> None:
        """The access at ``rip`` has met a full log: a VM exit. It is drained, unless a handler has dealt with it."""
        self.reporter.count(ExitReason.PAGE_MODIFICATION_LOG_FULL)
        decision = self.reporter.exit(PageModificationLogFull(rip)) if self.reporter.observed else None
        if decision is None and not self.reporter.stopped:
            self.drain(clean=False)

    def drain(self, *, clean: bool) -> tuple[int, ...]:
        """See ``Machine.drain_log``."""
        pages = self.log.pages
        self.report()
        self.log.index = FIRST_INDEX
        if clean:
            for gpa in pages:
                for view in self.views.all:
                    view.ept.clean(gpa)
                if self.tlb is not None:
                    self.tlb.invept_page(None, gpa)
            self.flush()
        return pages

    def report(self) -> None:
        """Show what is in the log to whoever watches, as this vCPU's."""
        if self.reporter.observed:
            with self.reporter.of_vcpu(self.vcpu):
                for count, gpa in enumerate(self.log.pages):
                    self.reporter.emit(LogEntry(gpa, FIRST_INDEX - count))
