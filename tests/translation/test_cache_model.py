"""The block cache against a naive model, with an engine that forgets exactly what it is told to forget."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vmm.errors import OptionError
from vmm.memory import PAGE
from vmm.translation import Block, BlockCache

GRANULE = 128
FRAMES = 3
#: Places where off-by-one errors live: starts and ends of granules and frames, and all around.
offsets = st.one_of(
    st.sampled_from([0, 1, GRANULE - 1, GRANULE, GRANULE + 1, PAGE - GRANULE, PAGE - 2, PAGE - 1]),
    st.integers(0, PAGE - 1),
)
sizes = st.one_of(st.sampled_from([1, 2, 6, GRANULE - 1, GRANULE, GRANULE + 1]), st.integers(1, 400))
frames = st.integers(0, FRAMES - 1)
modes = st.integers(0, 1)


def spans_of(frame: int, offset: int, size: int, second: int) -> tuple[tuple[int, int], ...]:
    """Where a block lies; what does not fit into its frame is at the start of a second one."""
    room = PAGE - offset
    if size <= room:
        return ((frame * PAGE + offset, size),)
    return ((frame * PAGE + offset, room), (second * PAGE, size - room))


def overlap(spans: tuple[tuple[int, int], ...], address: int, size: int) -> bool:
    """Byte by byte, as the definition has it."""
    changed = range(address, address + size)
    return any(byte in changed for start, length in spans for byte in range(start, start + length))


class CacheAgainstModel(RuleBasedStateMachine):
    """``live`` is the model, ``engine`` what an engine still holds translations of."""

    @initialize(capacity=st.integers(1, 8))
    def start(self, capacity: int) -> None:
        self.cache = BlockCache(self._forget, capacity=capacity)
        self.cache.observer = self._observed
        self.live: list[Block] = []
        self.engine: list[Block] = []
        self.created = self.invalidated = self.evicted = 0
        self.events: list[tuple[str, int, str]] = []

    def _forget(self, address: int, size: int) -> None:
        self.engine = [block for block in self.engine if not overlap(block.spans, address, size)]

    def _observed(self, event: str, block: Block, cause: str) -> None:
        self.events.append((event, block.number, cause))

    def _drop(self, dying: list[Block], event: str, cause: str) -> None:
        """The model loses blocks; every one of them must have been announced."""
        self.live = [block for block in self.live if block not in dying]
        assert sorted(self.events) == sorted((event, block.number, cause) for block in dying)
        self.events.clear()

    @rule(alias=st.integers(0, 2), frame=frames, offset=offsets, size=sizes, second=frames, mode=modes)
    def create(self, alias: int, frame: int, offset: int, size: int, second: int, mode: int) -> None:
        gva = (alias + 1 << 20) + frame * PAGE + offset
        spans = spans_of(frame, offset, size, second)
        code = bytes(size)
        again = [b for b in self.live if (b.gva, b.hpa, b.mode_flags) == (gva, spans[0][0], mode)]
        self.engine = [block for block in self.engine if block not in again]  # the engine's own doing
        made = self.cache.create(gva, spans, mode, "long", code)
        assert self.events.pop() == ("created", made.number, "translated")
        self._drop(again, "evicted", "retranslated")
        self.evicted += len(again)
        self.created += 1
        assert made.number == self.created
        assert (made.gva, made.spans, made.size) == (gva, spans, size)
        self.live.append(made)
        self.engine.append(made)

    @rule(frame=frames, offset=offsets, size=sizes)
    def invalidate(self, frame: int, offset: int, size: int) -> None:
        address, size = frame * PAGE + offset, min(size, PAGE - offset)
        dying = [block for block in self.live if overlap(block.spans, address, size)]
        assert self.cache.invalidate(address, size, "test") == dying
        self._drop(dying, "invalidated", "test")
        self.invalidated += len(dying)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), inside=st.integers(0, 400), size=st.integers(1, 16))
    def invalidate_at_a_block(self, data: st.DataObject, inside: int, size: int) -> None:
        block = data.draw(st.sampled_from(self.live))
        address, length = data.draw(st.sampled_from(block.spans))
        at = address - 1 + inside % (length + 2)
        self.invalidate(max(at, 0) // PAGE, max(at, 0) % PAGE, size)

    @rule()
    def trim(self) -> None:
        before = list(self.live)
        was_full = len(before) > self.cache.capacity
        self.cache.trim()
        gone = [block for block in before if block not in list(self.cache)]
        self._drop(gone, "evicted", "capacity")
        self.evicted += len(gone)
        assert bool(gone) == was_full
        assert len(self.live) <= self.cache.capacity
        if gone:
            assert before[0] in gone  # the oldest goes first
            self._only_what_had_to_go(before, gone)

    def _only_what_had_to_go(self, before: list[Block], gone: list[Block]) -> None:
        """A block is evicted for its age, or because its bytes are an older one's."""
        kept_oldest = next((i for i, block in enumerate(before) if block not in gone), len(before))
        for block in gone:
            by_age = before.index(block) < kept_oldest
            shares = any(overlap(block.spans, *span) for old in before[:kept_oldest] for span in old.spans)
            assert by_age or shares

    @rule(alias=st.integers(0, 2), frame=frames, offset=offsets, mode=modes)
    def find(self, alias: int, frame: int, offset: int, mode: int) -> None:
        hpa = frame * PAGE + offset
        gva = (alias + 1 << 20) + hpa
        expected = [b for b in self.live if (b.gva, b.hpa, b.mode_flags) == (gva, hpa, mode)]
        assert self.cache.find(gva, hpa, mode) is (expected[0] if expected else None)

    @rule(frame=frames, offset=offsets, size=sizes)
    def look_up(self, frame: int, offset: int, size: int) -> None:
        address = frame * PAGE + offset
        expected = [block for block in self.live if overlap(block.spans, address, size)]
        assert self.cache.overlapping(address, size) == expected

    @invariant()
    def the_engine_holds_what_the_cache_holds(self) -> None:
        assert self.engine == list(self.cache) == self.live

    @invariant()
    def counters_add_up(self) -> None:
        counters = self.cache.counters
        assert (counters.created, counters.invalidated, counters.evicted) == (
            self.created,
            self.invalidated,
            self.evicted,
        )
        assert counters.created == len(self.cache) + counters.invalidated + counters.evicted
        assert self.cache.overfull == (len(self.live) > self.cache.capacity)

    @invariant()
    def an_empty_cache_holds_on_to_nothing(self) -> None:
        if not self.live:
            assert not self.cache._granules


