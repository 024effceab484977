"""Guest-linear memory as the VMM itself reaches it on the guest's behalf, for event delivery.

Guest paging applies with all its faults. The EPT applies, too, but the VMM does not exit to itself, except for what the
view of the vCPU is against: code frames may be read, and what is written to one goes through the door, unless the W^X
policy or a seal is against it: then the delivery faults as a store would.
"""

from __future__ import annotations

from attrs import define

from vmm.cpu.context import Context
from vmm.cpu.engine import READ, WRITE, R, Stop, W
from vmm.cpu.events import Event, GuestFault, Vector
from vmm.ept import CLEAN, HELD, MISCONFIGURED
from vmm.memory import PAGE, GuestMemory
from vmm.mmu import ForbiddenStructure, Mmu, UnmappedStructure, Violation
from vmm.mmu.refusals import LogIsFull, PagingStructureViolation
from vmm.paging import Access, PageFault, walk
from vmm.trap.door import Door, SealedFrame
from vmm.trap.refusal import Refusals, RunEnded

_LEAF_ADDRESS = 0x000F_FFFF_FFFF_F000


@define(slots=True)
class GuestLinearMemory:
    """Implements ``vmm.cpu.state.LinearMemory`` for one vCPU.

    All methods raise ``vmm.cpu.events.GuestFault`` besides where a page walk would write to a sealed frame, the
    writing ones for a store to one. They raise ``ForbiddenStructure`` where the view of the EPT is against an access,
    ``LogIsFull`` where a flag of the EPT has to be set and the page-modification log is full, and ``RunEnded`` if the
    W^X policy has ended the run.
    """

    memory: GuestMemory
    mmu: Mmu
    door: Door
    context: Context
    refusals: Refusals

    def read(self, address: int, size: int, *, user: bool) -> bytes:
        """``size`` bytes; raises ``PageFault``."""
        return b"".join(
            self.memory.read(hpa, length) for hpa, _, length in self._places(address, size, Access.READ, user=user)
        )

    def check_write(self, address: int, size: int, *, user: bool) -> None:
        """Raise what ``write`` would raise, writing nothing."""
        self._writable(address, size, user=user)

    def write(self, address: int, data: bytes, *, user: bool) -> None:
        """All of ``data`` or, raising ``PageFault``, none of it."""
        done = 0
        pieces = []
        for hpa, gpa, length in self._writable(address, len(data), user=user):
            pieces.append((hpa, gpa, data[done : done + length]))
            done += length
        self.door.write(pieces, cause="event delivery", mmu=self.mmu)

    def _writable(self, address: int, size: int, *, user: bool) -> list[tuple[int, int, int]]:
        """(HPA, GPA, bytes) for each page of the range, all of which may be written."""
        places = self._places(address, size, Access.WRITE, user=user)
        for hpa, gpa, length in places:
            refused = self.refusals.of_delivery(hpa, gpa, address, user=user)
            if refused is not None:
                raise _fault_of(refused)
            address += length
        return places

    def _places(self, address: int, size: int, access: Access, *, user: bool) -> list[tuple[int, int, int]]:
        """(HPA, GPA, bytes) for each page of the range."""
        wrap = (1 << 64) - 1 if self.context.efer >> 10 & 1 else (1 << 32) - 1
        places = []
        done = 0
        with self.mmu.structures.reached_by(self.door):
            while done < size:
                linear = address + done & wrap
                offset = linear & PAGE - 1
                length = min(size - done, PAGE - offset)
                gpa, leaf = self._translate(linear, access, user=user)
                places.append((leaf & _LEAF_ADDRESS | offset, gpa | offset, length))
                done += length
        return places

    def _translate(self, linear: int, access: Access, *, user: bool) -> tuple[int, int]:
        """The GPA of a linear page, and its leaf; raises ``PageFault``, and ``UnmappedStructure`` for the EPT."""
        mode, cr3 = self.mmu.current_mode(), self.context.cr3
        try:
            gpa = walk(self.mmu.structures, mode, cr3, linear, access, user=user, implicit=not user).gpa
        except LogIsFull:
            raise
        except PagingStructureViolation as problem:
            refusal = problem.refusal(linear & -PAGE, READ if access == Access.READ else WRITE)
            if isinstance(refusal, Violation) and self.mmu.view.forbids(problem.gpa, problem.needed):
                raise ForbiddenStructure(refusal, linear) from None
            raise UnmappedStructure(problem.gpa, linear) from None
        except SealedFrame as sealed:
            raise _fault_of(self.refusals.of_walk(sealed.gpa)) from None
        view = self.mmu.view
        leaf = view.ept.translate(gpa)
        kind, needed = (WRITE, W) if access == Access.WRITE else (READ, R)
        if view.forbids(gpa, needed):
            violation = Violation(linear & -PAGE, kind, gpa, leaf, final=True, needed=needed)
            raise ForbiddenStructure(violation, linear)
        if not leaf and view.limits:
            leaf = view.ept.host_page(gpa) or 0  # a code frame of which the view's limit leaves nothing
        if leaf in (0, MISCONFIGURED):
            raise UnmappedStructure(gpa, linear)
        clean = leaf & CLEAN and access == Access.WRITE
        if leaf & HELD or (clean and view.ept.is_log_full):
            raise LogIsFull(gpa, kind, leaf, 0)
        return gpa, view.ept.dirty(gpa) if clean else leaf


def _fault_of(refused: Event | Stop) -> Exception:
    """What a delivery comes to that stores where it may not."""
    if not isinstance(refused, Event):
        return RunEnded()
    if refused.cr2 is None:
        return GuestFault(Vector(refused.vector), refused.error_code or 0)
    return PageFault(refused.cr2, refused.error_code or 0)
