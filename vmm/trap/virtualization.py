"""Virtualization exceptions: EPT violations that the guest handles itself (SDM vol. 3, 26.5.7).

A violation is convertible if bit 63 ("suppress #VE") is clear in the entry that maps the page, or is not present. It
becomes a #VE if CR0.PE is set, no event is being delivered, and the busy word is 0. The information area::

     0  exit reason, 32 bits: 48            16  guest-linear address, 64 bits
     4  busy: 32 bits, then all set         24  guest-physical address, 64 bits
     8  exit qualification, 64 bits         32  EPTP index, 16 bits

The VMM's own traps are none of the guest's business: only what the limit of a view causes is converted.
"""

from __future__ import annotations

import struct
from typing import Final

from attrs import define

from vmm.control_fields import ControlFields
from vmm.cpu.context import Context
from vmm.cpu.entry import CR0_PE
from vmm.cpu.events import Event, EventType, Vector
from vmm.exits import ExitReason
from vmm.memory import GuestMemory
from vmm.memory.frames import Frames, FrameState
from vmm.mmu import Mmu, Violation
from vmm.trap.door import Door

#: Its delivery pushes no error code.
VIRTUALIZATION_EXCEPTION: Final = Event(Vector.VE, EventType.HARDWARE_EXCEPTION)
_AREA: Final = struct.Struct("<IIQQQH")
_BUSY: Final = 4
_BUSY_WORD: Final = 0xFFFF_FFFF


@define(slots=True, eq=False)
class VirtualizationExceptions:
    """Converts the violations of one vCPU."""

    memory: GuestMemory
    frames: Frames
    door: Door
    mmu: Mmu
    context: Context
    fields: ControlFields

    def converts(self, violation: Violation) -> bool:
        """Whether a violation, not in the middle of an event's delivery, becomes a #VE."""
        area, view = self.fields.ve_area, self.mmu.view
        if area is None or not view.forbids(violation.gpa, violation.needed) or not self.context.cr0 & CR0_PE:
            return False
        busy = self.memory.read(area + _BUSY, 4) != bytes(4)
        sealed = self.frames.at(area).state is FrameState.SEALED
        return not (busy or sealed) and view.ept.is_convertible(violation.gpa)

    def save(self, qualification: int, gpa: int, gva: int) -> None:
        """Put the information of a violation into the area, which is busy from then on."""
        area = self.fields.ve_area
        if area is not None:
            what = (ExitReason.EPT_VIOLATION, _BUSY_WORD, qualification, gva, gpa, self.fields.eptp_index)
            gpas = self.frames.at(area).gpas
            where = gpas[0] if gpas else area
            self.door.write([(area, where, _AREA.pack(*what))], cause="virtualization exception", mmu=self.mmu)
