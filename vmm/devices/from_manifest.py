"""The devices whose answers come from outside, as a manifest and the options of a run want them."""

from __future__ import annotations

import time as host
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmm.devices.bus import PortBus
from vmm.devices.clock_port import NANOSECONDS, ClockPort
from vmm.devices.input_port import InputPort
from vmm.errors import OptionError

if TYPE_CHECKING:
    from vmm.guest.inputs import ClockSpec
    from vmm.guest.manifest import Manifest


def attach_inputs(bus: PortBus, manifest: Manifest, *, data: bytes | None, time: int | None) -> None:
    """Attach the input port and the clock port.

    ``data`` is what is read, ``time`` what the clock shows (nanoseconds since 1970), both instead of what the manifest
    says. Raises ``OptionError`` if one of them is given and the guest has no port for it, ``ManifestError`` if the
    manifest's file cannot be read.
    """
    if manifest.input is not None:
        given = manifest.input.read() if data is None else data
        bus.attach(InputPort(given, manifest.input.port), manifest.input.port, InputPort.PORTS)
    elif data is not None:
        raise _no_port("input", manifest)
    if manifest.clock is not None:
        clock = ClockPort(_time(manifest.clock, time), manifest.clock.port)
        bus.attach(clock, manifest.clock.port, ClockPort.PORTS)
    elif time is not None:
        raise _no_port("time", manifest)


def _time(clock: ClockSpec, given: int | None) -> Callable[[], int]:
    if given is None and clock.time is not None:
        given = clock.time * NANOSECONDS
    return host.time_ns if given is None else lambda: given


def _no_port(option: str, manifest: Manifest) -> OptionError:
    table = {"input": "[input]", "time": "[clock]"}[option]
    what = f"{manifest.name} has no port to read it from"
    return OptionError(what, where=f"--{option}", fix=f"leave it out, or add {table} port to the guest's manifest")
