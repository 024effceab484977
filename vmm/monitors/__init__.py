"""Monitors: a host program sees accesses of the guest to chosen bytes, before and after they happen.

``monitor.py`` is one monitor and what it tells; ``table.py`` knows which bytes of which frame are monitored;
``accesses.py`` finds out what one stepped instruction did; ``watcher.py`` tells, for one vCPU; ``hidden.py`` has bytes
that are executed and never read.
"""

from vmm.monitors.hidden import HiddenPatch, HiddenPatches
from vmm.monitors.monitor import Monitor, MonitoredAccess
from vmm.monitors.table import Monitors
from vmm.monitors.watcher import Watcher

__all__ = ["HiddenPatch", "HiddenPatches", "Monitor", "MonitoredAccess", "Monitors", "Watcher"]
