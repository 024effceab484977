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
            if self._bytes(record.gpa, len(record.old)) != record.old:
                self.surprises.append(record)
            self._change(record.gpa, record.new)

    def differences(self) -> list[int]:
        """The frames whose shadow is not what memory holds; those with an open window have not been journaled yet."""
        return [
            gpa
            for gpa, page in self.pages.items()
            if self._machine.frames.at(gpa).state is FrameState.CODE and page != self._machine.read(gpa, PAGE)
        ]

    def _bytes(self, gpa: int, size: int) -> bytes:
        return b"".join(
            bytes(self._page(where)[where % PAGE : where % PAGE + 1]) for where in range(gpa, gpa + size)
        )

    def _change(self, gpa: int, data: bytes) -> None:
        for index, byte in enumerate(data):
            self._page(gpa + index)[(gpa + index) % PAGE] = byte

    def _page(self, gpa: int) -> bytearray:
        """The shadow of a byte's frame; what a store over the end of a code frame changes in data is not followed."""
        return self.pages.get(gpa & -PAGE) or bytearray(self._machine.read(gpa & -PAGE, PAGE))
