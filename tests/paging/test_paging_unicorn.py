"""The walker against the page walk of bare Unicorn (``UC_TLB_CPU``), with real loads, stores and jumps.

Unicorn is a peer here, not a judge. Where it leaves the manual, or uses a freedom that the manual gives:

* it sets A in each entry as it reads it, so a walk that faults leaves A in the entries above (SDM vol. 3, 4.8
  leaves that open; ``walk`` sets none): A is not compared after a fault
* its processor has neither SMAP nor 1 GiB pages (CPUID), so SMAP stays off
"""

from dataclasses import dataclass, replace

import pytest
import unicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from paging_tables import LA57, LME, NXE, PAE, PG, PGE, PS, PSE, SMEP, WP, XD, A, D, Memory, P
from unicorn import x86_const as x86

from vmm.paging import Access, PageFault, PagingMode, walk

RAM = 0x20000
ROOT, GDT, KERNEL, USER_CODE, STACK = 0x1000, 0x8000, 0x9000, 0xA000, 0xC000
TARGET = 0x14000
OFFSET = 0x800
STORED = 0x5A
INT3 = 0xCC
CODE = {Access.READ: b"\x8a\x07\xcc", Access.WRITE: b"\x88\x07\xcc", Access.FETCH: b"\xff\xe7"}
SUPERVISOR_STUB, USER_STUB = 3 | A | D, 7 | A | D


@dataclass(frozen=True)
class Layout:
    """Where the tables are: under test are those on index 1 of the top table; those of the code are on 0."""

    uc_mode: int
    #: Bytes of a general-purpose register, and of a page-table entry.
    word: int
    size: int
    cr4: int
    efer: int
    #: For each level under test the GPA of its entry, and of what that refers to.
    levels: tuple
    #: Indices into ``levels`` of the entries that PS turns into pages, and an address bit reserved in those.
    may_be_large: tuple
    reserved_if_large: int
    #: Entries above those under test, and above the page table of the code.
    fixed: tuple
    gva: int
    iret: bytes
    kernel_code: int
    user_code: int
    registers: tuple


STUB_TABLE = 0x4000

FOUR_LEVEL = Layout(
    uc_mode=unicorn.UC_MODE_64,
    word=8,
    size=8,
    cr4=PAE,
    efer=LME | 1 << 10,
    levels=((ROOT + 8, 0x10000), (0x10000, 0x11000), (0x11000, 0x12000), (0x12000 + 0x14 * 8, TARGET)),
    may_be_large=(2,),
    reserved_if_large=1 << 13,
    fixed=((ROOT, 0x2000 | USER_STUB), (0x2000, 0x3000 | USER_STUB), (0x3000, STUB_TABLE | USER_STUB)),
    gva=1 << 39 | TARGET | OFFSET,
    iret=b"\x48\xcf",
    kernel_code=0x00AF9B000000FFFF,
    user_code=0x00AFFB000000FFFF,
    registers=(x86.UC_X86_REG_RSP, x86.UC_X86_REG_RDI, x86.UC_X86_REG_RAX),
)

FIVE_LEVEL = replace(
    FOUR_LEVEL,
    cr4=PAE | LA57,
    levels=((ROOT + 8, 0x5000), (0x5000 + 8, 0x10000), *FOUR_LEVEL.levels[1:]),
    may_be_large=(3,),
    fixed=((ROOT, 0x6000 | USER_STUB), (0x6000, 0x2000 | USER_STUB), *FOUR_LEVEL.fixed[1:]),
    gva=1 << 48 | FOUR_LEVEL.gva,
)

THIRTY_TWO_BIT = Layout(
    uc_mode=unicorn.UC_MODE_32,
    word=4,
    size=4,
    cr4=0,
    efer=0,
    levels=((ROOT + 4, 0x12000), (0x12000 + 0x14 * 4, TARGET)),
    may_be_large=(0,),
    reserved_if_large=1 << 21,
    fixed=((ROOT, STUB_TABLE | USER_STUB),),
    gva=1 << 22 | TARGET | OFFSET,
    iret=b"\xcf",
    kernel_code=0x00CF9B000000FFFF,
    user_code=0x00CFFB000000FFFF,
    registers=(x86.UC_X86_REG_ESP, x86.UC_X86_REG_EDI, x86.UC_X86_REG_EAX),
)