TestCacheAgainstModel = CacheAgainstModel.TestCase
TestCacheAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.fixture
def cache():
    made = BlockCache(lambda _address, _size: None)
    made.forgotten = []
    made._forget = lambda address, size: made.forgotten.append((address, size))
    return made


def block_at(cache, address, size, *, alias=0):
    return cache.create((alias << 32) + address, ((address, size),), 0, "long", bytes(size))


class TestInvalidation:
    def test_a_change_next_to_a_block_leaves_it_alone(self, cache):
        block_at(cache, 0x100, 0x10)
        assert cache.invalidate(0xFF, 1, "test") == cache.invalidate(0x110, 1, "test") == []

    def test_its_first_and_last_byte_kill_it(self, cache):
        first, last = block_at(cache, 0x100, 0x10), block_at(cache, 0x200, 0x10)
        assert cache.invalidate(0x100, 1, "test") == [first]
        assert cache.invalidate(0x20F, 1, "test") == [last]

    def test_neighbours_within_a_granule_live(self, cache):
        left, middle, right = (block_at(cache, 0x100 + 8 * i, 8) for i in range(3))
        assert cache.invalidate(0x10A, 2, "test") == [middle]
        assert list(cache) == [left, right]

    def test_the_same_bytes_under_several_aliases_die_together(self, cache):
        aliases = [block_at(cache, 0x100, 8, alias=i) for i in range(3)]
        assert cache.invalidate(0x104, 1, "test") == aliases

    def test_a_straddling_block_dies_by_either_frame(self, cache):
        for where in (PAGE - 1, 5 * PAGE):
            block = cache.create(0xFFE, ((PAGE - 2, 2), (5 * PAGE, 3)), 0, "long", bytes(5))
            assert cache.invalidate(PAGE, PAGE, "not its frame") == []
            assert cache.invalidate(where, 1, "test") == [block]

    def test_nothing_dead_means_nothing_forgotten(self, cache):
        block_at(cache, 0x100, 8)
        cache.invalidate(0x200, 8, "test")
        assert cache.forgotten == []

    def test_cost_does_not_depend_on_how_many_blocks_there_are(self, cache):
        for i in range(2000):
            block_at(cache, i * PAGE, 8)
        looked_at = []
        original = Block.overlaps
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Block, "overlaps", lambda self, *span: looked_at.append(self) or original(self, *span))
            cache.invalidate(7 * PAGE, 8, "test")
        assert len(looked_at) == 1


class TestCapacity:
    @pytest.mark.parametrize("capacity", [0, -1])
    def test_less_than_one_block_is_refused(self, capacity):
        with pytest.raises(OptionError, match="give 1 or more"):
            BlockCache(lambda _address, _size: None, capacity=capacity)

    def test_evicting_a_block_evicts_what_shares_its_bytes(self):
        cache = BlockCache(lambda _address, _size: None, capacity=2)
        block_at(cache, 0x100, 8)
        other = block_at(cache, 0x200, 8)
        block_at(cache, 0x104, 2, alias=1)
        cache.trim()
        assert list(cache) == [other]

    def test_digest_is_that_of_the_translated_bytes(self, cache):
        block = cache.create(0, ((0, 3),), 0, "long", b"abc")
        assert block.digest.startswith("ba7816bf8f01cfea")
