"""The architectural CPU state as the VMM handles it, independent of the engine that holds it."""

from __future__ import annotations

from typing import Literal, Protocol

from attrs import frozen

SegmentName = Literal["es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"]


@frozen(slots=True)
class Segment:
    """A segment register with its hidden part (SDM vol. 3, 3.4.3).

    ``access_rights`` has the format of the VMCS access-rights fields (SDM vol. 3, table 25-2):

    ======  =====================================
    bits    meaning
    ======  =====================================
    3:0     type
    4       S (1: code or data, 0: system)
    6:5     DPL
    7       P
    12      AVL
    13      L (64-bit code)
    14      D/B
    15      G
    ======  =====================================
    """

    selector: int
    base: int
    limit: int
    access_rights: int

    @property
    def dpl(self) -> int:
        """Descriptor privilege level, 0 to 3."""
        return self.access_rights >> 5 & 3


class CpuState(Protocol):
    """What event delivery needs of a vCPU. Attributes are plain integers, read and written in place."""

    rcx: int
    r11: int
    rip: int
    rsp: int
    rflags: int
    cr0: int
    cr2: int
    cr4: int
    efer: int
    dr6: int
    dr7: int

    @property
    def cpl(self) -> int:
        """Current privilege level, 0 to 3 (SS.DPL; 0 in real mode, 3 in virtual-8086 mode)."""

    @property
    def idtr(self) -> tuple[int, int]:
        """(linear base, limit in bytes - 1)."""

    @property
    def gdtr(self) -> tuple[int, int]:
        """(linear base, limit in bytes - 1)."""

    def segment(self, name: SegmentName) -> Segment:
        """Read a segment register with its hidden part."""

    def set_segment(self, name: SegmentName, segment: Segment) -> None:
        """Load a segment register and its hidden part; loading CS or SS also sets CPL and operand sizes.

        No checks. Where CPL changes, SS is loaded after CS and RFLAGS.VM is already what it will be.
        """


class LinearMemory(Protocol):
    """Guest-linear memory as the VMM reaches it on the guest's behalf: paging and EPT apply.

    ``user`` makes it a user-mode access; otherwise it is a supervisor access, at any CPL. No access wraps
    around the end of the address space, and in IA-32e mode every address is canonical.
    """

    def read(self, address: int, size: int, *, user: bool) -> bytes:
        """``size`` bytes; raises ``vmm.paging.PageFault`` if guest paging does not allow the access."""

    def check_write(self, address: int, size: int, *, user: bool) -> None:
        """Raise the ``PageFault`` that ``write`` would raise; memory stays as it is."""

    def write(self, address: int, data: bytes, *, user: bool) -> None:
        """All of ``data`` or, raising ``PageFault``, none of it."""
