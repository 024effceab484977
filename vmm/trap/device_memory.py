"""Loads and stores to devices in guest-physical memory: one stepped instruction reaches them, and they are told.

The EPT maps nothing where a device is, so that each access is an EPT violation. The instruction is then stepped, with
the pages that it needs leading to the bus. Loads get their values while it executes. Stores are done when it is
complete: one that faults, or is refused something else and starts anew, has done nothing to a device.
"""

from __future__ import annotations

from attrs import define

from vmm.cpu.engine import R, W
from vmm.devices import MemoryBus
from vmm.records import DeviceAccess
from vmm.reporter import Reporter
from vmm.vcpu import VirtualCpu


@define(slots=True, eq=False)
class DeviceMemory:
    """The devices in memory as the instructions of one vCPU reach them."""

    bus: MemoryBus
    vcpu: VirtualCpu
    reporter: Reporter

    def admit(self, page: int, *, writes: bool) -> None:
        """Let the instruction that is being stepped load from a linear page of a device, or load and store."""
        self.vcpu.step_memory.devices[page] = R | W if writes else R

    def complete(self, rip: int) -> None:
        """The instruction at a linear address has executed: do its stores, and put on record what it did."""
        for gpa, size, value, stores in self.vcpu.stepping.device_accesses:
            if stores:
                self.bus.write(gpa, size, value)
            if self.reporter.observed:
                direction = "write" if stores else "read"
                self.reporter.emit(DeviceAccess(rip=rip, gpa=gpa, size=size, direction=direction, value=value))
