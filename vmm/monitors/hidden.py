"""Bytes that are executed and never read: the fetch side of a frame with something else on it.

Fetches of a frame with a hidden patch go to a page of the VMM's own, a *split* page: what the frame holds, with the
patches on top. Loads and stores reach the frame. When the frame changes, its split page follows, but for the patches.
What is translated from a split page is in the block cache by that page's address, so the auditor's rule holds as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import define, field

from vmm.errors import OptionError
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frame, Frames, FrameState
from vmm.translation import Block, BlockCache
from vmm.trap.door import changed_runs

_OFFSET: Final = PAGE - 1
_WRITABLE: Final = (FrameState.DATA, FrameState.WINDOW)
_CAUSE: Final = "hidden patch"

#: Bytes of a patch on one frame: (HPA, bytes).
Piece = tuple[int, bytes]


@define(slots=True, eq=False)
class HiddenPatch:
    """A handle for bytes that are executed in place of the guest's (see ``Machine.patch_hidden``)."""

    gpa: int
    data: bytes
    pieces: tuple[Piece, ...] = field(repr=False)
    #: Where it stands among all hidden patches of the machine, from 0.
    number: int
    #: False once it has been removed.
    active: bool = True
    _forget: Callable[[HiddenPatch], None] = field(kw_only=True, repr=False, alias="forget")

    def remove(self) -> None:
        """Have the guest's own bytes executed again, as they are by now. Removing it again does nothing."""
        if self.active:
            self._forget(self)


class HiddenPatches:
    """All hidden patches of a machine with a coherent fetch side. Implements ``vmm.mmu.FetchSide`` for its vCPUs.

    ``flush`` makes every engine forget its address translations; ``forget_fetches`` makes the VMM forget where fetches
    went.
    """

    def __init__(
        self,
        memory: GuestMemory,
        frames: Frames,
        blocks: BlockCache,
        flush: Callable[[], None],
        forget_fetches: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._frames = frames
        self._blocks = blocks
        self._flush = flush
        self._forget_fetches = forget_fetches
        self._pieces: dict[int, list[tuple[HiddenPatch, Piece]]] = {}
        self._split: dict[int, int] = {}

    # What the MMU asks

    def host(self, hpa: int) -> int:
        """Where what lies at an HPA is fetched."""
        split = self._split.get(hpa & -PAGE)
        if split is None:
            return hpa
        if self._frames.at(hpa).state in _WRITABLE:
            self._refresh(hpa & -PAGE, _CAUSE)
        return split | hpa & _OFFSET

    def may_be_written(self, _hpa: int) -> bool:
        """A store needs no attention: code frames are not written unseen, and others are looked at when they are."""
        return True

    def before_write(self, _hpa: int, _rip: int | None) -> None:
        """Nothing has to be kept."""

    # What the trap tells

    def follow(self, hpa: int, size: int, cause: str) -> list[Block]:
        """Bytes of code frames have changed; the blocks that died because they are executed."""
        dead: list[Block] = []
        for page in range(hpa & -PAGE, hpa + size, PAGE):
            if page in self._split:
                dead += self._refresh(page, cause)
        return dead

    def moved(self, frame: Frame, cause: str) -> None:
        """A frame has come into another state."""
        split = self._split.get(frame.hpa)
        if split is None:
            return
        if frame.state in _WRITABLE:
            self._blocks.invalidate(split, PAGE, cause)
        else:
            self._refresh(frame.hpa, cause)

    # What the host does

    def require_room(self, patch: HiddenPatch) -> None:
        """Raise ``OptionError`` if there is no room for a patch."""
        new = {hpa & -PAGE for hpa, _ in patch.pieces} - self._split.keys()
        if len(new) > self._memory.spare_pages:
            what = f"no room for {len(new)} more frames with hidden patches"
            raise OptionError(what, where="patch_hidden", fix="remove one first: 64 frames can have them at a time")

    def add(self, patch: HiddenPatch) -> None:
        """Execute a patch from now on, on top of those before it."""
        pages = [hpa & -PAGE for hpa, _ in patch.pieces]
        for page in dict.fromkeys(page for page in pages if page not in self._split):
            self._split[page] = self._memory.take_spare(page)
            self._memory.write(self._split[page], self._memory.read(page, PAGE))
            self._blocks.evict(page, PAGE, _CAUSE)
        for page, piece in zip(pages, patch.pieces, strict=True):
            self._pieces.setdefault(page, []).append((patch, piece))
        self._changed(pages)

    def remove(self, patch: HiddenPatch) -> None:
        """Execute a patch no longer."""
        pages = [hpa & -PAGE for hpa, _ in patch.pieces]
        for page in pages:
            self._pieces[page] = [(other, piece) for other, piece in self._pieces[page] if other is not patch]
            if not self._pieces[page]:
                del self._pieces[page]
                split = self._split.pop(page)
                self._blocks.evict(split, PAGE, _CAUSE)
                self._memory.give_back(split)
        self._changed([page for page in pages if page in self._split])

    def _changed(self, pages: list[int]) -> None:
        for page in pages:
            self._refresh(page, _CAUSE)
        self._forget_fetches()
        self._flush()

    def _refresh(self, page: int, cause: str) -> list[Block]:
        """Bring a split page up to date; the blocks that died of what changed in it."""
        split = self._split[page]
        wanted = bytearray(self._memory.read(page, PAGE))
        for _, (hpa, data) in self._pieces[page]:
            wanted[hpa & _OFFSET : (hpa & _OFFSET) + len(data)] = data
        dead: list[Block] = []
        for start, size in changed_runs(self._memory.read(split, PAGE), bytes(wanted)):
            self._memory.write(split + start, bytes(wanted[start : start + size]))
            dead += self._blocks.invalidate(split + start, size, cause)
        return dead
