"""Ports, and pages of memory, and the devices behind them."""

from vmm.devices.acpi_pm import AcpiPowerManagement
from vmm.devices.bus import Device, PortBus
from vmm.devices.clock_port import ClockPort
from vmm.devices.console import ConsolePort
from vmm.devices.debug_exit import DebugExit
from vmm.devices.input_port import INPUT_LIMIT, InputPort
from vmm.devices.interprocessor import InterprocessorPort
from vmm.devices.io_apic import IoApic
from vmm.devices.keyboard_controller import KeyboardController
from vmm.devices.local_apic import LocalApic
from vmm.devices.memory_bus import MemoryBus, MemoryDevice
from vmm.devices.pci import PciConfiguration
from vmm.devices.pic import InterruptController
from vmm.devices.pit import IntervalTimer
from vmm.devices.registers import ByteWide
from vmm.devices.rtc import RealTimeClock
from vmm.devices.system_control import SystemControlPort
from vmm.devices.uart import SerialPort
from vmm.devices.workpiece import Workpiece

__all__ = [
    "INPUT_LIMIT",
    "AcpiPowerManagement",
    "ByteWide",
    "ClockPort",
    "ConsolePort",
    "DebugExit",
    "Device",
    "InputPort",
    "InterprocessorPort",
    "InterruptController",
    "IntervalTimer",
    "IoApic",
    "KeyboardController",
    "LocalApic",
    "MemoryBus",
    "MemoryDevice",
    "PciConfiguration",
    "PortBus",
    "RealTimeClock",
    "SerialPort",
    "SystemControlPort",
    "Workpiece",
]
