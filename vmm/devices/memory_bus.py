"""Guest-physical pages that are devices: registers that loads and stores of the guest reach instead of memory."""

from __future__ import annotations

from typing import Final, Protocol

from vmm.errors import OptionError

_PAGE: Final = 4096


class MemoryDevice(Protocol):
    """What answers the loads and stores to a range of guest-physical pages."""

    def read(self, offset: int, size: int) -> int:
        """The value that a load of ``size`` bytes (1, 2, 4, 8) gets.

        It changes nothing: an instruction that reads, and is refused something else, reads again.
        """

    def write(self, offset: int, size: int, value: int) -> None:
        """A store of ``size`` bytes; once for each that the guest has completed."""


class MemoryBus:
    """Finds the device of a guest-physical address.

    Nothing else may be mapped there: it is the EPT's "not present" that brings an access to the bus.
    """

    def __init__(self) -> None:
        #: (first GPA, bytes, device), in order of attachment.
        self._ranges: list[tuple[int, int, MemoryDevice]] = []

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(First GPA, bytes) of each device, in order of attachment."""
        return [(first, size) for first, size, _ in self._ranges]

    def attach(self, device: MemoryDevice, gpa: int, size: int = _PAGE) -> None:
        """Give whole pages to a device; raises ``OptionError`` if they are none, or one of them is taken."""
        if gpa % _PAGE or size % _PAGE or not size:
            fix = "give multiples of 4096"
            raise OptionError(f"{size:#x} bytes from GPA {gpa:#x}", where="memory bus", fix=fix)
        for first, length, _ in self._ranges:
            if first < gpa + size and gpa < first + length:
                what = f"GPA {max(first, gpa):#x} has a device already"
                raise OptionError(what, where="memory bus", fix="choose another place")
        self._ranges.append((gpa, size, device))

    def holds(self, gpa: int) -> bool:
        """Whether a GPA belongs to a device."""
        return self._find(gpa) is not None

    def read(self, gpa: int, size: int) -> int:
        """A load, cut to its size; ones where there is no device."""
        found = self._find(gpa)
        mask = (1 << 8 * size) - 1
        return mask if found is None else found[1].read(gpa - found[0], size) & mask

    def write(self, gpa: int, size: int, value: int) -> None:
        """A store."""
        found = self._find(gpa)
        if found is not None:
            found[1].write(gpa - found[0], size, value)

    def _find(self, gpa: int) -> tuple[int, MemoryDevice] | None:
        for first, length, device in self._ranges:
            if first <= gpa < first + length:
                return first, device
        return None
