"""The local APIC of the one processor, in xAPIC mode, with its registers at 0xFEE00000 (SDM vol. 3, chapter 11).

::

    timer, thermal, performance, error ──┐
    LINT0 (INTR of the 8259A pair) ──────┤ LVT ──► fixed: IRR ──► ISR    ExtINT: the 8259A pair gives the vector
    LINT1 ───────────────────────────────┘         NMI
    I/O APIC, ICR ────────────── messages ──────────┘

=============  =================================================  ==============  ===================================
offset         register                                           offset          register
=============  =================================================  ==============  ===================================
0x20, 0x30     ID, version                                        0x280           ESR: written to be brought up to date
0x80, 0xA0     TPR, PPR                                           0x300, 0x310    ICR: a write to the first one sends
0xB0           EOI                                                0x320 to 0x370  LVT: timer, thermal, performance,
0xD0, 0xE0     LDR, DFR                                                           LINT0, LINT1, error
0xF0           SVR                                                0x380, 0x390    initial and current count
0x100 to       ISR, TMR, IRR, 32 bits every                       0x3E0           divide configuration
0x270          16 bytes
=============  =================================================  ==============  ===================================

Registers are accessed as aligned 32 bits; the manual leaves open what other accesses do. Here a load gets the bytes of
the register, zeros behind it, and a store of another size or place does nothing. Reserved registers read as 0, and
accesses to them are no error for ESR to tell.

INIT, SIPI and SMI messages do nothing: the only processor runs already, and has no SMM.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final, Protocol

from attrs import frozen

from vmm.devices.interrupt_requests import InterruptRequests
from vmm.devices.local_apic_timer import LocalApicTimer
from vmm.devices.virtual_time import Clock, Timers

BASE: Final = 0xFEE0_0000
#: The APIC ID of the one processor.
ID: Final = 0
LINT0, LINT1 = 0, 1

#: P4 and later, without EOI-broadcast suppression; the highest LVT entry is number 5.
_VERSION: Final = 0x0005_0014
_FIRST_LEGAL_VECTOR: Final = 16
_BROADCAST: Final = 0xFF
_FLAT: Final = 0xF
SVR_ENABLED: Final = 1 << 8
_SVR_WRITABLE: Final = 0x3FF
_ICR_WRITABLE: Final = 0x000C_CFFF
_ESR_SEND_ILLEGAL_VECTOR, _ESR_RECEIVE_ILLEGAL_VECTOR = 1 << 5, 1 << 6
_LVT_MODE, _LVT_REMOTE_IRR, _LVT_LEVEL, _LVT_MASKED = 0x700, 1 << 14, 1 << 15, 1 << 16

_ID, _VERSION_AT, _TPR, _PPR, _LDR, _DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xD0, 0xE0, 0xF0
_ISR, _ESR = 0x100, 0x280
_ICR_LOW, _ICR_HIGH, _INITIAL_COUNT, _CURRENT_COUNT, _DIVIDE = 0x300, 0x310, 0x380, 0x390, 0x3E0
_TIMER, _THERMAL, _PERFORMANCE, LVT_LINT0, LVT_LINT1, _ERROR = range(0x320, 0x380, 0x10)
#: What of each LVT entry can be written.
_LVT_WRITABLE: Final = {
    _TIMER: 0x300FF,
    _THERMAL: 0x107FF,
    _PERFORMANCE: 0x107FF,
    LVT_LINT0: 0x1A7FF,
    LVT_LINT1: 0x1A7FF,
    _ERROR: 0x100FF,
}


class DeliveryMode(enum.IntEnum):
    """What a message or an LVT entry asks for (SDM vol. 3, 11.5.1 and 11.6.1)."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    NMI = 4
    INIT = 5
    START_UP = 6
    EXTINT = 7


@frozen(slots=True)
class Message:
    """An interrupt message: to an 8-bit APIC ID, or to a logical destination. ``level`` says how it was triggered."""

    vector: int
    mode: int
    destination: int
    logical: bool = False
    level: bool = False


@frozen(slots=True)
class LocalVector:
    """An LVT entry, decoded (11.5.1)."""

    vector: int
    mode: int
    active_low: bool
    level: bool
    masked: bool
    #: Of the timer only.
    periodic: bool

    @classmethod
    def of(cls, raw: int) -> LocalVector:
        """An entry from its 32 bits."""
        mode, low, level, masked = raw >> 8 & 7, raw >> 13 & 1, raw >> 15 & 1, raw >> 16 & 1
        return cls(raw & 0xFF, mode, bool(low), bool(level), bool(masked), bool(raw >> 17 & 1))


