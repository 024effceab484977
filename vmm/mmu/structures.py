"""The guest's own paging structures as its page walks reach them: behind the EPT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from vmm.cpu.engine import READ, WRITE, R, W
from vmm.ept import CLEAN, HELD, MISCONFIGURED
from vmm.ept.bits import ADDRESS_MASK
from vmm.ept.views import View
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frames
from vmm.mmu.refusals import LogIsFull, PagingStructureViolation
from vmm.paging import EntryChanged

if TYPE_CHECKING:
    from vmm.mmu.translation import Mmu

_OFFSET: Final = PAGE - 1


class StructureWriter(Protocol):
    """Where updates of paging structures go that the VMM makes on the guest's behalf."""

    def write(self, pieces: list[tuple[int, int, bytes]], *, cause: str, mmu: Mmu | None) -> None:
        """Change guest memory at each (HPA, GPA), as one operation."""


class GuestStructures:
    """Implements ``vmm.paging.PhysicalMemory`` for the walks of one vCPU.

    To the EPT, the access to an entry is a data read, the update of accessed and dirty flags a read-modify-write; with
    EPT accessed and dirty flags every access counts as a write (SDM vol. 3, 29.3.3.2). What is not allowed leaves the
    walk as ``PagingStructureViolation``.
    """

    def __init__(self, memory: GuestMemory, view: View, frames: Frames, mmu: Mmu) -> None:
        #: What the EPT has to allow for any access.
        self.needed: Final = R | W if view.ept.profile.accessed_dirty else R
        self._memory = memory
        self._view = view
        self._ept = view.ept
        self._frames = frames
        self._mmu = mmu
        #: While the VMM itself walks on the guest's behalf, paging structures in code frames may be read, and what
        #: the walk changes in them goes here.
        self._writer: StructureWriter | None = None
        #: As the processor, or setting no flags.
        self._find = view.ept.translate

    def use(self, view: View) -> None:
        """Walk by another view from now on."""
        self._view, self._ept = view, view.ept
        self._select()

    def load(self, gpa: int, size: int) -> int:
        """A paging-structure entry."""
        leaf = self._find(gpa)
        if leaf & (self.needed | CLEAN | HELD) != self.needed:
            leaf = self._admit(gpa, leaf)
        hpa = leaf & ADDRESS_MASK | gpa & _OFFSET
        if size == 8:
            return self._memory.words[hpa >> 3]
        return int.from_bytes(self._memory.read(hpa, size), "little")

    def compare_and_store(self, gpa: int, size: int, old: int, new: int) -> None:
        """Set accessed and dirty flags in a paging-structure entry."""
        leaf = self._ept.translate(gpa)
        if not leaf & W and not self._reaches(gpa, leaf, WRITE):
            raise PagingStructureViolation(gpa, WRITE, leaf, self.needed | W)
        hpa = leaf & ADDRESS_MASK | gpa & _OFFSET
        if int.from_bytes(self._memory.read(hpa, size), "little") != old:
            raise EntryChanged(f"the paging-structure entry at GPA {gpa:#x} changed under a walk")
        data = new.to_bytes(size, "little")
        if self._mmu.fetch_side is not None:
            self._mmu.fetch_side.before_write(hpa, None)
        if self._writer is None:
            self._memory.write(hpa, data)
        else:
            self._writer.write([(hpa, gpa, data)], cause="page walk", mmu=self._mmu)

    @contextmanager
    def reached_by(self, writer: StructureWriter) -> Iterator[None]:
        """Let walks reach paging structures in code frames, with their updates going to ``writer``."""
        before, self._writer = self._writer, writer
        self._select()
        try:
            yield
        finally:
            self._writer = before
            self._select()

    def _select(self) -> None:
        self._find = self._ept.look if self._writer is NO_WRITER else self._ept.translate

    def _admit(self, gpa: int, leaf: int) -> int:
        """The leaf for a read that the EPT does not simply allow; raises the violation."""
        if leaf & self.needed != self.needed and not self._reaches(gpa, leaf, READ):
            raise PagingStructureViolation(gpa, READ, leaf, self.needed)
        if self._writer is NO_WRITER or not leaf & (CLEAN | HELD):
            return leaf
        if self._ept.is_log_full:
            raise LogIsFull(gpa, READ, leaf, self.needed)
        return self._ept.dirty(gpa)

    def _reaches(self, gpa: int, leaf: int, access: int) -> bool:
        """Whether a walk may reach a paging structure although the EPT does not allow it.

        The VMM's own may, within the limits of the view unless it only looks. Any may read in a code frame that was
        made R-X for walks: with EPT accessed and dirty flags that would be a violation each time.
        """
        if not leaf or leaf == MISCONFIGURED:
            return False
        if self._writer is not NO_WRITER and self._view.forbids(gpa, W if access == WRITE else self.needed):
            return False
        return self._writer is not None or (access == READ and bool(leaf & R) and self._frames.at(leaf).readable)


class _NoWriter:
    """For walks that set no flags."""

    def write(self, pieces: list[tuple[int, int, bytes]], *, cause: str, mmu: Mmu | None) -> None:
        raise AssertionError(pieces, cause, mmu)


NO_WRITER: Final = _NoWriter()
