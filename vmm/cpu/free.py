"""The free-running engine: translated blocks at full speed until something is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmm.cpu import binding as b
from vmm.cpu import exit_checks
from vmm.cpu.context import Context
from vmm.cpu.countdown import Countdown
from vmm.cpu.engine import Engine, Stop
from vmm.memory import GuestMemory

#: (linear address, size in bytes, digest of the CPU mode); called before the block is first executed.
TranslationObserver = Callable[[int, int], None]
#: (linear address, size in bytes); called at each entry of a block.
EntryObserver = Callable[[int, int], None]


class FreeRunningEngine(Engine):
    """Executes the guest until an exit.

    Hooks that cost nothing while nothing happens are always on. ``hears_entries`` adds one call a block entry, which
    makes the engine an order of magnitude slower; ``counts_entries`` adds a ``countdown``, which costs next to nothing.
    An engine that is asked to stop in that call stops before the
    block (quirk "block-stop").
    """

    def __init__(self, memory: GuestMemory, *, hears_entries: bool, counts_entries: bool = False) -> None:
        self.on_translate: TranslationObserver
        self.on_entry: EntryObserver
        #: None unless entries are counted.
        self.countdown: Countdown | None = None
        self._hears_entries = hears_entries
        self._counts_entries = counts_entries
        super().__init__(memory)

    def _add_hooks(self) -> None:
        super()._add_hooks()
        self.fills.connect(self.live)
        exit_checks.omit(self.handle)
        self._hook(b.HOOK_EDGE_GENERATED, b.EdgeGenerated(self._on_edge))
        if self._counts_entries:
            self.countdown = Countdown(self.live)
            self._hook(b.HOOK_BLOCK, self.countdown.callback, user_data=self.countdown.user_data)
        if self._hears_entries:
            self._hook(b.HOOK_BLOCK, b.BlockEntry(self._on_block))

    def run(self, context: Context) -> Stop:
        """Go on from ``context`` until a stop; ``context`` then holds the state at it."""
        self._start(context, 0, b.emu_start)
        if self.stop is None and self.countdown is not None and self.countdown.fired:
            return Stop.ASKED
        # HLT is the one stop that no callback announces; it leaves RIP behind the instruction.
        return self.stop or Stop.HALT

    def ask_to_stop(self) -> None:
        """Stop at the next boundary (see ``Engine.ask_to_stop``)."""
        if self.stop is None:
            self.stop = Stop.ASKED
        super().ask_to_stop()

    def _on_edge(self, _engine: int, block: Any, _previous: int, _data: int) -> None:
        if self._saved is not None or self.failure is not None:
            return
        try:
            self.on_translate(block[0], block[1] >> 16 & 0xFFFF)
        except BaseException as failure:  # noqa: BLE001 - raised after the stop
            self._fail(failure)

    def _on_block(self, _engine: int, address: int, size: int, _data: int) -> None:
        if self._saved is not None or self.failure is not None:
            return
        try:
            self.on_entry(address, size)
        except BaseException as failure:  # noqa: BLE001 - raised after the stop
            self._fail(failure)