class ExternalController(Protocol):
    """What drives INTR, and gives the vector in an INTA cycle: the 8259A pair."""

    @property
    def asserted(self) -> bool:
        """INTR."""

    def acknowledge(self) -> int:
        """The vector of what INTR was for."""


class LocalApic:
    """Implements ``vmm.devices.MemoryDevice``.

    ``raised`` is called when the processor is asked for an interrupt and was not before, ``ended`` with the vector of a
    level-triggered interrupt that was handled (EOI broadcast), ``nmi`` for an NMI.
    """

    def __init__(
        self,
        clock: Clock,
        timers: Timers,
        external: ExternalController,
        *,
        raised: Callable[[], None],
        ended: Callable[[int], None],
        nmi: Callable[[], None],
    ) -> None:
        self._external = external
        self._raised = raised
        self._ended = ended
        self._nmi = nmi
        self.requests: Final = InterruptRequests()
        self.timer: Final = LocalApicTimer(clock, timers, lambda: self._local(_TIMER))
        self._lvt = dict.fromkeys(_LVT_WRITABLE, _LVT_MASKED)
        self._lines = [False, False]
        self._svr = 0xFF
        self._logical_id = 0
        self._model = _FLAT
        self._icr_low = self._icr_high = 0
        self._esr = self._errors = 0
        self._was_asserted = False

    # The processor's side

    @property
    def asserted(self) -> bool:
        """Whether the processor is asked for an interrupt."""
        return self._was_asserted

    def acknowledge(self) -> int:
        """The processor takes the interrupt: its vector. The spurious one if it is asked for none any more."""
        vector = self.requests.deliverable
        if vector is not None:
            self.requests.take(vector)
        elif self._passes_external and self._external.asserted:
            vector = self._external.acknowledge()
        else:
            vector = self._svr & 0xFF
        self._settle()
        return vector

    @property
    def _passes_external(self) -> bool:
        return self._lvt[LVT_LINT0] & (_LVT_MASKED | _LVT_MODE) == DeliveryMode.EXTINT << 8

    def _settle(self) -> None:
        asserted = self.requests.deliverable is not None or (self._passes_external and self._external.asserted)
        rises, self._was_asserted = asserted and not self._was_asserted, asserted
        if rises:
            self._raised()

    # Messages and local interrupts

    @property
    def enabled(self) -> bool:
        """Whether software has enabled it (11.4.7.2)."""
        return bool(self._svr & SVR_ENABLED)

    def receive(self, message: Message) -> bool:
        """A message from an I/O APIC or an ICR; whether a fixed interrupt was accepted."""
        if not self._is_for_me(message.destination, logical=message.logical):
            return False
        if message.mode == DeliveryMode.NMI:
            self._nmi()
        elif message.mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY) and self.enabled:
            return self._accept(message.vector, level=message.level)
        return False

    def _is_for_me(self, destination: int, *, logical: bool) -> bool:
        """Destinations as in 11.6.2: physical, or logical in the flat or the cluster model."""
        if destination == _BROADCAST:
            return True
        if not logical:
            return destination == ID
        if self._model == _FLAT:
            return bool(destination & self._logical_id)
        same_cluster = destination >> 4 == self._logical_id >> 4
        return same_cluster and bool(destination & self._logical_id & 0xF)

    def _accept(self, vector: int, *, level: bool) -> bool:
        if vector < _FIRST_LEGAL_VECTOR:
            self._fail(_ESR_RECEIVE_ILLEGAL_VECTOR)
            return False
        self.requests.accept(vector, level=level)
        self._settle()
        return True

    def _fail(self, error: int) -> None:
        """Note an error for ESR; the first one since ESR was written interrupts."""
        news, self._errors = error & ~self._errors, self._errors | error
        if news:
            self._local(_ERROR)

    def _local(self, place: int) -> None:
        """An interrupt of the APIC's own goes where its LVT entry says."""
        entry = LocalVector.of(self._lvt[place])
        if entry.masked:
            return
        if entry.mode == DeliveryMode.NMI:
            self._nmi()
        elif entry.mode == DeliveryMode.FIXED:
            self._accept(entry.vector, level=False)

    def drive(self, pin: int, high: bool) -> None:  # noqa: FBT001 - a line is high or low
        """Drive LINT0 or LINT1."""
        was, self._lines[pin] = self._lines[pin], high
        place = (LVT_LINT0, LVT_LINT1)[pin]
        entry = LocalVector.of(self._lvt[place])
        if entry.level and pin == LINT0 and entry.mode == DeliveryMode.FIXED:
            self._follow_level()
        elif high not in (was, entry.active_low) and entry.mode != DeliveryMode.EXTINT:
            self._local(place)
        self._settle()

    def _follow_level(self) -> None:
        """LINT0, level-triggered: a request while it is active and the last one was handled."""
        raw = self._lvt[LVT_LINT0]
        entry = LocalVector.of(raw)
        is_fixed_level = entry.level and entry.mode == DeliveryMode.FIXED and not entry.masked
        active = self._lines[LINT0] != entry.active_low
        if is_fixed_level and active and not raw & _LVT_REMOTE_IRR and self._accept(entry.vector, level=True):
            self._lvt[LVT_LINT0] |= _LVT_REMOTE_IRR

    def _end_of_interrupt(self) -> None:
        ended = self.requests.end()
        if ended is None:
            return
        vector, level = ended
        if level:
            if self._lvt[LVT_LINT0] & _LVT_REMOTE_IRR and self._lvt[LVT_LINT0] & 0xFF == vector:
                self._lvt[LVT_LINT0] &= ~_LVT_REMOTE_IRR
                self._follow_level()
            self._ended(vector)

    def _send(self) -> None:
        """What was written to ICR is a message; to this processor, since there is no other."""
        vector, mode, shorthand = self._icr_low & 0xFF, self._icr_low >> 8 & 7, self._icr_low >> 18 & 3
        destination = (self._icr_high >> 24, ID, _BROADCAST, None)[shorthand]
        logical = bool(self._icr_low >> 11 & 1) and not shorthand
        fixed = mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY)
        if fixed and vector < _FIRST_LEGAL_VECTOR:
            self._fail(_ESR_SEND_ILLEGAL_VECTOR)
        elif destination is not None and (fixed or shorthand != 1):
            self.receive(Message(vector, mode, destination, logical=logical))

    # Registers

    def read(self, offset: int, size: int) -> int:
        """A load."""
        register = self._read_register(offset & 0xFF0) if offset & 0xF < 4 else 0
        return register >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A store."""
        if size == 4 and not offset & 0xF:
            self.timer.catch_up()
            self._write_register(offset, value)
            self._settle()

    def _read_register(self, offset: int) -> int:
        if offset in self._lvt:
            return self._lvt[offset]
        if _ISR <= offset < _ESR:
            bank = (self.requests.in_service, self.requests.level_triggered, self.requests.requested)
            return bank[offset - _ISR >> 7] >> 2 * (offset & 0x70) & 0xFFFF_FFFF
        return {
            _ID: ID << 24,
            _VERSION_AT: _VERSION,
            _TPR: self.requests.task_priority,
            _PPR: self.requests.processor_priority,
            _LDR: self._logical_id << 24,
            _DFR: self._model << 28 | 0x0FFF_FFFF,
            SVR: self._svr,
            _ESR: self._esr,
            _ICR_LOW: self._icr_low,
            _ICR_HIGH: self._icr_high,
            _INITIAL_COUNT: self.timer.initial,
            _CURRENT_COUNT: self.timer.current,
            _DIVIDE: self.timer.divide,
        }.get(offset, 0)

    def _write_register(self, offset: int, value: int) -> None:
        match offset:
            case _ if offset in _LVT_WRITABLE:
                self._write_lvt(offset, value)
            case 0x80:
                self.requests.task_priority = value & 0xFF
            case 0xB0:
                self._end_of_interrupt()
            case 0xD0:
                self._logical_id = value >> 24
            case 0xE0:
                self._model = value >> 28
            case 0xF0:
                self._write_svr(value)
            case 0x280:
                self._esr, self._errors = self._errors, 0
            case 0x300:
                self._icr_low = value & _ICR_WRITABLE
                self._send()
            case 0x310:
                self._icr_high = value & 0xFF00_0000
            case 0x380:
                self.timer.start(value)
            case 0x3E0:
                self.timer.divide = value

    def _write_lvt(self, offset: int, value: int) -> None:
        kept = self._lvt[offset] & _LVT_REMOTE_IRR if value & _LVT_LEVEL else 0
        forced = 0 if self.enabled else _LVT_MASKED
        self._lvt[offset] = value & _LVT_WRITABLE[offset] | kept | forced
        if offset == _TIMER:
            entry = LocalVector.of(self._lvt[_TIMER])
            self.timer.set_mode(periodic=entry.periodic, masked=entry.masked)
        elif offset == LVT_LINT0:
            self._follow_level()

    def _write_svr(self, value: int) -> None:
        """Disabling masks every LVT entry, for good (11.4.7.2)."""
        self._svr = value & _SVR_WRITABLE
        if not self.enabled:
            for place, entry in self._lvt.items():
                self._write_lvt(place, entry)
