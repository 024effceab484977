"""Monitors, hooks and hidden patches as the host sets them: what ``Machine`` needs for them, put together when used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from vmm.errors import OptionError
from vmm.inputs import Hide, Reveal
from vmm.memory.frames import FrameState
from vmm.monitors import HiddenPatch, HiddenPatches, Monitor, Monitors, Watcher
from vmm.monitors.monitor import After, Before, Condition

if TYPE_CHECKING:
    from vmm.assembly import Assembly
    from vmm.block_events import BlockEvents

_ACCESSES: Final = frozenset("rwx")


class HostMonitors:
    """The part of ``Machine`` that is about monitors; its methods say there what they do."""

    def __init__(
        self,
        machine: Assembly,
        events: list[BlockEvents],
        flush: Callable[[], None],
        forget_fetches: Callable[[], None],
    ) -> None:
        self._machine = machine
        self._events = events
        self._flush = flush
        self._forget_fetches = forget_fetches
        self._monitors: Monitors | None = None
        self._hidden: HiddenPatches | None = None
        #: All hidden patches so far, by number.
        self.patches: list[HiddenPatch] = []

    def physical(self, place: str | int) -> int:
        """See ``Machine.physical``."""
        machine = self._machine
        gva = machine.guest.image.symbols.address(place) if isinstance(place, str) else place
        if gva is None:
            raise OptionError(f"no symbol {place}", where="physical", fix="name one of the image's")
        hpa = machine.loop.current.vcpu.mmu.peek(gva)
        if hpa is None:
            raise OptionError(f"nothing is mapped at {gva:#x}", where="physical", fix="give a mapped linear address")
        return machine.frames.at(hpa).gpas[0] | hpa & 0xFFF

    def monitor(
        self,
        gpa: int,
        size: int,
        access: str,
        before: Before | None,
        after: After | None,
        condition: Condition | None,
        *,
        at_start: bool = False,
    ) -> Monitor:
        """See ``Machine.monitor``."""
        kinds = frozenset(access)
        if not kinds or not kinds <= _ACCESSES:
            raise OptionError(f"access {access!r}", where="monitor", fix='give one or more of "r", "w", "x"')
        if size < 1:
            raise OptionError(f"{size} bytes", where="monitor", fix="give 1 or more")
        spans = tuple((hpa, length) for hpa, _, length in self._machine.host_memory.places(gpa, size))
        monitors = self._install()
        monitor = Monitor(gpa, size, kinds, spans, before, after, condition, at_start, forget=monitors.remove)
        if "r" in kinds:
            for vcpu in self._machine.vcpus:
                vcpu.stepping.wants_reads = True
        monitors.add(monitor)
        return monitor

    def patch_hidden(self, gpa: int, data: bytes) -> HiddenPatch:
        """See ``Machine.patch_hidden``."""
        machine = self._machine
        if not data:
            raise OptionError("no bytes", where="patch_hidden", fix="give 1 or more")
        if machine.sanitizer is not None:
            fix = "use the coherent model"
            raise OptionError("a coherence model has the fetch side", where="patch_hidden", fix=fix)
        places = machine.host_memory.places(gpa, len(data))
        for hpa, where, _ in places:
            if machine.frames.at(hpa).lasting is FrameState.SEALED:
                raise OptionError(f"GPA {where:#x} is sealed", where="patch_hidden", fix="sealed code is final")
        pieces = tuple((hpa, data[where - gpa : where - gpa + length]) for hpa, where, length in places)
        patch = HiddenPatch(gpa, data, pieces, len(self.patches), forget=self._reveal)
        hidden = self._split()
        hidden.require_room(patch)
        with machine.inputs.during(Hide(gpa, data)):
            hidden.add(patch)
            self.patches.append(patch)
        return patch

    def _reveal(self, patch: HiddenPatch) -> None:
        with self._machine.inputs.during(Reveal(patch.number)):
            patch.active = False
            self._split().remove(patch)

    def _install(self) -> Monitors:
        """Have every vCPU tell the monitors, from the first of them on."""
        if self._monitors is None:
            machine = self._machine
            self._monitors = Monitors(machine.memory, machine.blocks, self._flush)
            for vcpu, processor, events in zip(machine.vcpus, machine.loop.processors, self._events, strict=True):
                vcpu.mmu.withheld = self._monitors.withheld
                vcpu.mmu.announced = self._monitors.announced
                vcpu.mmu.quick.detach()
                trap = processor.trap
                trap.watcher = Watcher(
                    self._monitors, vcpu, trap, machine.memory, machine.frames, machine.reporter, machine.inputs
                )
                events.is_monitored = self._monitors.is_monitored
        return self._monitors

    def _split(self) -> HiddenPatches:
        """Have every vCPU fetch from split pages, from the first hidden patch on."""
        if self._hidden is None:
            machine = self._machine
            self._hidden = HiddenPatches(
                machine.memory, machine.frames, machine.blocks, self._flush, self._forget_fetches
            )
            machine.door.hidden = machine.control.hidden = self._hidden
            for vcpu in machine.vcpus:
                vcpu.mmu.fetch_side = self._hidden
                vcpu.free.fill = vcpu.mmu.fills_of_free(vcpu.free)
                vcpu.stepping.fill = vcpu.step_memory.fills_of(vcpu.stepping)
        return self._hidden
