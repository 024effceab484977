"""What the free-running engine of one vCPU tells of its translated blocks, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable

from vmm.cpu.defects import block_is_affected
from vmm.errors import AuditError
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frames
from vmm.pace import places, width
from vmm.records import BlockEvent
from vmm.reporter import Reporter
from vmm.tlb.strict import changes_mappings
from vmm.translation import Auditor, Block, BlockCache, Span
from vmm.vcpu import VirtualCpu


class BlockEvents:
    """Takes each new translation of a vCPU into the block cache; follows block entries where somebody wants that.

    ``step_over`` has a block stepped that the engine would execute wrongly, that is monitored, or in which an
    instruction has to be noticed.
    """

    def __init__(
        self,
        vcpu: VirtualCpu,
        memory: GuestMemory,
        blocks: BlockCache,
        step_over: Callable[[tuple[Span, ...], str], None],
        *,
        audit: bool,
    ) -> None:
        self.auditor = Auditor(blocks, memory.read, vcpu.number)
        #: Whether a block holds monitored code, by its places; None while nobody monitors code.
        self.is_monitored: Callable[[tuple[Span, ...]], bool] | None = None
        self._vcpu = vcpu
        self._memory = memory
        self._blocks = blocks
        self._step_over = step_over
        self._audit = audit
        vcpu.free.on_translate = self._translated
        vcpu.free.on_entry = self._entered
        vcpu.pace.completed = self._completed

    def _translated(self, gva: int, size: int) -> None:
        """The engine has translated a block and is about to enter it, unless it is stopped here."""
        vcpu, blocks = self._vcpu, self._blocks
        free, read = vcpu.free, self._memory.read
        vcpu.pace.complete(gva)
        spans = self._spans(gva, size)
        mode_flags, mode = free.live.mode()
        code = read(*spans[0]) if len(spans) == 1 else b"".join([read(*span) for span in spans])
        block = blocks.create(gva, spans, mode_flags, mode, code, vcpu.number)
        if blocks.overfull or not blocks.holds(block):
            free.ask_to_stop()
        cause = self._reason_to_step(code, mode, spans)
        if cause:
            self._step_over(spans, cause)
            free.ask_to_stop()

    def _reason_to_step(self, code: bytes, mode: str, spans: tuple[Span, ...]) -> str:
        """Why the engine must not execute a block by itself; empty if it may."""
        if block_is_affected(code, 64 if mode == "long" else 32):
            return "engine defect"
        if self.is_monitored is not None and self.is_monitored(spans):
            return "monitor"
        view = self._vcpu.view
        if view is not None and view.sanitizer.wants_steps(code, width(mode)):
            return "synchronises"
        if self._vcpu.strict and changes_mappings(code, width(mode)):
            return "invalidates translations"
        return ""

    def _completed(self, block: Block, count: int) -> None:
        """Report what was stale of the first ``count`` instructions of a block."""
        view = self._vcpu.view
        if view is None or all(self._memory.home(start) == start for start, _ in block.spans):
            return
        for gva, spans in places(block, count):
            found = view.look(gva, spans)
            if found is not None and not view.report(found):
                self._vcpu.free.ask_to_stop()

    def _entered(self, gva: int, size: int) -> None:
        """The engine is about to execute a block."""
        mode_flags, _ = self._vcpu.free.live.mode()
        host = self._spans(gva, size)[0][0]
        if self._audit:
            self.auditor.enter(gva, host, mode_flags)
        pace = self._vcpu.pace
        if pace.counts:
            block = self._blocks.find(gva, host, mode_flags, self._vcpu.number)
            if block is None:
                raise AuditError(f"the engine enters a block at {gva:#x} that the block cache does not hold")
            pace.enter(block)

    def _spans(self, gva: int, size: int) -> tuple[Span, ...]:
        """Where the bytes of a block lie, by the pages that the engine fetched them from."""
        fetch_host = self._vcpu.mmu.fetch_host
        first = fetch_host(gva)
        if first is not None and first % PAGE + size <= PAGE:
            return ((first, size),)
        spans = []
        done = 0
        while done < size:
            host = fetch_host(gva + done)
            if host is None:
                raise AuditError(f"the engine translated code at {gva + done:#x} that it was never given")
            length = min(size - done, PAGE - host % PAGE)
            spans.append((host, length))
            done += length
        return tuple(spans)


def reporting(
    frames: Frames, reporter: Reporter, home: Callable[[int], int], *, several: bool
) -> Callable[[str, Block, str], None]:
    """What reports every event of a block; with ``several`` vCPUs also whose block it is."""

    def report(event: str, block: Block, cause: str) -> None:
        if reporter.observed:
            gpa = frames.at(home(block.hpa)).gpas[0] + block.hpa % PAGE
            owner = block.vcpu if several else None
            reporter.emit(
                BlockEvent(event, block.number, gpa, block.gva, block.size, block.mode, cause, owner=owner)
            )

    return report
