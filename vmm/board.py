"""What a processor needs of the board around it, if there is one: an interrupt controller, and time."""

from __future__ import annotations

from typing import Protocol


class Board(Protocol):
    """The devices of one vCPU, as its processor sees them between entries."""

    @property
    def interrupting(self) -> bool:
        """INTR: whether an external interrupt is asked for."""

    def acknowledge(self) -> int:
        """INTA: the vector of the interrupt that the processor takes now."""

    def settle(self) -> None:
        """Let the devices do what has become due."""

    def arm(self) -> None:
        """See to it that the engine, about to run freely, comes out when something is due."""

    def spend(self) -> None:
        """An instruction has been stepped: that takes time, too."""

    def come_out(self) -> None:
        """Have the engine, if it runs, stop before the next block."""

    def sleep(self) -> bool:
        """The processor is halted: go on to the next thing that happens. False if nothing ever will."""
