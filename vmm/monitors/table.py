"""Which bytes of which frame are monitored.

A monitor belongs to frames, not to addresses: whatever address an access uses, it is seen. The EPT stays as it is. What
is monitored is withheld one stage later, where the EPT's permissions become those of the free-running engine, so that
every access to a frame with monitored bytes comes out of it and is stepped. So a monitor costs the guest no VM exit and
no virtual time: the run with it is the run without it.

Execution is not withheld from frames. A block that holds a monitored instruction is stepped, each time; all other code
of the frame stays free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from vmm.cpu.engine import R, W
from vmm.memory import PAGE, GuestMemory
from vmm.monitors.monitor import Monitor
from vmm.translation import BlockCache, Span

_WITHHELD: Final = {"r": R, "w": W, "x": 0}


class Monitors:
    """All monitors of a machine.

    ``flush`` makes every engine forget its address translations. ``withheld`` and ``announced`` are what the MMUs look
    at (see ``vmm.mmu.Mmu``).
    """

    def __init__(self, memory: GuestMemory, blocks: BlockCache, flush: Callable[[], None]) -> None:
        self.withheld: Final[dict[int, int]] = {}
        self.announced: Final[set[int]] = set()
        self._memory = memory
        self._blocks = blocks
        self._flush = flush
        self._by_page: dict[int, list[Monitor]] = {}

    def add(self, monitor: Monitor) -> None:
        """Monitor from now on."""
        for hpa, _ in monitor.spans:
            self._by_page.setdefault(hpa & -PAGE, []).append(monitor)
        self._changed(monitor)

    def remove(self, monitor: Monitor) -> None:
        """Monitor no longer."""
        for page in {hpa & -PAGE for hpa, _ in monitor.spans}:
            left = [other for other in self._by_page[page] if other is not monitor]
            if left:
                self._by_page[page] = left
            else:
                del self._by_page[page]
        self._changed(monitor)

    def of(self, access: str, places: Iterable[Span]) -> list[Monitor]:
        """The monitors with a byte in one of these places, in order of creation."""
        found: dict[Monitor, None] = {}
        for hpa, size in places:
            for monitor in self._by_page.get(hpa & -PAGE, ()):
                if access in monitor.access and _overlap(monitor.spans, hpa, size):
                    found[monitor] = None
        return list(found)

    def is_monitored(self, spans: tuple[Span, ...]) -> bool:
        """Whether a block with these places has bytes whose execution is monitored."""
        return bool(self._by_page) and bool(self.of("x", [(self._memory.home(hpa), size) for hpa, size in spans]))

    def _changed(self, monitor: Monitor) -> None:
        """Engines must not go by what they know of the frames of a monitor that has come or gone."""
        for page in {hpa & -PAGE for hpa, _ in monitor.spans}:
            here = self._by_page.get(page, ())
            bits = 0
            for other in here:
                for access in other.access:
                    bits |= _WITHHELD[access]
            self.withheld.pop(page, None)
            if bits:
                self.withheld[page] = bits
            self.announced.discard(page)
            if any(other.before is not None and other.access & {"r", "w"} for other in here):
                self.announced.add(page)
        if "x" in monitor.access and monitor.active:
            self._forget_code(monitor)
        self._flush()

    def _forget_code(self, monitor: Monitor) -> None:
        """The blocks that hold monitored code must be translated anew, to be noticed."""
        for block in list(self._blocks):
            homes = [(self._memory.home(hpa), size) for hpa, size in block.spans]
            if self._blocks.holds(block) and any(_overlap(monitor.spans, *home) for home in homes):
                for hpa, size in block.spans:
                    self._blocks.evict(hpa, size, "monitor")


def _overlap(spans: tuple[Span, ...], hpa: int, size: int) -> bool:
    return any(start < hpa + size and hpa < start + length for start, length in spans)
