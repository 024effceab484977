"""All live blocks, found by the host bytes that they translate.

A block hangs on every *granule* (128 bytes of host memory) that it touches. An invalidation looks only at the
granules of the changed bytes, so that its cost depends on how much changed and not on how many blocks there are.

The cache decides which translations exist: whenever it drops a block it has the engines forget the block's
bytes. Engines forget by bytes, so everything that overlaps an evicted block goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from vmm.errors import OptionError
from vmm.translation.block import Block, Counters, Key, Span, granules_of

DEFAULT_CAPACITY: Final = 1 << 16

#: Makes every engine forget the translations that overlap a span.
Forget = Callable[[int, int], None]
#: Told of every event: (event, block, cause).
Observer = Callable[[str, Block, str], None]


class BlockCache:
    """Live blocks by frame bytes, with a capacity.

    ``capacity`` is the number of blocks kept, 1 or more; the oldest go first.
    """

    def __init__(self, forget: Forget, *, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise OptionError(f"a capacity of {capacity} blocks", where="block cache", fix="give 1 or more")
        self.capacity: Final = capacity
        self.counters: Final = Counters()
        self.observer: Observer | None = None
        self._forget = forget
        self._blocks: dict[Key, Block] = {}  # in order of creation
        self._granules: dict[int, dict[Key, Block]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks.values())

    def find(self, gva: int, hpa: int, mode_flags: int, vcpu: int = 0) -> Block | None:
        """The live block with this key."""
        return self._blocks.get((vcpu, gva, hpa, mode_flags))

    def holds(self, block: Block) -> bool:
        """Whether a block is still alive."""
        return self._blocks.get(block.key) is block

    def overlapping(self, hpa: int, size: int) -> list[Block]:
        """Live blocks with a byte in [hpa, hpa + size), in order of creation."""
        found: dict[Key, Block] = {}
        for granule in granules_of(hpa, size):
            holders = self._granules.get(granule)
            if holders:
                found |= {key: block for key, block in holders.items() if block.overlaps(hpa, size)}
        return sorted(found.values(), key=by_number) if len(found) > 1 else list(found.values())

    def create(
        self, gva: int, spans: tuple[Span, ...], mode_flags: int, mode: str, code: bytes, vcpu: int = 0
    ) -> Block:
        """Take in a block that an engine has just translated. Call ``trim`` before it goes on."""
        counters = self.counters
        block = Block(counters.created + 1, gva, spans, mode_flags, mode, code, vcpu)
        key = block.key
        if key in self._blocks:
            self._drop([self._blocks[key]], "evicted", "retranslated")
        counters.created += 1
        self._blocks[key] = block
        granules = self._granules
        for granule in block.granules:
            holders = granules.get(granule)
            if holders is None:
                granules[granule] = {key: block}
            else:
                holders[key] = block
        if self.observer is not None:
            self.observer("created", block, "translated")
        return block

    def invalidate(self, hpa: int, size: int, cause: str) -> list[Block]:
        """Drop every block that overlaps the changed bytes, in the cache and in the engines."""
        dying = self.overlapping(hpa, size)
        if dying:
            self._forget(hpa, size)
            self._drop(dying, "invalidated", cause)
        return dying

    def evict(self, hpa: int, size: int, cause: str) -> None:
        """Drop every block that overlaps bytes which did not change."""
        self._forget(hpa, size)
        self._drop(self.overlapping(hpa, size), "evicted", cause)

    @property
    def overfull(self) -> bool:
        """Whether there are more blocks than the capacity allows, so that ``trim`` has work to do."""
        return len(self._blocks) > self.capacity

    def trim(self) -> None:
        """Evict the oldest blocks until the capacity holds, a sixteenth of it at a time.

        Must not be called while an engine is running: the block that it is about to enter may be among those
        that go.
        """
        wanted = self.capacity - self.capacity // 16
        while self.overfull or (len(self._blocks) > wanted and wanted < self.capacity):
            oldest = next(iter(self._blocks.values()))
            dying = {oldest.key: oldest}
            for address, size in oldest.spans:
                self._forget(address, size)
                dying.update((block.key, block) for block in self.overlapping(address, size))
            self._drop(list(dying.values()), "evicted", "capacity")

    def _drop(self, dying: list[Block], event: str, cause: str) -> None:
        for block in dying:
            del self._blocks[block.key]
            for granule in block.granules:
                holders = self._granules[granule]
                del holders[block.key]
                if not holders:
                    del self._granules[granule]
            if self.observer is not None:
                self.observer(event, block, cause)
        if event == "invalidated":
            self.counters.invalidated += len(dying)
        else:
            self.counters.evicted += len(dying)


def by_number(block: Block) -> int:
    """Sorts blocks in order of creation."""
    return block.number
