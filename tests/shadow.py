"""A second copy of all code, which changes only by what the journal says."""

from __future__ import annotations

from vmm.exits import FrameEvent, Modification, Record
from vmm.machine import Machine
from vmm.memory import PAGE
from vmm.memory.frames import FrameState


class Shadow:
    """Copies each frame when it becomes code for the first time; from then on modifications change it, nothing else."""

    def __init__(self, machine: Machine) -> None:
        self.pages: dict[int, bytearray] = {}
        #: Modifications whose old bytes were not the shadow's.
        self.surprises: list[Modification] = []
        self._machine = machine
        for frame in machine.frames:
            if frame.state is FrameState.CODE:
                self.pages[frame.gpas[0]] = bytearray(machine.read(frame.gpas[0], PAGE))
        machine.observe(self._hear)

    def _hear(self, record: Record) -> None:
        if isinstance(record, FrameEvent) and record.before == "data":
            self.pages[record.gpa] = bytearray(self._machine.read(record.gpa, PAGE))
        elif isinstance(record, Modification):
            if any(before != byte for before, byte in zip(self._shadows_of(record), record.old, strict=True)):
                self.surprises.append(record)
            for index, byte in enumerate(record.new):
                if (page := self._page(record.gpa + index)) is not None:
                    page[(record.gpa + index) % PAGE] = byte

    def differences(self) -> list[int]:
        """The frames whose shadow is not what memory holds; those with an open window have not been journaled yet."""
        return [
            gpa
            for gpa, page in self.pages.items()
            if self._machine.frames.at(gpa).state is FrameState.CODE and page != self._machine.read(gpa, PAGE)
        ]

    def _shadows_of(self, record: Modification) -> list[int]:
        """What the shadow has where a modification is; of a store over the end of a code frame the rest is believed."""
        pages = [self._page(record.gpa + index) for index in range(len(record.old))]
        return [
            record.old[index] if page is None else page[(record.gpa + index) % PAGE]
            for index, page in enumerate(pages)
        ]

    def _page(self, gpa: int) -> bytearray | None:
        return self.pages.get(gpa & -PAGE)
