"""What each vCPU may still fetch of a frame that has changed: the two sides of a frame.

A frame's *data side* is its page of memory; loads and stores reach it. Its *fetch side* is the same page, until the
frame is about to change under a weaker coherence model: then the page is copied to the vCPU's *twin* of memory
(``GuestMemory.twin``), and fetches go there until the vCPU has synchronised. Twins are executed from and never
writable, so the rules of the trap hold as they are.

A frame is copied before it may be written: at the first writable fill since the last synchronisation, or when the VMM
itself writes. From synchronisation on no engine holds a writable translation of a frame that has not been copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from attrs import define, field, frozen

from vmm.coherence.model import LINE
from vmm.memory import PAGE, GuestMemory
from vmm.translation import BlockCache

_OFFSET: Final = PAGE - 1
#: Writes that are remembered of one copied frame; beyond that the oldest are forgotten.
_REMEMBERED: Final = 256


@frozen(slots=True)
class Writer:
    """Who changed bytes, and when.

    ``rip`` is the linear address of the instruction (None: the host), ``instruction`` the number of its modification
    record (None: the frame was data at the time, and this is the first store to it since the last synchronisation),
    ``time`` the virtual time in exits.
    """

    rip: int | None
    vcpu: int
    instruction: int | None
    time: int


@define(slots=True, eq=False)
class _Copied:
    """A frame whose fetch side is a copy; ``first`` opened it for writing, ``writes`` are (start, end, writer)."""

    first: Writer
    writes: list[tuple[int, int, Writer]] = field(factory=list)


class FetchSides:
    """The fetch sides of all vCPUs.

    ``flush`` makes every engine forget its address translations; ``forget_fetches`` makes the VMM forget where
    fetches went.
    """

    def __init__(
        self,
        count: int,
        memory: GuestMemory,
        blocks: BlockCache,
        flush: Callable[[], None],
        forget_fetches: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._blocks = blocks
        self._flush = flush
        self._forget_fetches = forget_fetches
        self._sides: list[dict[int, _Copied]] = [{} for _ in range(count)]

    def of(self, vcpu: int, hpa: int) -> int:
        """Where a vCPU fetches what lies at an HPA of the data side."""
        return self._memory.twin(hpa, vcpu) if hpa & -PAGE in self._sides[vcpu] else hpa

    def may_be_written(self, hpa: int) -> bool:
        """Whether the frame has been copied for every vCPU, so that a store to it needs no attention."""
        return all(hpa & -PAGE in side for side in self._sides)

    def copy(self, hpa: int, writer: Writer, *, is_code: bool) -> None:
        """The frame is about to change: keep it as it is for the fetch side of each vCPU that has not got it yet.

        Engines may hold an executable translation of it only if it ``is_code``. If it is not, one of them may be in
        the middle of a store, and keeps its translations.
        """
        page = hpa & -PAGE
        copied = False
        for number, side in enumerate(self._sides):
            if page not in side:
                side[page] = _Copied(writer)
                self._memory.write(self._memory.twin(page, number), self._memory.read(page, PAGE))
                copied = True
        if copied:
            self._forget_fetches()
        if copied and is_code:
            self._flush()

    def note(self, hpa: int, size: int, writer: Writer) -> None:
        """Bytes of a copied frame have changed."""
        for page, start, length in _pieces(hpa, size):
            for side in self._sides:
                copied = side.get(page)
                if copied is not None:
                    del copied.writes[: len(copied.writes) + 1 - _REMEMBERED]
                    copied.writes.append((start, start + length, writer))

    def synchronise(self, vcpu: int, cause: str) -> None:
        """From now on a vCPU fetches what memory holds."""
        side = self._sides[vcpu]
        if not side:
            return
        for page in side:
            self._blocks.invalidate(self._memory.twin(page, vcpu), PAGE, cause)
        side.clear()
        self._forget_fetches()
        self._flush()

    def flush_line(self, hpa: int, cause: str) -> None:
        """From now on every vCPU fetches what memory holds in the line of 64 bytes around an HPA."""
        line, page = hpa & -LINE, hpa & -PAGE
        for number, side in enumerate(self._sides):
            if page in side:
                twin = self._memory.twin(line, number)
                self._memory.write(twin, self._memory.read(line, LINE))
                self._blocks.invalidate(twin, LINE, cause)
                self._forget_if_equal(number, page, cause)

    def flush_all(self, cause: str) -> None:
        """From now on every vCPU fetches what memory holds."""
        for number in range(len(self._sides)):
            self.synchronise(number, cause)

    def _forget_if_equal(self, number: int, page: int, cause: str) -> None:
        """A copy that is no different from its frame is none; so the next store to the frame is noticed again."""
        twin = self._memory.twin(page, number)
        if self._memory.read(twin, PAGE) == self._memory.read(page, PAGE):
            del self._sides[number][page]
            self._blocks.invalidate(twin, PAGE, cause)
            self._forget_fetches()
            self._flush()

    def writer_of(self, vcpu: int, hpa: int, size: int) -> Writer | None:
        """Who wrote last to bytes of the data side which the vCPU has not synchronised with."""
        for page, start, length in _pieces(hpa, size):
            copied = self._sides[vcpu].get(page)
            if copied is None:
                continue
            for begin, end, writer in reversed(copied.writes):
                if begin < start + length and start < end:
                    return writer
            return copied.first
        return None


def _pieces(hpa: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(page, offset, bytes) of each page of a range of host memory."""
    while size > 0:
        start = hpa & _OFFSET
        length = min(size, PAGE - start)
        yield hpa & -PAGE, start, length
        hpa, size = hpa + length, size - length
