"""What is done to a vCPU, or at an exit of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from vmm.cpu.events import Event
from vmm.errors import OptionError
from vmm.inputs.kind import Input

if TYPE_CHECKING:
    from vmm.machine import Machine


@frozen(slots=True)
class PortRead(Input):
    """IN of ``size`` bytes (1, 2, 4) got ``value`` from a device that the host stands behind."""

    name: ClassVar[str] = "port"

    port: int
    size: int
    value: int


@frozen(slots=True)
class Decision(Input):
    """What a handler made of the exit before it: an event in its place; None: it has dealt with the exit."""

    name: ClassVar[str] = "decision"

    event: Event | None


@frozen(slots=True)
class Answer(Input):
    """The IN at this exit is to read ``value``, whatever its device says."""

    name: ClassVar[str] = "answer"

    value: int

    def apply(self, machine: Machine) -> None:
        """Answer."""
        machine.answer(self.value)


@frozen(slots=True)
class Inject(Input):
    """An event for the next VM entry of a vCPU; None, in old traces: of the one at work."""

    name: ClassVar[str] = "inject"

    event: Event
    vcpu: int | None = None

    def apply(self, machine: Machine) -> None:
        """Inject."""
        machine.inject(self.event, vcpu=self.vcpu)


@frozen(slots=True)
class Interrupt(Input):
    """An external interrupt was raised at a vCPU: a ``vector`` of 0 to 255."""

    name: ClassVar[str] = "interrupt"

    vector: int
    vcpu: int

    def apply(self, machine: Machine) -> None:
        """Raise it."""
        machine.interrupt(self.vector, vcpu=self.vcpu)


@frozen(slots=True)
class MonitorTrap(Input):
    """The host switched the monitor trap flag of a vCPU."""

    name: ClassVar[str] = "monitor_trap_flag"

    vcpu: int
    on: bool

    def apply(self, machine: Machine) -> None:
        """Switch it."""
        machine.monitor_trap_flag(self.vcpu, on=self.on)


@frozen(slots=True)
class SetRegisters(Input):
    """A handler or an acting observer left registers of a vCPU with new values, by their names in a state file."""

    name: ClassVar[str] = "registers"

    vcpu: int
    values: dict[str, int]

    def apply(self, machine: Machine) -> None:
        """Set them."""
        if self.vcpu >= len(machine.vcpus):
            raise OptionError(f"vCPU {self.vcpu}", where="registers", fix="name one that there is")
        for name, value in self.values.items():
            machine.vcpus[self.vcpu].context.set_register(name, value)


@frozen(slots=True)
class Serial(Input):
    """The first serial port of a PC received ``data``."""

    name: ClassVar[str] = "serial"

    data: bytes

    def apply(self, machine: Machine) -> None:
        """Type it."""
        machine.type_in(self.data)


@frozen(slots=True)
class Stop(Input):
    """The host ended the run."""

    name: ClassVar[str] = "stop"

    def apply(self, machine: Machine) -> None:
        """Stop."""
        machine.stop()
