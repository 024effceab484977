"""Random tables, modes, control bits and accesses: the walker against the manual's text, bit for bit."""

import paging_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from paging_tables import LA57, LME, NXE, PAE, PG, PGE, PSE, SMAP, SMEP, WP, Memory

from vmm.paging import Access, PageFault, PagingMode, entries, walk

FRAMES = 3
#: The PDPT of PAE paging has a frame of its own: its entries have next to no bits to play with.
PDPT = FRAMES << 12
MEMORY = (FRAMES + 1) << 12

#: Rights, and A, D and G, as the entries of a table have them.
LOW_BITS = [7, 7, 7, 7, 7, 6, 5, 3, 1, 0x27, 0x67, 0x167]

KINDS = {Access.READ: reference.READ, Access.WRITE: reference.WRITE, Access.FETCH: reference.FETCH}
MODE_BITS = {
    "off": (0, 0, 0),
    "32-bit": (PG, 0, 0),
    "pae": (PG, PAE, 0),
    "4-level": (PG, PAE, LME),
    "5-level": (PG, PAE | LA57, LME),
}


class OpenMemory(Memory):
    """Reads zero where there is no memory, as the reference does."""

    def load(self, gpa, size):
        return int.from_bytes(self.bytes[gpa : gpa + size], "little")


@st.composite
def subset(draw, *flags):
    return sum(flag for flag in flags if draw(st.booleans()))


@st.composite
def processors(draw):
    name = draw(st.sampled_from(sorted(MODE_BITS)))
    cr0, cr4, efer = MODE_BITS[name]
    low = draw(st.integers(0, 0x1F if name == "pae" else 0xFFF))
    table = PDPT if name == "pae" else draw(st.integers(0, FRAMES - 1)) << 12
    return reference.Processor(
        cr0=cr0 | draw(subset(WP)),
        cr3=table | low,
        cr4=cr4 | draw(subset(PSE, PGE, SMEP, SMAP)),
        efer=efer | draw(subset(NXE)),
        maxphyaddr=draw(st.sampled_from([32, 33, 36, 39, 40, 41, 48, 52])),
        gib_pages=draw(st.booleans()),
    )


@st.composite
def raw_entries(draw, low_bits, kinds):
    """Mostly a present entry that refers to a frame; at times it maps a page, or a bit of it is flipped."""
    entry = draw(st.integers(0, FRAMES - 1)) << 12 | draw(st.sampled_from(low_bits))
    if draw(st.sampled_from(kinds)) == "page":
        entry = entry & 0x1FFF | 1 << 7
    flip = draw(st.sampled_from([None] * 400 + [63] * 20 + list(range(64))))
    return entry if flip is None else entry ^ 1 << flip


@st.composite
def situations(draw):
    """A processor, a linear address, and memory in which every table holds entries at indices 0 and 1."""
    cpu = draw(processors())
    size = 4 if cpu.paging_mode == "32-bit" else 8
    memory = OpenMemory(MEMORY)
    for frame in range(FRAMES):
        for index in range(2):
            entry = draw(raw_entries(LOW_BITS, ["table"] * 8 + ["page"]))
            memory.poke(frame << 12 | index * size, size, entry & (1 << 8 * size) - 1)
    for index in range(2):
        memory.poke(PDPT + index * 8, 8, draw(raw_entries([1], ["table"])))
    shifts = (22, 12) if size == 4 else (48, 39, 30, 21, 12)
    gva = sum(draw(st.integers(0, 1)) << shift for shift in shifts)
    return cpu, memory, gva | draw(st.integers(0, 0xFFF))


accesses = st.lists(
    st.tuples(st.sampled_from(Access), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=4
)


def decode(cpu):
    return PagingMode.of(cpu.cr0, cpu.cr4, cpu.efer, maxphyaddr=cpu.maxphyaddr, gib_pages=cpu.gib_pages)


def outcome(memory, cpu, gva, access, who, **how):
    user, ac, implicit = who
    try:
        t = walk(memory, decode(cpu), cpu.cr3, gva, access, user=user, ac=ac, implicit=implicit, **how)
    except PageFault as fault:
        return reference.Fault(fault.address, fault.error_code)
    rights = (t.readable, t.writable, t.executable)
    return reference.Answer(t.gpa, t.page_size, t.user, t.global_, t.nx, *rights)


@settings(max_examples=600, deadline=None)
@given(situations(), accesses)
def test_walker_and_manual_agree_on_answer_fault_and_flags_left_in_memory(situation, run):
    cpu, memory, gva = situation
    literal = bytearray(memory.bytes)
    for access, user, ac, implicit in run:
        asker = reference.Asker(cpl3=user, ac=ac, implicit=implicit)
        expected = reference.translate(literal, cpu, gva, KINDS[access], asker)
        assert outcome(memory, cpu, gva, access, (user, ac, implicit)) == expected
        assert memory.bytes == literal


@settings(max_examples=200, deadline=None)
@given(situations(), accesses)
def test_a_right_that_may_be_cached_is_one_that_a_walk_grants_without_storing(situation, run):
    cpu, memory, gva = situation
    mode = decode(cpu)
    for access, user, ac, implicit in run:
        try:
            cached = walk(memory, mode, cpu.cr3, gva, access, user=user, ac=ac, implicit=implicit)
        except PageFault:
            continue
        memory.stores.clear()
        asker = {"user": user and not implicit}
        conditions = [{"ac": False}, {"ac": True}]
        if not asker["user"]:
            conditions.append({"implicit": True})
        if cached.ac_dependent:
            conditions = [{"ac": True}]
        for later, granted in zip(Access, (cached.readable, cached.writable, cached.executable), strict=True):
            for condition in conditions if granted else ():
                walk(memory, mode, cpu.cr3, gva, later, **asker, **condition)
        assert memory.stores == []


@settings(max_examples=200, deadline=None)
@given(situations(), accesses)
def test_a_dry_walk_agrees_with_the_real_one_and_stores_nothing(situation, run):
    cpu, memory, gva = situation
    access, *who = run[0]
    before = bytes(memory.bytes)
    dry = outcome(memory, cpu, gva, access, who, set_bits=False)
    assert memory.bytes == before
    real = outcome(memory, cpu, gva, access, who)
    if isinstance(dry, reference.Answer):
        assert real.writable >= dry.writable
        assert (dry.page, dry.page_size, dry.readable) == (real.page, real.page_size, real.readable)
    else:
        assert dry == real


@settings(max_examples=200, deadline=None)
@given(situations())
def test_the_explained_walk_ends_where_the_real_one_does(situation):
    cpu, memory, gva = situation
    before = bytes(memory.bytes)
    found = entries(memory, decode(cpu), cpu.cr3, gva)
    assert memory.bytes == before
    asker = reference.Asker(cpl3=False, ac=True)
    result = reference.translate(bytearray(before), cpu, gva, reference.READ, asker)
    if not found:
        assert cpu.paging_mode == "none"
    elif isinstance(result, reference.Answer):
        offset = found[-1].page_size - 1
        assert found[-1].leaf
        assert found[-1].address | gva & offset & ~0xFFF == result.page
        assert found[-1].page_size == result.page_size
    else:
        assert found[-1].present == bool(result.error_code & 1)
        assert bool(found[-1].reserved and found[-1].present) == bool(result.error_code & 8)
