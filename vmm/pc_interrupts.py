"""How the requests of a PC's devices get to its processor.

::

    IRQ 0 … 15 ─┬─ 8259A pair ── INTR ──────────────► the processor, if there is no APIC
                │                 └──► LINT0 ┐
                └─ I/O APIC ── messages ─────┴─ local APIC ──► the processor

IRQ 0 is pin 2 of the I/O APIC, every other IRQ the pin of its number. What firmware leaves behind is *virtual wire
mode* (MultiProcessor Specification 1.4, 3.6.2.2): the local APIC hands the 8259As' interrupts through, and every pin of
the I/O APIC is masked, so that a system that knows of no APIC need not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from attrs import define

from vmm.devices import InterruptController, IoApic, LocalApic, MemoryBus, io_apic, local_apic
from vmm.devices.local_apic import DeliveryMode
from vmm.devices.virtual_time import Clock, Timers

#: Pin of the I/O APIC that IRQ 0, the timer, is connected to.
TIMER_PIN: Final = 2
#: ID that firmware gives the I/O APIC.
IO_APIC_ID: Final = 1

_SPURIOUS_VECTOR: Final = 0xFF


class InterruptSource(Protocol):
    """What drives the processor's INTR."""

    @property
    def asserted(self) -> bool:
        """INTR."""

    def acknowledge(self) -> int:
        """INTA: the vector."""


@define(slots=True, eq=False)
class Apics:
    """The local APIC and the I/O APIC."""

    local: LocalApic
    io: IoApic

    def attach(self, bus: MemoryBus) -> None:
        """Put both at their places in memory."""
        bus.attach(self.local, local_apic.BASE)
        bus.attach(self.io, io_apic.BASE)

    def enter_virtual_wire_mode(self) -> None:
        """Do what firmware does before it hands over."""
        for register, value in (
            (local_apic.SVR, local_apic.SVR_ENABLED | _SPURIOUS_VECTOR),
            (local_apic.LVT_LINT0, DeliveryMode.EXTINT << 8),
            (local_apic.LVT_LINT1, DeliveryMode.NMI << 8),
        ):
            self.local.write(register, 4, value)
        self.io.write(io_apic.SELECT, 4, io_apic.ID)
        self.io.write(io_apic.WINDOW, 4, IO_APIC_ID << 24)


class PcInterrupts:
    """The interrupt controllers. ``raised`` is called when the processor is asked for an interrupt and was not before.

    ``nmi`` is called for an NMI; None for a PC without APICs.
    """

    def __init__(
        self, clock: Clock, timers: Timers, raised: Callable[[], None], nmi: Callable[[], None] | None
    ) -> None:
        self._raised = raised
        self.controller: Final = InterruptController(self._drive)
        #: None on a PC that has only the 8259As.
        self.apics: Final = None if nmi is None else self._make_apics(clock, timers, nmi)
        #: What the processor asks.
        self.source: Final[InterruptSource] = self.controller if self.apics is None else self.apics.local

    def _make_apics(self, clock: Clock, timers: Timers, nmi: Callable[[], None]) -> Apics:
        def ended(vector: int) -> None:
            apics.io.end_of_interrupt(vector)

        local = LocalApic(clock, timers, self.controller, raised=self._raised, ended=ended, nmi=nmi)
        apics = Apics(local, IoApic(local.receive))
        apics.enter_virtual_wire_mode()
        return apics

    def _drive(self, high: bool) -> None:  # noqa: FBT001 - a line is high or low
        """INTR of the 8259As has changed."""
        if self.apics is not None:
            self.apics.local.drive(local_apic.LINT0, high)
        elif high:
            self._raised()

    def line(self, irq: int) -> Callable[[bool], None]:
        """What drives an interrupt request, IRQ 0 to 15 but not 2."""
        to_8259 = self.controller.line(irq)
        if self.apics is None:
            return to_8259
        to_pin = self.apics.io.line(irq or TIMER_PIN)

        def drive(high: bool) -> None:  # noqa: FBT001 - a line is high or low
            to_8259(high)
            to_pin(high)

        return drive