PAE_PAGING = replace(
    THIRTY_TWO_BIT,
    size=8,
    cr4=PAE,
    levels=FOUR_LEVEL.levels[2:],
    reserved_if_large=1 << 13,
    fixed=((ROOT, 0x3000 | P), (ROOT + 8, 0x11000 | P), (0x3000, STUB_TABLE | USER_STUB)),
    gva=1 << 30 | TARGET | OFFSET,
)


class Guest:
    """One access by real code: a kernel that does it, or that returns to user mode, where it is done."""

    def __init__(self, layout, flags, access, *, user, wp, cr4, nxe):
        self.layout, self.access, self.user = layout, access, user
        self.cr0 = PG | 0x33 | (WP if wp else 0)
        self.cr4 = layout.cr4 | cr4
        self.efer = layout.efer | (NXE if nxe else 0)
        self.memory = Memory(RAM)
        self._tables(flags)
        self._code()

    def _tables(self, flags):
        size, poke = self.layout.size, self.memory.poke
        for where, entry in self.layout.fixed:
            poke(where, size, entry)
        for page in (GDT, KERNEL, STACK):
            poke(STUB_TABLE + (page >> 12) * size, size, page | SUPERVISOR_STUB)
        poke(STUB_TABLE + (USER_CODE >> 12) * size, size, USER_CODE | USER_STUB)
        for level, low in enumerate(flags):
            where, _ = self.layout.levels[level]
            poke(where, size, self._entry(level, low))

    def _entry(self, level, low):
        """A large page starts at 0, so that the same offset reaches the same target."""
        has_large_pages = self.layout.size == 8 or self.cr4 & PSE
        if low & PS and level in self.layout.may_be_large and has_large_pages:
            return low
        return low & ~self.layout.reserved_if_large | self.layout.levels[level][1]

    def _code(self):
        self.memory.bytes[TARGET : TARGET + 4096] = bytes([INT3]) * 4096
        for selector, descriptor in (
            (0x08, self.layout.kernel_code),
            (0x10, 0x00CF93000000FFFF),
            (0x18, 0x00CFF3000000FFFF),
            (0x20, self.layout.user_code),
        ):
            self.memory.poke(GDT + selector, 8, descriptor)
        self._put(USER_CODE if self.user else KERNEL, CODE[self.access])
        if self.user:
            self._put(KERNEL, self.layout.iret)
            for slot, value in enumerate((USER_CODE, 0x23, 2, STACK, 0x1B)):
                self.memory.poke(STACK + slot * self.layout.word, self.layout.word, value)

    def _put(self, where, code):
        self.memory.bytes[where : where + len(code)] = code

    def run_walker(self):
        """Return the fault or None, and memory afterwards."""
        mode = PagingMode.of(self.cr0, self.cr4, self.efer, gib_pages=False)
        try:
            found = walk(self.memory, mode, ROOT, self.layout.gva, self.access, user=self.user)
        except PageFault as fault:
            return fault, bytes(self.memory.bytes)
        if self.access == Access.WRITE:
            self.memory.bytes[found.gpa + OFFSET] = STORED
        return None, bytes(self.memory.bytes)

    def run_unicorn(self):
        """Return the vector that ended it, CR2, the raw processor state, and memory afterwards."""
        uc = unicorn.Uc(unicorn.UC_ARCH_X86, self.layout.uc_mode)
        uc.ctl_set_tlb_mode(unicorn.UC_TLB_CPU)
        uc.mem_map(0, RAM)
        uc.mem_write(0, bytes(self.memory.bytes))
        uc.reg_write(x86.UC_X86_REG_MSR, (0xC0000080, self.efer))
        uc.reg_write(x86.UC_X86_REG_CR4, self.cr4)
        uc.reg_write(x86.UC_X86_REG_CR3, ROOT)
        uc.reg_write(x86.UC_X86_REG_CR0, self.cr0)
        uc.reg_write(x86.UC_X86_REG_GDTR, (0, GDT, 0x2F, 0))
        for register, value in zip(self.layout.registers, (STACK, self.layout.gva, STORED), strict=True):
            uc.reg_write(register, value)
        seen = []

        def interrupt(uc, vector, _):
            seen.append((vector, uc.reg_read(x86.UC_X86_REG_CR2), bytes(uc.context_save())))
            uc.emu_stop()

        uc.hook_add(unicorn.UC_HOOK_INTR, interrupt)
        uc.ctl_exits_enabled(True)
        uc.emu_start(KERNEL, 0, count=0)
        return *seen[0], bytes(uc.mem_read(0, RAM))


