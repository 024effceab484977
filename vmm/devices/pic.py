"""Two 8259A programmable interrupt controllers, cascaded as in a PC (Intel 8259A data sheet).

::

    IRQ 0  1  (2)  3  4  5  6  7        IRQ 8 … 15
        └──┴───┬───┴──┴──┴──┴──┘             │
            master ◄──────── IR2 ───────── slave
               │
             INTR, to the processor; INTA gives the vector

Ports 0x20 and 0x21 are the master's, 0xA0 and 0xA1 the slave's. All of ICW1 to ICW4 and OCW1 to OCW3 is there, but for
what only an 8080 needs; buffered mode has nothing to buffer. A request that has gone by the time it is acknowledged
gives the spurious vector, that of IR7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import define

MASTER_PORT: Final = 0x20
SLAVE_PORT: Final = 0xA0
_CASCADE: Final = 2
_SPURIOUS: Final = 7

_ICW1: Final = 0x10
_ICW1_NEEDS_ICW4: Final = 0x01
_ICW1_SINGLE: Final = 0x02
_ICW1_LEVEL: Final = 0x08
_ICW4_AUTO_EOI: Final = 0x02
_ICW4_FULLY_NESTED: Final = 0x10
_OCW3: Final = 0x08
_OCW3_READ: Final = 0x02
_OCW3_READ_ISR: Final = 0x01
_OCW3_POLL: Final = 0x04
_OCW3_SPECIAL_MASK: Final = 0x20
_OCW3_SET_SPECIAL_MASK: Final = 0x40
_OCW2_EOI: Final = 0x20
_OCW2_SPECIFIC: Final = 0x40
_OCW2_ROTATE: Final = 0x80


@define(slots=True, eq=False)
class Chip:
    """One 8259A. Levels are 0 to 7; in each register the bit of a level is ``1 << level``."""

    #: Bits 7:3 of the vectors.
    base: int = 0
    #: IMR, IRR and ISR.
    mask: int = 0xFF
    requested: int = 0
    in_service: int = 0
    #: The state of each input.
    inputs: int = 0
    level_triggered: bool = False
    auto_eoi: bool = False
    rotates_on_auto_eoi: bool = False
    special_mask: bool = False
    fully_nested: bool = False
    #: The level of the lowest priority; the next one has the highest.
    lowest: int = 7
    _reads_in_service: bool = False
    _polled: bool = False
    #: Which initialisation command words are still to come.
    _expected: tuple[int, ...] = ()

    def set_input(self, level: int, high: bool) -> None:  # noqa: FBT001 - a line is high or low
        """Drive an input. An edge makes a request that lasts while the input stays high."""
        bit = 1 << level
        rises = high and not self.inputs & bit
        self.inputs = self.inputs | bit if high else self.inputs & ~bit
        if rises:
            self.requested |= bit
        elif not high:
            self.requested &= ~bit

    @property
    def interrupting(self) -> int | None:
        """The level that the chip interrupts for, None if for none."""
        level = self._first(self.requested & ~self.mask)
        if level is None:
            return None
        serviced = self.in_service
        if self.fully_nested:
            serviced &= ~(1 << _CASCADE)
        if self.special_mask:
            serviced &= ~self.mask
            return None if serviced & 1 << level else level
        busy = self._first(serviced)
        return level if busy is None or self._rank(level) < self._rank(busy) else None

    def acknowledge(self) -> int:
        """INTA: the vector; its level is now in service."""
        level = self.interrupting
        return self.base | (_SPURIOUS if level is None else self._serve(level))

    def _serve(self, level: int) -> int:
        bit = 1 << level
        if not (self.level_triggered and self.inputs & bit):
            self.requested &= ~bit
        if not self.auto_eoi:
            self.in_service |= bit
        elif self.rotates_on_auto_eoi:
            self.lowest = level
        return level

    def _rank(self, level: int) -> int:
        """Priority, 0 the highest."""
        return level - self.lowest - 1 & 7

    def _first(self, bits: int) -> int | None:
        levels = [level for level in range(8) if bits >> level & 1]
        return min(levels, key=self._rank, default=None)

    # Registers: offset 0 is the port with A0 = 0

    def read_register(self, offset: int) -> int:
        """IN."""
        if self._polled:
            self._polled = False
            level = self.interrupting
            return 0 if level is None else 0x80 | self._serve(level)
        if offset:
            return self.mask
        return self.in_service if self._reads_in_service else self.requested

    def write_register(self, offset: int, value: int) -> None:
        """OUT."""
        if not offset and value & _ICW1:
            self._initialise(value)
        elif not offset and value & _OCW3:
            self._command_word_3(value)
        elif not offset:
            self._command_word_2(value)
        elif self._expected:
            self._initialisation_word(value)
        else:
            self.mask = value

    def _initialise(self, value: int) -> None:
        self.level_triggered = bool(value & _ICW1_LEVEL)
        cascaded = () if value & _ICW1_SINGLE else (3,)
        self._expected = (2, *cascaded, 4) if value & _ICW1_NEEDS_ICW4 else (2, *cascaded)
        self.mask = self.in_service = 0
        self.requested = self.inputs if self.level_triggered else 0
        self.lowest = 7
        self.auto_eoi = self.rotates_on_auto_eoi = self.special_mask = self.fully_nested = False
        self._reads_in_service = self._polled = False

    def _initialisation_word(self, value: int) -> None:
        word, *rest = self._expected
        self._expected = tuple(rest)
        if word == 2:
            self.base = value & 0xF8
        elif word == 4:
            self.auto_eoi = bool(value & _ICW4_AUTO_EOI)
            self.fully_nested = bool(value & _ICW4_FULLY_NESTED)

    def _command_word_2(self, value: int) -> None:
        rotate, specific = bool(value & _OCW2_ROTATE), bool(value & _OCW2_SPECIFIC)
        if not value & _OCW2_EOI:
            if specific and rotate:
                self.lowest = value & 7
            elif not specific:
                self.rotates_on_auto_eoi = rotate
            return
        served = self.in_service & ~self.mask if self.special_mask else self.in_service
        level = value & 7 if specific else self._first(served)
        if level is not None:
            self.in_service &= ~(1 << level)
            if rotate:
                self.lowest = level

    def _command_word_3(self, value: int) -> None:
        self._polled = bool(value & _OCW3_POLL)
        if value & _OCW3_READ:
            self._reads_in_service = bool(value & _OCW3_READ_ISR)
        if value & _OCW3_SET_SPECIAL_MASK:
            self.special_mask = bool(value & _OCW3_SPECIAL_MASK)


class InterruptController:
    """Master and slave. ``drive`` drives INTR: it is called whenever that changes."""

    def __init__(self, drive: Callable[[bool], None]) -> None:
        self.master: Final = Chip()
        self.slave: Final = Chip()
        self._drive = drive
        self._was_asserted = False

    @property
    def asserted(self) -> bool:
        """INTR: whether the processor is asked for an interrupt."""
        return self._was_asserted

    def acknowledge(self) -> int:
        """The processor takes the interrupt: its vector, 0 to 255."""
        level = self.master.interrupting
        vector = self.master.acknowledge()
        if level == _CASCADE:
            vector = self.slave.acknowledge()
        self._settle()
        return vector

    def line(self, number: int) -> Callable[[bool], None]:
        """What drives the input of an interrupt request, IRQ 0 to 15 but not 2."""
        chip, level = (self.slave, number - 8) if number >= 8 else (self.master, number)

        def drive(high: bool) -> None:  # noqa: FBT001 - a line is high or low
            chip.set_input(level, high)
            self._settle()

        return drive

    def registers(self, chip: Chip) -> ChipRegisters:
        """The registers of one of the two chips, for the port bus."""
        return ChipRegisters(chip, self._settle)

    def _settle(self) -> None:
        self.master.set_input(_CASCADE, self.slave.interrupting is not None)
        asserted = self.master.interrupting is not None
        if asserted is not self._was_asserted:
            self._was_asserted = asserted
            self._drive(asserted)


@define(slots=True, eq=False)
class ChipRegisters:
    """One chip's registers, after each access of which the pair settles."""

    _chip: Chip
    _settle: Callable[[], None]

    def read_register(self, offset: int) -> int:
        """IN."""
        value = self._chip.read_register(offset)
        self._settle()
        return value

    def write_register(self, offset: int, value: int) -> None:
        """OUT."""
        self._chip.write_register(offset, value)
        self._settle()
