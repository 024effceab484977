"""The auditor: it checks on every block entry that the bytes in memory are the ones that were translated."""

from __future__ import annotations

from collections.abc import Callable

from vmm.errors import AuditError
from vmm.translation.block import Block
from vmm.translation.cache import BlockCache

#: Host bytes at a span.
ReadBytes = Callable[[int, int], bytes]


class Auditor:
    """Checks the block entries of one vCPU; raises ``AuditError`` with a precise report for the first stale one."""

    def __init__(self, cache: BlockCache, read: ReadBytes, vcpu: int = 0) -> None:
        self._vcpu = vcpu
        self._cache = cache
        self._read = read
        self._last: Block | None = None
        self.entries = 0

    def enter(self, gva: int, hpa: int, mode_flags: int) -> None:
        """A block is being entered at this linear and host address in this CPU mode."""
        self.entries += 1
        block = self._cache.find(gva, hpa, mode_flags, self._vcpu)
        if block is None:
            raise AuditError(
                f"the engine enters a block at {gva:#x} (host {hpa:#x}) that the block cache does not hold: "
                "its translation outlived its invalidation"
            )
        now = b"".join(self._read(address, size) for address, size in block.spans)
        if now != block.code:
            raise AuditError(_report(block, now))
        if self._last is not None:
            if self._last.successors is None:
                self._last.successors = set()
            self._last.successors.add(gva)
        self._last = block


def _report(block: Block, now: bytes) -> str:
    first = next(i for i, (old, new) in enumerate(zip(block.code, now, strict=True)) if old != new)
    return (
        f"block {block.number} at {block.gva:#x} (host {block.hpa:#x}, {block.size} bytes, {block.mode}) is stale: "
        f"from byte {first} on it was translated from {block.code[first : first + 16].hex()} "
        f"but memory holds {now[first : first + 16].hex()}"
    )
