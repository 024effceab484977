"""A second copy of all code, which changes only by what the journal says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmm.exits import EptViolation, Exit, Mtf
from vmm.machine import Machine
from vmm.memory import PAGE
from vmm.memory.frames import Frame, FrameState
from vmm.records import FrameEvent, Modification, Record

#: States of frames that hold what may be executed, now or when the instruction that is being stepped is complete.
_TEXT = (FrameState.CODE, FrameState.SEALED)


class Shadow:
    """Copies each frame when it becomes code for the first time; from then on modifications change it, nothing else.

    A frame with an open window is no text: nothing of it can be executed. Its shadow stays what it was when the window
    was opened, or last journaled by ``Machine.journal_windows``.
    """

    def __init__(self, machine: Machine) -> None:
        #: By host page.
        self.pages: dict[int, bytearray] = {}
        #: Modifications whose old bytes were not the shadow's.
        self.surprises: list[Modification] = []
        self._machine = machine
        for frame in machine.frames:
            if frame.state in _TEXT:
                self._copy(frame.hpa)
        machine.observe(self._hear)

    def _hear(self, record: Record) -> None:
        if isinstance(record, FrameEvent) and record.before == "data":
            self._copy(self._host(record.gpa))
        elif isinstance(record, Modification):
            for index, page, offset in self._places(record):
                if page[offset] != record.old[index] and record not in self.surprises[-1:]:
                    self.surprises.append(record)
                page[offset] = record.new[index]

    def differences(self) -> list[str]:
        """The frames whose shadow is not what they hold, or held when their window was opened."""
        return [
            f"{frame.state.value} {frame.hpa:#x}"
            for frame, page in self._frames()
            if (frame.lasting is FrameState.WINDOW and page != frame.before)
            or (frame.lasting in _TEXT and page != self._real(frame))
        ]

    def differences_anywhere(self) -> list[str]:
        """As ``differences``, with windows compared with memory; right after ``journal_windows`` there are none."""
        windows = [
            f"{frame.state.value} {frame.hpa:#x}"
            for frame, page in self._frames()
            if frame.lasting is FrameState.WINDOW and page != self._real(frame)
        ]
        return windows + self.differences()

    def _frames(self) -> Iterator[tuple[Frame, bytearray]]:
        return ((self._machine.frames.at(hpa), page) for hpa, page in self.pages.items())

    def _real(self, frame: Frame) -> bytes:
        return self._machine.memory.read(frame.hpa, PAGE)

    def _places(self, record: Modification) -> Iterator[tuple[int, bytearray, int]]:
        """Where in the shadow each byte of a modification is; nowhere where a store leaves the code frame."""
        for index in range(len(record.new)):
            gpa = record.gpa + index
            page = self.pages.get(self._host(gpa))
            if page is not None:
                yield index, page, gpa % PAGE

    def _copy(self, hpa: int) -> None:
        self.pages[hpa] = bytearray(self._machine.memory.read(hpa, PAGE))

    def _host(self, gpa: int) -> int:
        page = self._machine.ept.host_page(gpa)
        assert page is not None
        return page


def at_pauses(machine: Machine, look: Callable[[int], None], *, acts: bool = True) -> None:
    """Have ``look`` called at each exit at which the guest stands at a boundary, with how many there have been.

    With ``acts`` it may do more than look. The MTF exit right behind an EPT violation is no such place: what the
    trapped instruction has changed comes on record next.
    """
    pauses, before = 0, None

    def hear(record: Record) -> None:
        nonlocal pauses, before
        trapped = isinstance(record, Mtf) and isinstance(before, EptViolation)
        if isinstance(record, Exit) and not trapped:
            pauses += 1
            look(pauses)
        before = record

    machine.observe(hear, acts=acts)
