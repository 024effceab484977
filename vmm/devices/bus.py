"""The I/O port space: 65,536 ports, each answered by one device or by nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from vmm.errors import OptionError

if TYPE_CHECKING:
    from vmm.inputs import Inputs

PORTS: Final = 1 << 16


class Device(Protocol):
    """What answers a range of ports."""

    #: Whether the guest must stop at an instruction boundary before each access, because the access can end the
    #: run or change memory. Other accesses are answered while the block goes on.
    exact: bool

    def read(self, port: int, size: int) -> int:
        """The value that IN of ``size`` bytes (1, 2, 4) gets."""

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of ``size`` bytes."""


class PortBus:
    """Finds the device of a port. Ports that nobody answers read as all ones and ignore writes.

    What a device answers is an input of the run (``vmm.inputs``), unless it is attached as ``inside``.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._devices: dict[int, Device] = {}
        self._inside: set[int] = set()

    def attach(self, device: Device, first: int, count: int = 1, *, inside: bool = False) -> None:
        """Give ``count`` ports from ``first`` on to a device; raises ``OptionError`` if one is taken.

        ``inside`` says that what it answers follows from the run alone.
        """
        if not 0 <= first <= first + count <= PORTS:
            raise OptionError(f"ports {first:#x} + {count}", where="port bus", fix="give ports below 0x10000")
        for port in range(first, first + count):
            if port in self._devices:
                raise OptionError(f"port {port:#x} has a device already", where="port bus", fix="choose another port")
            self._devices[port] = device
            if inside:
                self._inside.add(port)

    @property
    def exact_outside(self) -> list[int]:
        """The ports of a host program's own devices that want a boundary before each access, in order."""
        return sorted(port for port, device in self._devices.items() if device.exact and port not in self._inside)

    def is_exact(self, port: int) -> bool:
        """Whether an access needs a boundary before it."""
        device = self._devices.get(port)
        return device is not None and device.exact

    def read(self, port: int, size: int) -> int:
        """The value that IN gets, cut to its size."""
        mask = (1 << 8 * size) - 1
        device = self._devices.get(port)
        if device is not None and port in self._inside:
            return device.read(port, size) & mask
        value = self._inputs.read(port, size, device)
        return mask if value is None else value

    def write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        device = self._devices.get(port)
        if device is not None:
            device.write(port, size, value)
