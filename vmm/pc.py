"""A PC's board: the classic devices on their ports and lines, and the virtual time that they know.

::

    PIT counter 0 ── IRQ 0 ─┐
    COM1 ─────────── IRQ 4 ─┼─ 8259A pair, or APICs as well (vmm.pc_interrupts) ── vCPU 0
    RTC ──────────── IRQ 8 ─┤
    ACPI ─────────── IRQ 9 ─┘  on a PC with APICs

Virtual time is a function of what the guest has executed: each VM exit takes 1000 ns, each block that is entered 4 ns,
and while the processor is halted time goes on to the next alarm of a device at once. So a run repeats: the same kernel
with the same input gets the same interrupts at the same instructions. The engine is let run for as many blocks as there
are until the next alarm (``vmm.cpu.countdown``), or, with an interrupt pending that the processor does not take yet,
to the first boundary at which it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from vmm.cpu.countdown import Countdown
from vmm.devices import (
    AcpiPowerManagement,
    ByteWide,
    IntervalTimer,
    KeyboardController,
    MemoryBus,
    PciConfiguration,
    PortBus,
    RealTimeClock,
    SerialPort,
    SystemControlPort,
    acpi_pm,
    keyboard_controller,
    pci,
    pic,
    pit,
    rtc,
    system_control,
    uart,
)
from vmm.devices.virtual_time import Timers
from vmm.inputs import Inputs, Place, Serial
from vmm.instruction_exits import TICKS_PER_EXIT
from vmm.pc_interrupts import PcInterrupts
from vmm.reporter import Reporter

#: Nanoseconds that the execution of a block takes.
TICKS_PER_BLOCK: Final = 4
#: Blocks after which the engine comes out in any case, so that who wants to end the run is heard: some 50 ms.
SLICE: Final = 1 << 21

_TIMER_IRQ, _COM1_IRQ, _CLOCK_IRQ = 0, 4, 8


class Outside(Protocol):
    """Somebody at the console who has a time of his own: the host's, or that of a recording."""

    @property
    def waiting(self) -> bool:
        """Whether something has come from there already."""

    def poll(self) -> bytes:
        """What has come from there since the last call."""

    def sleep(self, nanoseconds: int | None) -> int | None:
        """The processor is halted, and the next alarm is due so much later (None: none is): how long it sleeps.

        No longer than that; less if something comes before. None if nothing ever will.
        """


class Pc:
    """Implements ``vmm.board.Board``.

    With somebody ``outside``, what is typed there comes when it comes, at an instruction boundary, and a halted
    processor waits for as long as its devices say. ``send`` gets what the guest sends over COM1, ``reset`` is called
    when it resets the machine, ``inputs`` is told of what comes from outside. A PC with ``nmi``, which is called for an
    NMI, has APICs, and ACPI to tell of them.
    """

    def __init__(
        self,
        reporter: Reporter,
        countdown: Countdown,
        inputs: Inputs,
        *,
        send: Callable[[bytes], None],
        reset: Callable[[], None],
        nmi: Callable[[], None] | None = None,
    ) -> None:
        self._reporter = reporter
        self._countdown = countdown
        self._skipped = 0
        self.timers: Final = Timers(self.arm)
        self.interrupts: Final = PcInterrupts(self.now, self.timers, countdown.interrupt, nmi)
        self._source: Final = self.interrupts.source
        line = self.interrupts.line
        self.timer: Final = IntervalTimer(self.now, self.timers, line(_TIMER_IRQ))
        self.clock: Final = RealTimeClock(self.now, self.timers, line(_CLOCK_IRQ))
        self.com1: Final = SerialPort(send, line(_COM1_IRQ))
        self.power: Final = None if nmi is None else AcpiPowerManagement(self.now, self.timers, line(acpi_pm.IRQ))
        self._reset = reset
        self._inputs = inputs
        inputs.clock = self.now
        self.outside: Outside | None = None

    def attach(self, bus: PortBus) -> None:
        """Put all devices on their ports."""
        controller = self.interrupts.controller
        for registers, first, count in (
            (controller.registers(controller.master), pic.MASTER_PORT, 2),
            (controller.registers(controller.slave), pic.SLAVE_PORT, 2),
            (self.timer, pit.FIRST_PORT, 4),
            (SystemControlPort(self.now, self.timer), system_control.PORT, 1),
            (self.clock, rtc.FIRST_PORT, 2),
            (self.com1, uart.COM1, uart.REGISTERS),
        ):
            bus.attach(ByteWide(registers, first, count), first, count, inside=True)
        keyboard = KeyboardController(self._reset)
        bus.attach(keyboard, keyboard_controller.FIRST_PORT, inside=True)
        commands = keyboard_controller.FIRST_PORT + keyboard_controller.COMMAND_OFFSET
        bus.attach(keyboard, commands, inside=True)
        bus.attach(PciConfiguration(self._reset), pci.ADDRESS_PORT, pci.PORTS, inside=True)
        if self.power is not None:
            bus.attach(self.power, acpi_pm.FIRST_PORT, acpi_pm.PORTS, inside=True)

    def attach_memory(self, bus: MemoryBus) -> None:
        """Put the devices that are in memory there."""
        if self.interrupts.apics is not None:
            self.interrupts.apics.attach(bus)

    def now(self) -> int:
        """Virtual time, in nanoseconds since the start."""
        executed = self._countdown.entered * TICKS_PER_BLOCK
        return self._reporter.total * TICKS_PER_EXIT + executed + self._skipped

    def receive(self, data: bytes) -> int:
        """COM1 receives something: how many bytes of it are taken (see ``uart.BACKLOG``)."""
        self._inputs.note(Serial(data))
        return self.com1.receive(data)

    # vmm.board.Board

    @property
    def interrupting(self) -> bool:
        """INTR."""
        return self._source.asserted

    def acknowledge(self) -> int:
        """INTA."""
        return self._source.acknowledge()

    def settle(self) -> None:
        """Let the alarms go off that are due, and in what comes from outside."""
        if self.outside is not None:
            with self._inputs.at(Place.BOUNDARY):
                typed = self.outside.poll()
                if typed:
                    self.receive(typed)
        self.timers.advance(self.now())

    def arm(self) -> None:
        """Let the engine run up to the next alarm, or to where an interrupt can be taken; also while it runs."""
        if self._source.asserted:
            self._countdown.interrupt()
            return
        when = self.timers.next
        blocks = SLICE if when is None else min(SLICE, (when - self.now()) // TICKS_PER_BLOCK + 1)
        self._countdown.begin(blocks, waits=False)

    def spend(self) -> None:
        """A stepped instruction takes as long as a block."""
        self._countdown.spend(1)

    def sleep(self) -> bool:
        """Go on to the next alarm, or to what comes from outside."""
        when = self.timers.next
        rest = None if when is None else max(0, when - self.now())
        slept = rest if self.outside is None else self.outside.sleep(rest)
        if slept is None:
            return False
        self._skipped += slept
        self.settle()
        return True

    def exit_answered(self) -> None:
        """An exit was answered in the middle of a block: that took time, so something may be due at the next one."""
        when = self.timers.next
        is_late = when is not None and when <= self.now()
        if is_late or (self.outside is not None and self.outside.waiting):
            self.come_out()

    def come_out(self) -> None:
        """Have the engine stop before the next block; for callbacks of the engine."""
        self._countdown.begin(0, waits=False)
