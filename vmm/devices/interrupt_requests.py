"""Which interrupts a local APIC has accepted, and which of them its processor is asked for (SDM vol. 3, 11.8).

::

    accept ──► IRR ──take──► ISR ──end──►       TMR keeps, for each vector, how it was triggered
               │              │
               └── highest ── PPR: the class of what is in service, or of TPR if that is higher

A vector's *class* is its bits 7:4. The processor is asked for the highest vector in IRR if its class is above that of
PPR. Registers are 256-bit numbers, with bit ``1 << vector``.
"""

from __future__ import annotations

from typing import Final

from attrs import define

_CLASS: Final = 0xF0


@define(slots=True, eq=False)
class InterruptRequests:
    """IRR, ISR, TMR and TPR. Vectors are 16 to 255."""

    requested: int = 0
    in_service: int = 0
    level_triggered: int = 0
    #: TPR, 8 bits.
    task_priority: int = 0

    def accept(self, vector: int, *, level: bool) -> None:
        """An interrupt has arrived; one of the same vector that is waiting already takes it in."""
        bit = 1 << vector
        self.requested |= bit
        self.level_triggered = self.level_triggered | bit if level else self.level_triggered & ~bit

    @property
    def processor_priority(self) -> int:
        """PPR (11.8.3.1). Where TPR and ISR are of one class it is TPR, which the manual leaves to the model."""
        service = max(self.in_service.bit_length() - 1, 0) & _CLASS
        return self.task_priority if self.task_priority & _CLASS >= service else service

    @property
    def deliverable(self) -> int | None:
        """The vector that the processor is asked for, None if for none."""
        vector = self.requested.bit_length() - 1
        if vector < 0 or vector & _CLASS <= self.processor_priority & _CLASS:
            return None
        return vector

    def take(self, vector: int) -> None:
        """The processor takes a vector: from now on it is in service."""
        self.requested &= ~(1 << vector)
        self.in_service |= 1 << vector

    def end(self) -> tuple[int, bool] | None:
        """End of interrupt: (the vector that was in service with the highest priority, level-triggered), if any."""
        vector = self.in_service.bit_length() - 1
        if vector < 0:
            return None
        self.in_service &= ~(1 << vector)
        return vector, bool(self.level_triggered >> vector & 1)
