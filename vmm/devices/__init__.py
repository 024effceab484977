"""Ports and the devices behind them."""

from vmm.devices.bus import Device, PortBus
from vmm.devices.console import ConsolePort
from vmm.devices.debug_exit import DebugExit
from vmm.devices.interprocessor import InterprocessorPort
from vmm.devices.workpiece import Workpiece

__all__ = ["ConsolePort", "DebugExit", "Device", "InterprocessorPort", "PortBus", "Workpiece"]
