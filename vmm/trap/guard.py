"""The trap cycle: flip, exactly one instruction, record, drop what is stale, restore.

One instruction may need several frames: a store that straddles two, a move from code to code. Each refusal opens
one more and starts the instruction anew; nothing of it has happened before, so that it executes once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from attrs import define, field

from vmm.cpu.context import Context
from vmm.cpu.engine import DEVICES_BASE, READ, Stop
from vmm.cpu.events import Event, Vector
from vmm.ept import Permission
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frame, Frames, FrameState
from vmm.trap.callers import Callers
from vmm.trap.door import Change, Door, Entry
from vmm.trap.frames import RW, FrameControl
from vmm.vcpu import VirtualCpu

_OFFSET: Final = PAGE - 1


@define(slots=True)
class _Piece:
    """One run of written bytes within one frame."""

    hpa: int
    gpa: int
    gva: int
    size: int


@define(slots=True)
class StepGuard:
    """One instruction of one vCPU on its stepping engine, with the frames it may touch opened one by one."""

    memory: GuestMemory
    frames: Frames
    control: FrameControl
    door: Door
    vcpu: VirtualCpu
    opened: list[Frame] = field(factory=list)
    #: Whether a frame was opened for an access that had a VM exit.
    exited: bool = False
    #: Finds out who called the function that stores; None where nobody wants to know.
    callers: Callers | None = None
    _pc: int = 0
    _called_by: tuple[int, ...] | None = None

    @property
    def start(self) -> int:
        """The linear address of the instruction."""
        return self._pc

    def begin(self, *, arrived: bool) -> None:
        """Start with an instruction; no frame is open. ``arrived`` is as for ``Mmu.begin_step``."""
        self.opened.clear()
        self.exited = False
        self.vcpu.step_memory.begin(arrived=arrived)
        self._pc = self.vcpu.context.pc

    def open(self, frame: Frame, access: int, *, exited: bool = True) -> None:
        """Open a frame: R-- for a read, RW- for a write; never executable."""
        self.exited |= exited
        wanted = Permission.R if access == READ else RW
        self.control.open(frame, wanted)
        if frame not in self.opened:
            self.opened.append(frame)

    def attempt(self) -> Stop:
        """Execute the instruction. If something is refused or faults, nothing of it is left in memory."""
        try:
            stop = self.vcpu.step()
        except BaseException:
            self._undo()
            raise
        stop = self._without_look_ahead(stop, self.vcpu.context)
        if stop is not Stop.STEPPED and self.vcpu.step_memory.undo and not self.is_complete(stop):
            self._undo()
        return stop

    @contextmanager
    def rehearsal(self) -> Iterator[tuple[Stop, bool]]:
        """Execute the instruction for its accesses only: how it stops, and whether it completes but for an IN or OUT.

        Within ``with``, memory and ``vcpu.stepping`` show what it does; behind it nothing of it has happened.
        """
        try:
            stop, context = self.vcpu.stepping.rehearse(self.vcpu.context)
            stop = self._without_look_ahead(stop, context)
            yield stop, stop is Stop.EXACT or self.is_complete(stop, context)
        finally:
            self._undo()

    def _without_look_ahead(self, stop: Stop, context: Context) -> Stop:
        """Quirk "step-looks-ahead": after a branch the engine looks for the next block before it counts."""
        return Stop.STEPPED if stop is Stop.REFUSED and context.pc != self._pc else stop

    def _undo(self) -> None:
        self.vcpu.step_memory.roll_back()
        self.vcpu.stepping.writes.clear()

    def is_complete(self, stop: Stop, context: Context | None = None) -> bool:
        """Whether the instruction has executed; an exception may come after it (#DB by TF, INT n) or instead of it.

        RIP does not tell after an iteration of REP, and for a jump to itself.
        """
        context = context or self.vcpu.context
        after = context.pc != self._pc or context.vector == Vector.DB
        return stop is Stop.STEPPED or (stop is Stop.INTERRUPT and after)

    def trapped(self, outcome: Stop | Event | None) -> bool:
        """Whether the instruction completed and ends in a debug trap, before which an MTF exit comes."""
        context = self.vcpu.context
        return outcome is Stop.INTERRUPT and context.vector == Vector.DB and not context.by_instruction

    def close(self) -> list[Entry]:
        """Restore execute-only and drop what is stale; what the instruction changed in code frames, for ``publish``."""
        self.vcpu.step_memory.end()
        changes = self._changes() if self.opened and self.vcpu.step_memory.undo else []
        if self.callers is not None and changes:
            self._called_by = self.callers.find(self._pc)
        for frame in self.opened:
            self.control.close(frame)
        return self.door.commit(changes, "store", self._pc)

    def publish(self, entries: list[Entry]) -> None:
        """Put on record what ``close`` gave."""
        self.door.publish(entries, rip=self._pc, cause="store", mmu=self.vcpu.mmu, callers=self._called_by)

    def _changes(self) -> list[Change]:
        """One change a contiguous run of written guest-physical bytes that touches a code frame.

        What lies in a window is not part of it: that is in the window's difference, when it closes.
        """
        pieces = self._pieces()
        if len(pieces) == 1:
            return [self._change(pieces)] if self._is_code(pieces[0].hpa) else []
        pieces = [piece for piece in pieces if self.frames.at(piece.hpa).state is not FrameState.WINDOW]
        runs: list[list[_Piece]] = []
        for piece in pieces:
            last = runs[-1][-1] if runs else None
            if last is not None and (last.gpa + last.size, last.hpa + last.size) == (piece.gpa, piece.hpa):
                runs[-1].append(piece)
            else:
                runs.append([piece])
        return [self._change(run) for run in runs if any(self._is_code(piece.hpa) for piece in run)]

    def _is_code(self, hpa: int) -> bool:
        page = hpa & -PAGE
        for frame in self.opened:
            if frame.hpa == page:
                return frame.resting is not FrameState.DATA and frame.resting is not FrameState.WINDOW
        return False

    def _change(self, run: list[_Piece]) -> Change:
        old = b"".join([self._before(piece) for piece in run])
        new = b"".join([self.memory.read(piece.hpa, piece.size) for piece in run])
        first = run[0]
        return Change(first.hpa, first.gpa, first.gva, old, new)

    def _before(self, piece: _Piece) -> bytes:
        start = piece.hpa & _OFFSET
        return self.vcpu.step_memory.undo[piece.hpa & -PAGE][start : start + piece.size]

    def _pieces(self) -> list[_Piece]:
        """What was written of memory, split at page ends, merged where it overlaps or touches, by ascending GPA."""
        pieces: list[_Piece] = []
        for hpa, size in self.vcpu.stepping.writes:
            page = self._linear_page(hpa, size)
            room = PAGE - (hpa & _OFFSET)
            gpa_page, _ = self.vcpu.step_memory.written[page]
            offset = hpa & _OFFSET
            if hpa < DEVICES_BASE:
                pieces.append(_Piece(hpa, gpa_page | offset, page | offset, min(size, room)))
            if size > room:
                next_page = page + PAGE & 0xFFFF_FFFF_FFFF_FFFF
                gpa_page, hpa_page = self.vcpu.step_memory.written[next_page]
                if hpa_page < DEVICES_BASE:
                    pieces.append(_Piece(hpa_page, gpa_page, next_page, size - room))
        return _merge(pieces) if len(pieces) > 1 else pieces

    def _linear_page(self, hpa: int, size: int) -> int:
        """The linear page that a store used; with two candidates, the one whose next page was written too."""
        frame = hpa & -PAGE
        written = self.vcpu.step_memory.written
        if len(written) == 1:
            return next(iter(written))
        candidates = [page for page, (_, host) in written.items() if host == frame]
        if len(candidates) > 1 and size > PAGE - (hpa & _OFFSET):
            straddling = [page for page in candidates if page + PAGE in written]
            candidates = straddling or candidates
        return candidates[0]


def _merge(pieces: list[_Piece]) -> list[_Piece]:
    merged: list[_Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.gpa, p.size)):
        last = merged[-1] if merged else None
        same_frame = last is not None and last.hpa & -PAGE == piece.hpa & -PAGE
        if last is not None and same_frame and piece.gpa <= last.gpa + last.size:
            last.size = max(last.size, piece.gpa + piece.size - last.gpa)
        else:
            merged.append(piece)
    return merged
