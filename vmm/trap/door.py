"""The one door through which bytes of a code frame change.

Guest stores, host writes, event delivery, page-walk updates, snapshots, remaps: whatever changed, it comes
through here, so that exactly the translations of the changed bytes die and every change is on record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from attrs import define

from vmm.coherence import Sanitizer
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frame, Frames, FrameState
from vmm.mmu import Mmu
from vmm.records import Modification
from vmm.reporter import Reporter
from vmm.translation import Block, BlockCache
from vmm.translation.cache import by_number

_OFFSET: Final = PAGE - 1
_DIFFERING: Final = re.compile(rb"[^\0]+", re.DOTALL).finditer

#: Bytes to put somewhere: (HPA, GPA, bytes), within one frame.
Piece = tuple[int, int, bytes]


@define(slots=True, eq=False)
class Change:
    """Bytes that were replaced: where, by which linear address (None: not by one), and what they were."""

    hpa: int
    gpa: int
    gva: int | None
    old: bytes
    new: bytes


class SealedFrame(Exception):  # noqa: N818 - says what is in the way
    """A write would have changed a byte of a sealed frame; nothing was written. ``gpa`` is its first byte there."""

    def __init__(self, gpa: int) -> None:
        super().__init__(gpa)
        self.gpa = gpa


class HiddenCode(Protocol):
    """Fetch sides of frames that have something else on them than the frames (``vmm.monitors.hidden``)."""

    def follow(self, hpa: int, size: int, cause: str) -> list[Block]:
        """Bytes of code frames have changed; the blocks that died because they are executed."""

    def moved(self, frame: Frame, cause: str) -> None:
        """A frame has come into another state."""


class Tables(Protocol):
    """Paging structures in use whose changes count (``vmm.tlb``)."""

    def snapshot(self, hpas: Iterable[int]) -> dict[int, bytes]:
        """The frames with entries in use among these pages, as they are."""

    def written(self, before: Mapping[int, bytes], rip: int | None) -> None:
        """The instruction at ``rip``, or the host, may have written to these frames, which held ``before``."""


#: A change with the number of its instruction and the blocks that died of it.
Entry = tuple[int, Change, list[Block]]


class Door:
    """Journals changes of code bytes and invalidates what was translated from them."""

    def __init__(
        self,
        memory: GuestMemory,
        frames: Frames,
        blocks: BlockCache,
        reporter: Reporter,
    ) -> None:
        #: Hears of every write before and after it; None where nobody has to.
        self.sanitizer: Sanitizer | None = None
        #: What is executed of frames with hidden patches; None where there is none.
        self.hidden: HiddenCode | None = None
        #: Under strict staleness hears of what is written to paging structures in use; None without it.
        self.tables: Tables | None = None
        #: Number of the last instruction (or host operation) that changed code bytes.
        self.instruction = 0
        #: Modifications so far.
        self.modifications = 0
        #: Told of each code frame that ``write`` has written to.
        self.written: Callable[[Frame, str], None] | None = None
        self._memory = memory
        self._frames = frames
        self._blocks = blocks
        self._reporter = reporter

    def is_guarded(self, hpa: int, size: int) -> bool:
        """Whether any frame of [hpa, hpa + size) holds code."""
        first, last = hpa & -PAGE, hpa + size - 1 & -PAGE
        return any(
            self._frames.at(page).state not in (FrameState.DATA, FrameState.WINDOW)
            for page in range(first, last + 1, PAGE)
        )

    def record(self, changes: list[Change], *, rip: int | None, cause: str, mmu: Mmu | None) -> None:
        """Journal changes that have just been made by one instruction or one host operation."""
        self.publish(self.commit(changes, cause, rip), rip=rip, cause=cause, mmu=mmu)

    def commit(self, changes: list[Change], cause: str, rip: int | None) -> list[Entry]:
        """Drop what was translated from the changed bytes: before anybody hears of the changes."""
        if not changes:
            return []
        self.instruction += 1
        self.modifications += len(changes)
        if self.sanitizer is not None and cause != "window":
            for change in changes:
                vcpu = self._reporter.vcpu or 0
                self.sanitizer.written(change.hpa, len(change.new), rip, vcpu, self.instruction)
        return [(self.instruction, change, self.invalidate(change, cause)) for change in changes]

    def publish(
        self,
        entries: list[Entry],
        *,
        rip: int | None,
        cause: str,
        mmu: Mmu | None,
        callers: tuple[int, ...] | None = None,
    ) -> None:
        """Show committed changes to whoever watches."""
        if not self._reporter.observed:
            return
        # A window has hundreds of changes at times, all of one frame.
        pages: dict[int, tuple[int, ...]] = {}
        for number, change, dead in entries:
            page = change.hpa & -PAGE
            if page not in pages:
                pages[page] = () if mmu is None else mmu.aliases.of(self._frames.at(page), 0)
            aliases = tuple([linear + (change.hpa & _OFFSET) for linear in pages[page]])
            self._reporter.emit(_modification(number, change, dead, rip, cause, aliases, callers))

    def invalidate(self, change: Change, cause: str) -> list[Block]:
        """Drop the blocks that overlap bytes which really changed; identical bytes kill nothing."""
        dead = self._invalidate(change, cause)
        if self.hidden is not None:
            return sorted(dead + self.hidden.follow(change.hpa, len(change.new), cause), key=by_number)
        return dead

    def _invalidate(self, change: Change, cause: str) -> list[Block]:
        runs = changed_runs(change.old, change.new)
        if len(runs) == 1:
            start, size = runs[0]
            return self._blocks.invalidate(change.hpa + start, size, cause)
        dead: list[Block] = []
        for start, size in runs:
            dead += self._blocks.invalidate(change.hpa + start, size, cause)
        return sorted(dead, key=by_number)

    def write(self, pieces: list[Piece], *, cause: str, mmu: Mmu | None) -> None:
        """Change guest memory from outside of the guest's instructions, as one operation.

        Each piece is (HPA, GPA, bytes) within one frame. ``mmu`` is the address space that aliases are told of.
        Raises ``SealedFrame``, with nothing written. What a page walk writes is flags, which change no translation.
        """
        for hpa, gpa, data in pieces:
            if data and self._frames.at(hpa).state is FrameState.SEALED:
                raise SealedFrame(gpa)
        tables = None if cause == "page walk" else self.tables
        before = {} if tables is None else tables.snapshot(hpa for hpa, _, _ in pieces)
        changes = []
        for hpa, gpa, data in pieces:
            if self.sanitizer is not None:
                self.sanitizer.before_write(hpa, None, self._reporter.vcpu or 0)
            old = self._memory.read(hpa, len(data))
            self._memory.write(hpa, data)
            if self.is_guarded(hpa, 1):
                changes.append(Change(hpa, gpa, None, old, data))
        entries = self.commit(changes, cause, None)
        if self.written is not None:
            for change in changes:
                self.written(self._frames.at(change.hpa), cause)
        self.publish(entries, rip=None, cause=cause, mmu=mmu)
        if tables is not None:
            tables.written(before, None if mmu is None or cause == "host" else mmu.pc)

    def journal_window(self, frame: Frame, mmu: Mmu | None) -> None:
        """Journal what has changed in a frame since it became a window, or since ``journal_windows``."""
        before, after = frame.before, self._memory.read(frame.hpa, PAGE)
        frame.before = after if frame.lasting is FrameState.WINDOW else b""
        hpa, gpa = frame.hpa, frame.gpas[0]
        changes = [
            Change(hpa + start, gpa + start, None, before[start : start + size], after[start : start + size])
            for start, size in changed_runs(before, after)
        ]
        self.record(changes, rip=None, cause="window", mmu=mmu)

    def journal_windows(self, mmu: Mmu | None) -> None:
        """Journal what has changed in the frames that are windows; they stay windows."""
        for frame in [frame for frame in self._frames if frame.lasting is FrameState.WINDOW]:
            self.journal_window(frame, mmu)


def _modification(
    number: int,
    change: Change,
    dead: list[Block],
    rip: int | None,
    cause: str,
    aliases: tuple[int, ...],
    callers: tuple[int, ...] | None,
) -> Modification:
    return Modification(
        gpa=change.gpa,
        gva=change.gva,
        rip=rip,
        old=change.old,
        new=change.new,
        cause=cause,
        instruction=number,
        aliases=aliases,
        blocks=tuple([block.number for block in dead]),
        callers=callers,
    )


def changed_runs(old: bytes, new: bytes) -> list[tuple[int, int]]:
    """(start, size) of each run of bytes that differ, in two strings of the same length."""
    difference = int.from_bytes(old, "little") ^ int.from_bytes(new, "little")
    if not difference:
        return []
    return [(run.start(), len(run[0])) for run in _DIFFERING(difference.to_bytes(len(old), "little"))]
