"""Which linear addresses reach a frame, as far as a vCPU has been there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vmm.memory.frames import Frame, Frames
    from vmm.mmu.translation import Mmu


class Aliases:
    """The aliases of frames in the address spaces that a vCPU has used.

    In an address space that never changes all of them are known; in any other, those by which the frame was reached.
    """

    def __init__(self, frames: Frames, mmu: Mmu) -> None:
        #: The CR3 of an address space that never changes; None if there is none.
        self.fixed_root: int | None = None
        self._frames: Final = frames
        self._mmu: Final = mmu
        self._fixed: list[tuple[int, int, int]] = []
        self._fixed_pages: Final[dict[int, list[int]]] = {}

    def fix(self, root: int, mappings: list[tuple[int, int, int]]) -> None:
        """The address space of ``root`` consists of these (GVA, GPA, bytes), later ones winning, and never changes."""
        self.fixed_root, self._fixed = root, mappings

    def unfix(self) -> None:
        """That address space is like any other from now on."""
        self.fixed_root = None

    def frames_changed(self) -> None:
        """GPAs lead to other frames now: which linear pages reach a frame has to be found anew."""
        self._fixed_pages.clear()

    def of(self, frame: Frame, offset: int) -> tuple[int, ...]:
        """All linear addresses of the current address space known to reach a byte of a frame, ascending."""
        root = self._mmu.root
        if root == self.fixed_root:
            pages = self._fixed_pages.get(frame.hpa) or self._of_fixed(frame)
            return tuple([page + offset for page in pages])
        candidates = {page for where, page in frame.linear if where == root}
        for gpa in (*frame.gpas, *(gpa for _, gpa in frame.elsewhere)):
            candidates.update(self._frames.in_regions(root, gpa))
        return tuple(sorted(page + offset for page in candidates if self._mmu.peek(page) == frame.hpa))

    def may_execute(self, frame: Frame) -> bool:
        """Whether the page tables of an address space that was seen let a frame be fetched from, as they are now."""
        places = [(self._mmu.space, page) for page in self.of(frame, 0)]
        places += [place for place in self._frames.reached_by(frame) if place[0] != self._mmu.root]
        found = (self._mmu.rights(root, page) for root, page in places)
        return any(host == frame.hpa and executable for host, _, executable in filter(None, found))

    def _of_fixed(self, frame: Frame) -> list[int]:
        """The linear pages of a frame in the constant address space, ascending."""
        pages: set[int] = set()
        for gpa in {*frame.gpas, *(gpa for _, gpa in frame.elsewhere)}:
            candidates = (gva + gpa - start for gva, start, size in self._fixed if start <= gpa < start + size)
            pages.update(page for page in candidates if self._mmu.peek(page) == frame.hpa)
        self._fixed_pages[frame.hpa] = sorted(pages)
        return self._fixed_pages[frame.hpa]