def page_bent(**changes):
    """A 4-level guest whose PTE is ``flags``, reading from user mode unless told otherwise."""
    flags = changes.pop("flags", 7)
    how = {"access": Access.READ, "user": True, "wp": True, "cr4": 0, "nxe": True} | changes
    return Guest(FOUR_LEVEL, [7, 7, 7, flags], **how)


@pytest.fixture(scope="module")
def error_code():
    """Return a reader of the error code in a raw state: it is in the one word right for five known faults."""
    known = [
        (page_bent(flags=0), 4),
        (page_bent(flags=0, access=Access.WRITE), 6),
        (page_bent(flags=5, access=Access.WRITE), 7),
        (page_bent(flags=0, user=False), 0),
        (page_bent(flags=7 | XD, access=Access.FETCH), 0x15),
    ]
    states = [(guest.run_unicorn()[2], code) for guest, code in known]

    def word(state, at):
        return int.from_bytes(state[at : at + 4], "little")

    places = [
        at for at in range(0, len(states[0][0]), 4) if all(word(state, at) == code for state, code in states)
    ]
    assert len(places) == 1
    return lambda state: word(state, places[0])


def without_accessed(guest, memory):
    """Memory with A cleared in the entries under test."""
    memory = bytearray(memory)
    for where, _ in guest.layout.levels:
        memory[where] &= ~A
    return memory


def agree(guest, error_code):
    vector, cr2, state, theirs = guest.run_unicorn()
    fault, ours = guest.run_walker()
    if fault is None:
        assert vector == 3
        assert theirs == ours
    else:
        assert (vector, cr2, error_code(state)) == (14, fault.address, fault.error_code)
        assert without_accessed(guest, theirs) == without_accessed(guest, ours)


def entries_for(layout, *bits):
    """The low and high bits of each entry: rights, and often one of ``bits`` flipped."""
    rights = st.sampled_from([7, 7, 7, 5, 3, 1, 7 | A, 7 | A | D])
    flip = st.sampled_from([0] * 2 * len(bits) + [1 << number for number in bits])
    small = st.builds(int.__xor__, rights, flip)
    large = small.map(lambda entry: entry | PS)
    return st.tuples(
        *(small | large if n in layout.may_be_large else small for n in range(len(layout.levels)))
    )


ACCESSES = st.tuples(st.sampled_from(Access), st.booleans(), st.booleans())


BITS_OF_8_BYTES = (0, 1, 2, 3, 5, 6, 7, 8, 9, 13, 40, 45, 51, 52, 58, 62, 63)


@pytest.mark.parametrize("layout", [FOUR_LEVEL, FIVE_LEVEL, PAE_PAGING], ids=["4-level", "5-level", "pae"])
@settings(max_examples=250, deadline=None)
@given(st.data(), ACCESSES, st.tuples(st.sampled_from([0, SMEP, PGE, SMEP | PGE]), st.booleans()))
def test_entries_of_8_bytes(error_code, layout, data, how, controls):
    access, user, wp = how
    cr4, nxe = controls
    flags = data.draw(entries_for(layout, *BITS_OF_8_BYTES))
    agree(Guest(layout, flags, access, user=user, wp=wp, cr4=cr4, nxe=nxe), error_code)


@settings(max_examples=250, deadline=None)
@given(
    entries_for(THIRTY_TWO_BIT, 0, 1, 2, 3, 5, 6, 7, 8, 9, 21),
    ACCESSES,
    st.sampled_from([0, PSE, PSE | SMEP, SMEP]),
)
def test_entries_of_4_bytes(error_code, flags, how, cr4):
    access, user, wp = how
    agree(Guest(THIRTY_TWO_BIT, flags, access, user=user, wp=wp, cr4=cr4, nxe=False), error_code)


def test_unicorn_sets_accessed_flags_on_the_way_to_a_fault_and_the_walker_does_not():
    guest = page_bent(flags=0)
    *_, theirs = guest.run_unicorn()
    _, ours = guest.run_walker()
    top, _ = guest.layout.levels[0]
    assert theirs[top] & A
    assert not ours[top] & A
