"""Fetch sides against a plain model: each byte is the oldest that the model permits, never an older one."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vmm.coherence import FetchSides, Writer
from vmm.coherence.model import LINE
from vmm.memory import PAGE, GuestMemory
from vmm.translation import BlockCache

PAGES = 2
VCPUS = 2
SIZE = PAGES * PAGE

places = st.one_of(st.integers(0, SIZE - 1), st.sampled_from([0, 63, 64, PAGE - 1, PAGE, SIZE - 1]))
vcpus = st.integers(0, VCPUS - 1)


class Sides(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.memory = GuestMemory(SIZE, twins=VCPUS)
        self.flushes = 0
        self.cache = BlockCache(lambda _hpa, _size: None)
        self.sides = FetchSides(VCPUS, self.memory, self.cache, self.flush, lambda: None)
        self.fetched = [bytearray(SIZE) for _ in range(VCPUS)]
        #: Pages that engines may write without asking.
        self.writable: set[int] = set()
        self.writers: dict[int, int] = {}
        self.count = 0

    def flush(self):
        self.writable.clear()

    def ask(self, place: int) -> None:
        """As a writable fill does."""
        page = place & -PAGE
        if page not in self.writable:
            self.count += 1
            self.sides.copy(page, Writer(self.count, 0, None, 0), is_code=False)
            self.writable.add(page)

    @rule(place=places, data=st.binary(min_size=1, max_size=20))
    def store_as_data(self, place, data):
        data = data[: PAGE - place % PAGE]
        self.ask(place)
        self.memory.write(place, data)

    @rule(place=places, data=st.binary(min_size=1, max_size=20))
    def store_to_code(self, place, data):
        data = data[: SIZE - place]
        for page in {place & -PAGE, place + len(data) - 1 & -PAGE}:
            self.count += 1
            self.sides.copy(page, Writer(self.count, 0, None, 0), is_code=True)
        self.memory.write(place, data)
        self.count += 1
        self.sides.note(place, len(data), Writer(self.count, 1, self.count, 0))
        for at in range(place, place + len(data)):
            self.writers[at] = self.count

    @rule(vcpu=vcpus)
    def synchronise(self, vcpu):
        self.sides.synchronise(vcpu, "serialised")
        self.fetched[vcpu][:] = self.memory.read(0, SIZE)

    @rule(place=places)
    def flush_line(self, place):
        self.sides.flush_line(place, "flushed")
        line = place & -LINE
        for fetched in self.fetched:
            fetched[line : line + LINE] = self.memory.read(line, LINE)

    @rule()
    def flush_all(self):
        self.sides.flush_all("flushed")
        for fetched in self.fetched:
            fetched[:] = self.memory.read(0, SIZE)

    @rule(vcpu=vcpus, place=places)
    def translate(self, vcpu, place):
        """A block of the bytes that the vCPU fetches now."""
        host = self.sides.of(vcpu, place & -PAGE) + place % PAGE
        size = min(8, PAGE - place % PAGE)
        self.cache.create(place, ((host, size),), 0, "long", self.memory.read(host, size), vcpu)

    @invariant()
    def each_fetches_the_oldest_bytes_permitted(self):
        for vcpu, fetched in enumerate(self.fetched):
            for page in range(0, SIZE, PAGE):
                assert self.memory.read(self.sides.of(vcpu, page), PAGE) == fetched[page : page + PAGE]

    @invariant()
    def blocks_of_twins_hold_what_is_fetched(self):
        for block in self.cache:
            if self.memory.home(block.hpa) != block.hpa:
                assert self.memory.read(block.hpa, block.size) == block.code

    @invariant()
    def what_may_be_written_is_copied(self):
        assert all(self.sides.may_be_written(page) for page in self.writable)

    @invariant()
    def the_writer_of_a_stale_byte_is_known(self):
        now = self.memory.read(0, SIZE)
        for vcpu, fetched in enumerate(self.fetched):
            stale = [at for at in range(SIZE) if fetched[at] != now[at]]
            for at in stale[:4]:
                writer = self.sides.writer_of(vcpu, at, 1)
                assert writer is not None
                assert writer.vcpu == 0 or writer.rip == self.writers[at]


TestSides = Sides.TestCase
TestSides.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
