"""How an access is refused that the guest's page tables allow: the record of it, and what the guest gets.

======================  ===========================================================================================
refused by              the guest gets
======================  ===========================================================================================
a seal                  #GP(0)
the W^X policy          "fault": #PF, with P and W for a store, P and I/D for a fetch, U at CPL 3, CR2 the address;
                        "stop": nothing any more, the run ends
======================  ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import define

from vmm.cpu.context import Context
from vmm.cpu.engine import FETCH, WRITE, Stop
from vmm.cpu.events import Event, EventType, Vector
from vmm.memory import PAGE
from vmm.memory.frames import Frame, Frames, FrameState
from vmm.mmu import CurrentInstruction, Mmu, Unjudged, Violation
from vmm.mmu.translation import space_of
from vmm.paging import ErrorCode
from vmm.records import Json, RefusedAccess
from vmm.reporter import Reporter
from vmm.trap import wx
from vmm.trap.wx import Finding

#: What the guest gets for an access that is refused for good.
GENERAL_PROTECTION: Final = Event(Vector.GP, EventType.HARDWARE_EXCEPTION, 0)
_SEAL: Final = Finding("seal")
_ACCESSES: Final = {WRITE: "write", FETCH: "fetch"}


class RunEnded(Exception):  # noqa: N818 - for the run loop, which has been told the reason
    """The policy has ended the run in the middle of an event delivery."""


@define(slots=True)
class Refusals:
    """Refuses accesses of one vCPU. ``answer`` is the W^X policy's: one of ``wx.ANSWERS``.

    Methods return None for an access that is not refused, otherwise the event that the guest gets in its place, or
    ``Stop.ASKED`` if the run is over.
    """

    answer: str
    frames: Frames
    mmu: Mmu
    context: Context
    instruction: CurrentInstruction
    reporter: Reporter
    #: Ends the run, with a reason and its detail.
    finish: Callable[[str, Json], None]

    @property
    def keeps_wx(self) -> bool:
        """Whether there is a W^X policy."""
        return self.answer != "off"

    def of_use(self, use: Unjudged) -> Event | Stop | None:
        """Judge the first use of a permission."""
        return self._judge(self.frames.at(use.host), use.access, use.page, use.gpa, root=use.root)

    def of_violation(self, frame: Frame, violation: Violation, access: int) -> Event | Stop | None:
        """Judge a fetch from a frame that is not approved, or a store to one that is; a seal is against any store."""
        if access == WRITE and frame.state is FrameState.SEALED:
            return self._refuse(_SEAL, access, violation.page, violation.gpa)
        if not self.keeps_wx:
            return None
        return self._judge(frame, access, violation.page, violation.gpa)

    def of_walk(self, gpa: int) -> Event | Stop:
        """Refuse the accessed or dirty flag that a page walk would set in an entry in a sealed frame."""
        self._report(_SEAL, WRITE, gpa, None)
        return GENERAL_PROTECTION

    def of_delivery(self, hpa: int, gpa: int, gva: int, *, user: bool) -> Event | Stop | None:
        """Judge what event delivery pushes, as the store that it is."""
        frame = self.frames.at(hpa)
        if frame.state is FrameState.SEALED:
            self._report(_SEAL, WRITE, gpa, gva)
            return GENERAL_PROTECTION
        root, page = space_of(self.context.cr0, self.context.cr3), gva & -PAGE
        if not self.keeps_wx or (root, page, WRITE) in frame.uses.judged:
            return None
        found = wx.judge(frame, self.mmu, WRITE, root, page)
        return None if found is None else self._answer(found, WRITE, gpa, gva, user=user)

    def _judge(self, frame: Frame, access: int, page: int, gpa: int, *, root: int | None = None) -> Event | Stop | None:
        here = space_of(self.context.cr0, self.context.cr3) if root is None else root
        found = wx.judge(frame, self.mmu, access, here, page)
        return None if found is None else self._refuse(found, access, page, gpa)

    def _refuse(self, found: Finding, access: int, page: int, gpa: int) -> Event | Stop:
        """Refuse an access of the current instruction to a linear page, whose GPA is ``gpa``."""
        gva = self.instruction.faulting_address(page, access)
        return self._answer(found, access, gpa & -PAGE | gva % PAGE, gva, user=self.context.cpl == 3)

    def _answer(self, found: Finding, access: int, gpa: int, gva: int, *, user: bool) -> Event | Stop:
        self._report(found, access, gpa, gva)
        if found is _SEAL:
            return GENERAL_PROTECTION
        if self.answer == "stop":
            detail = {"rule": found.rule, "access": _ACCESSES[access], "gpa": gpa, "gva": gva}
            self.finish("W^X violation", detail)
            return Stop.ASKED
        code = ErrorCode.PRESENT | (ErrorCode.USER if user else 0)
        if access == WRITE:
            code |= ErrorCode.WRITE
        elif self.mmu.current_mode().reports_fetch:
            code |= ErrorCode.FETCH
        return Event(Vector.PF, EventType.HARDWARE_EXCEPTION, int(code), cr2=gva)

    def _report(self, found: Finding, access: int, gpa: int, gva: int | None) -> None:
        if self.reporter.observed:
            offset = gpa % PAGE
            self.reporter.emit(
                RefusedAccess(
                    rule=found.rule,
                    access=_ACCESSES[access],
                    gpa=gpa,
                    gva=gva,
                    rip=self.instruction.pc,
                    writable=tuple([page + offset for page in found.writable]),
                    executable=tuple([page + offset for page in found.executable]),
                )
            )
