"""Ports and the devices behind them."""

from vmm.devices.bus import Device, PortBus
from vmm.devices.clock_port import ClockPort
from vmm.devices.console import ConsolePort
from vmm.devices.debug_exit import DebugExit
from vmm.devices.input_port import INPUT_LIMIT, InputPort
from vmm.devices.interprocessor import InterprocessorPort
from vmm.devices.workpiece import Workpiece

__all__ = [
    "INPUT_LIMIT",
    "ClockPort",
    "ConsolePort",
    "DebugExit",
    "Device",
    "InputPort",
    "InterprocessorPort",
    "PortBus",
    "Workpiece",
]
