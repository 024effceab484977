"""The rules of SDM vol. 3, chapter 4, one row each."""

import itertools

import pytest
from paging_tables import (
    FULL,
    GVA,
    LA57,
    LEVELS,
    LME,
    MODES,
    NXE,
    PAE,
    PAGE,
    PG,
    PGE,
    PS,
    PSE,
    ROOT,
    SMAP,
    SMEP,
    US,
    WP,
    XD,
    A,
    D,
    G,
    Memory,
    P,
    Tables,
)

from vmm.errors import OptionError
from vmm.paging import Access, EntryChanged, PageFault, PagingMode, is_canonical, walk

READ, WRITE, FETCH = Access
RW = 2

#: The entries that can map a page, in each mode.
LEAVES = [(mode, leaf) for mode in MODES for leaf in ("PDPTE", "PDE", "PTE") if leaf in LEVELS[mode]]
LEAVES.remove(("32-bit", "PDE"))


# 4.1.1 Which mode -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cr0", "cr4", "efer", "name", "levels"),
    [
        (0, 0, 0, "off", 0),
        (WP, PAE | PSE, LME | NXE, "off", 0),
        (PG, 0, 0, "32-bit", 2),
        (PG, PSE, NXE, "32-bit", 2),
        (PG, LA57, 0, "32-bit", 2),
        (PG, PAE, 0, "pae", 3),
        (PG, PAE | LA57, NXE, "pae", 3),
        (PG, PAE, LME, "4-level", 4),
        (PG, PAE | LA57, LME, "5-level", 5),
    ],
)
def test_control_registers_select_the_mode(cr0, cr4, efer, name, levels):
    mode = PagingMode.of(cr0, cr4, efer)
    assert (mode.name, mode.levels) == (name, levels)


@pytest.mark.parametrize(
    ("cr0", "cr4", "efer", "field"),
    [
        (WP, 0, 0, "wp"),
        (0, SMEP, 0, "smep"),
        (0, SMAP, 0, "smap"),
        (0, PSE, 0, "pse"),
        (0, PGE, 0, "pge"),
        (0, 0, NXE, "nxe"),
    ],
)
def test_each_control_bit_turns_on_its_feature_and_no_other(cr0, cr4, efer, field):
    mode = PagingMode.of(PG | cr0, PAE | cr4, LME | efer)
    on = {name for name in ("wp", "smep", "smap", "pse", "pge", "nxe") if getattr(mode, name)}
    assert on == {field}


def test_nxe_counts_for_nothing_in_32_bit_paging():
    assert not PagingMode.of(PG, PSE, NXE).nxe


def test_bits_without_a_part_in_paging_give_the_same_mode_object():
    assert PagingMode.of(PG | 0x3B, PAE | 0x600, LME | 0x401) is PagingMode.of(PG, PAE, LME)


@pytest.mark.parametrize("width", [31, 53, -1, 0])
def test_a_physical_address_width_outside_32_to_52_is_refused(width):
    with pytest.raises(OptionError, match="maxphyaddr"):
        PagingMode.of(PG, PAE, LME, maxphyaddr=width)


# Translation ----------------------------------------------------------------------------------------------


def test_paging_off_is_the_identity_of_32_bits_and_touches_no_table():
    memory = Memory()
    answer = walk(memory, PagingMode.of(0, 0, 0), 0xDEAD000, 0x1_1234_5678, WRITE, user=True)
    assert answer.gpa == 0x1234_5000
    assert (answer.readable, answer.writable, answer.executable) == (True, True, True)
    assert memory.loads == []


@pytest.mark.parametrize(
    ("mode", "leaf", "entry", "gva_bits", "gpa", "page_size"),
    [
        ("32-bit", "PTE", 0xFFFF_F000, 0, 0xFFFF_F000, 4 << 10),
        ("32-bit", "PTE", 0x0030_0000 | PS | G, 0, 0x0030_0000, 4 << 10),
        ("32-bit PSE", "PDE", 0xFFC0_0000 | PS, 0x3F_F000, 0xFFFF_F000, 4 << 20),
        ("32-bit PSE", "PDE", 0x0040_0000 | PS | 0xFF << 13, 0x0_5000, 0xFF_0040_5000, 4 << 20),
        ("32-bit PSE", "PDE", 0x0040_0000 | PS | 1 << 12, 0x0_5000, 0x0040_5000, 4 << 20),
        ("32-bit PSE", "PTE", 0x0030_0000 | PS, 0, 0x0030_0000, 4 << 10),
        ("PAE", "PTE", 0xFF_FFFF_F000, 0, 0xFF_FFFF_F000, 4 << 10),
        ("PAE", "PDE", 0x01_0020_0000 | PS, 0x1F_F000, 0x01_003F_F000, 2 << 20),
        ("PAE", "PDE", 0x01_0020_0000 | PS | 1 << 12, 0, 0x01_0020_0000, 2 << 20),
        ("4-level", "PTE", 0xFF_FFFF_F000, 0, 0xFF_FFFF_F000, 4 << 10),
        ("4-level", "PTE", 0x12_3000 | 0x7FF << 52, 0, 0x12_3000, 4 << 10),
        ("4-level", "PDE", 0x20_0000 | PS, 0x1F_F000, 0x3F_F000, 2 << 20),
        ("4-level", "PDPTE", 0x4000_0000 | PS, 0x3FFF_F000, 0x7FFF_F000, 1 << 30),
        ("4-level", "PDPTE", 0x4000_0000 | PS | 1 << 12, 0, 0x4000_0000, 1 << 30),
        ("5-level", "PTE", 0xFF_FFFF_F000, 0, 0xFF_FFFF_F000, 4 << 10),
        ("5-level", "PDE", 0x20_0000 | PS, 0x1F_F000, 0x3F_F000, 2 << 20),
        ("5-level", "PDPTE", 0x4000_0000 | PS, 0x3FFF_F000, 0x7FFF_F000, 1 << 30),
    ],
)
def test_a_leaf_maps_a_page_of_its_size(mode, leaf, entry, gva_bits, gpa, page_size):
    tables = Tables(mode, leaf=leaf)
    tables[leaf] = entry | FULL
    offset_bits = page_size - 1
    tables.gva = tables.gva & ~offset_bits | gva_bits | 0xABC
    answer = tables.walk(READ)
    assert (answer.gpa, answer.page_size) == (gpa, page_size)


def test_without_pse_bit_7_of_a_pde_is_ignored():
    tables = Tables("32-bit")
    tables["PDE"] |= PS
    assert tables.walk(READ).page_size == 4096


@pytest.mark.parametrize(
    ("width", "gpa"), [(32, 0x40_0000), (36, 0xF_0040_0000), (40, 0xFF_0040_0000), (52, 0xFF_0040_0000)]
)
def test_pse_36_holds_as_many_address_bits_as_the_processor_has_but_no_more_than_40(width, gpa):
    tables = Tables("32-bit PSE", leaf="PDE", maxphyaddr=width)
    tables.gva = 1 << 22
    tables["PDE"] = gpa & 0xFFFF_FFFF | (gpa >> 32) << 13 | PS | FULL
    assert tables.walk(READ).gpa == gpa
    if width < 40:
        tables["PDE"] |= 1 << (width - 19)
        assert tables.fault(READ) & 8


@pytest.mark.parametrize("mode", ["32-bit", "32-bit PSE", "PAE"])
def test_outside_of_ia32e_mode_a_linear_address_has_32_bits_and_so_has_cr2(mode):
    tables = Tables(mode)
    assert walk(tables.memory, tables.mode, ROOT, GVA[mode] | 0xFFFF << 32, READ, user=True).gpa == PAGE
    tables["PTE"] = 0
    with pytest.raises(PageFault) as fault:
        walk(tables.memory, tables.mode, ROOT, GVA[mode] | 0xFFFF << 32, READ, user=True)
    assert fault.value.address == GVA[mode]


@pytest.mark.parametrize("mode", ["4-level", "5-level"])
def test_cr2_gets_all_64_bits(mode):
    tables = Tables(mode)
    tables.gva = 0xFFFF_FFFF_FFFF_FABC
    assert tables.fault(READ) == 4


@pytest.mark.parametrize(
    ("mode", "extra"),
    [("32-bit", 0xFFF), ("PAE", 0x1F), ("4-level", 0xFFF), ("4-level", 1 << 63), ("5-level", 0xFFF)],
)
def test_pcid_and_cache_bits_of_cr3_are_ignored(mode, extra):
    tables = Tables(mode)
    tables.cr3 |= extra
    assert tables.walk(READ).gpa == PAGE


def test_a_pdpt_of_pae_paging_is_aligned_to_32_bytes_only():
    tables = Tables("PAE")
    tables.memory.poke(0x8028, 8, tables["PAE PDPTE"])
    tables.cr3 = 0x8020
    assert tables.walk(READ).gpa == PAGE


@pytest.mark.parametrize("mode", MODES)
def test_a_walk_reads_each_entry_once_from_the_top(mode):
    tables = Tables(mode)
    tables.walk(READ)
    assert tables.memory.loads == list(tables.where.values())


# 4.7 P and RSVD -------------------------------------------------------------------------------------------

ENTRIES = [(mode, name) for mode in MODES for name in LEVELS[mode]] + [("PAE", "PAE PDPTE")]


@pytest.mark.parametrize(("mode", "name"), ENTRIES)
def test_an_absent_entry_faults_with_p_clear_whatever_its_other_bits(mode, name):
    tables = Tables(mode)
    tables[name] = (1 << 8 * tables._size(name)) - 2
    assert tables.fault(READ, user=False) == 0
    assert tables.fault(WRITE, user=True) == 2 | 4


@pytest.mark.parametrize("mode", MODES)
def test_absence_below_counts_more_than_a_missing_right_above(mode):
    tables = Tables(mode)
    top = LEVELS[mode][0]
    tables[top] = tables[top] & ~US
    tables["PTE"] = 0
    assert tables.fault(READ, user=True) == 4


def reserved_bits():
    """(mode, leaf of the walk, entry with the bit, lowest and highest reserved bit), with MAXPHYADDR 40."""
    for mode in ("4-level", "5-level"):
        for name in LEVELS[mode]:
            yield mode, "PTE", name, 40, 51
        yield mode, "PTE", "PML4E", 7, 7
        yield mode, "PDPTE", "PDPTE", 13, 29
        yield mode, "PDPTE", "PDPTE", 40, 51
        yield mode, "PDE", "PDE", 13, 20
        yield mode, "PDE", "PDE", 40, 51
    yield "5-level", "PTE", "PML5E", 7, 7
    yield "PAE", "PTE", "PAE PDPTE", 1, 2
    yield "PAE", "PTE", "PAE PDPTE", 5, 8
    yield "PAE", "PTE", "PAE PDPTE", 40, 63
    yield "PAE", "PTE", "PDE", 40, 62
    yield "PAE", "PTE", "PTE", 40, 62
    yield "PAE", "PDE", "PDE", 13, 20
    yield "PAE", "PDE", "PDE", 40, 62
    yield "32-bit PSE", "PDE", "PDE", 21, 21


@pytest.mark.parametrize(("mode", "leaf", "name", "low", "high"), list(reserved_bits()))
def test_a_reserved_bit_faults_with_rsvd_and_p(mode, leaf, name, low, high):
    for number in range(low, high + 1):
        tables = Tables(mode, leaf=leaf)
        tables[name] |= 1 << number
        assert tables.fault(READ, user=False) == 8 | 1, f"bit {number}"
        assert tables.fault(WRITE, user=True) == 8 | 4 | 2 | 1, f"bit {number}"


@pytest.mark.parametrize(("mode", "leaf"), LEAVES)
def test_no_other_bit_is_reserved(mode, leaf):
    reserved = {
        (name, number)
        for its_mode, its_leaf, name, low, high in reserved_bits()
        if its_mode == mode and (its_leaf == leaf or name != leaf)
        for number in range(low, high + 1)
    }
    for name, number in itertools.product(Tables(mode, leaf=leaf).where, range(1, 64)):
        changes_the_walk = 12 <= number < 40 if name != leaf else number == 7
        if (name, number) in reserved or changes_the_walk or (number == 7 and name != "PTE"):
            continue
        tables = Tables(mode, leaf=leaf)
        tables[name] |= 1 << number & (1 << 8 * tables._size(name)) - 1
        assert tables.walk(READ), f"{name} bit {number}"


@pytest.mark.parametrize("mode", ["PAE", "4-level", "5-level"])
def test_xd_is_reserved_in_every_entry_while_nxe_is_off(mode):
    for name in LEVELS[mode]:
        tables = Tables(mode, no_efer=NXE)
        tables[name] |= XD
        assert tables.fault(READ, user=False) == 8 | 1
        assert tables.fault(FETCH, user=False) == 8 | 1


@pytest.mark.parametrize("mode", ["4-level", "5-level"])
def test_ps_in_a_pdpte_is_reserved_without_1_gib_pages(mode):
    assert Tables(mode, leaf="PDPTE", gib=False).fault(READ) == 8 | 4 | 1


@pytest.mark.parametrize(("width", "bit"), [(32, 32), (36, 36), (51, 51)])
def test_address_bits_from_maxphyaddr_on_are_reserved(width, bit):
    tables = Tables("4-level", maxphyaddr=width)
    tables["PTE"] |= 1 << bit
    assert tables.fault(READ) == 8 | 4 | 1


def test_with_52_bits_of_physical_address_none_is_reserved():
    tables = Tables("4-level", maxphyaddr=52)
    tables["PTE"] |= 1 << 51
    assert tables.walk(READ).gpa == 1 << 51 | PAGE


# 4.6.1 Access rights --------------------------------------------------------------------------------------

# Supervisor and user rights to a page, by R/W and U/S of the page and by what the controls say.
RIGHTS = [
    # R/W U/S   controls             supervisor  user
    (RW | US, {}, "rwx", "rwx"),
    (US, {}, "r-x", "r-x"),
    (RW, {}, "rwx", "---"),
    (0, {}, "r-x", "---"),
    (US, {"no_cr0": WP}, "rwx", "r-x"),
    (0, {"no_cr0": WP}, "rwx", "---"),
    (RW | US, {"cr4": SMEP}, "rw-", "rwx"),
    (RW, {"cr4": SMEP}, "rwx", "---"),
    (US, {"cr4": SMEP, "no_cr0": WP}, "rw-", "r-x"),
    (RW | US, {"cr4": SMAP}, "--x", "rwx"),
    (RW, {"cr4": SMAP}, "rwx", "---"),
    (US, {"cr4": SMAP, "no_cr0": WP}, "--x", "r-x"),
    (RW | US, {"cr4": SMAP | SMEP}, "---", "rwx"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("page", "controls", "supervisor", "user"), RIGHTS)
def test_rights(mode, page, controls, supervisor, user):
    for name in LEVELS[mode]:
        tables = Tables(mode, **controls)
        tables[name] = tables[name] & ~(RW | US) | page
        assert tables.allowed(user=False) == supervisor, f"rights taken in the {name}"
        assert tables.allowed(user=True) == user, f"rights taken in the {name}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("page", "wp", "how", "rights"),
    [
        (RW | US, True, {"ac": False}, "--x"),
        (RW | US, True, {"ac": True}, "rwx"),
        (US, True, {"ac": True}, "r-x"),
        (US, False, {"ac": True}, "rwx"),
        (RW | US, True, {"ac": True, "implicit": True}, "--x"),
        (RW, True, {"ac": False}, "rwx"),
        (RW, True, {"implicit": True}, "rwx"),
    ],
)
def test_smap_yields_to_ac_for_explicit_accesses(mode, page, wp, how, rights):
    tables = Tables(mode, cr4=SMAP, no_cr0=0 if wp else WP)
    tables["PTE"] = PAGE | P | page
    assert tables.allowed(user=False, **how) == rights


def test_an_implicit_access_from_ring_3_is_a_supervisor_access():
    tables = Tables("4-level")
    tables["PTE"] = PAGE | P | RW
    assert tables.walk(WRITE, user=True, implicit=True).writable
    tables["PTE"] = 0
    assert tables.fault(READ, user=True, implicit=True) == 0


@pytest.mark.parametrize("mode", ["PAE", "4-level", "5-level"])
def test_xd_in_any_entry_forbids_the_fetch_and_nothing_else(mode):
    for name in LEVELS[mode]:
        tables = Tables(mode)
        tables[name] |= XD
        assert tables.allowed(user=True) == tables.allowed(user=False) == "rw-"
        assert tables.walk(READ).nx


# 4.7 The error code, bit by bit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "controls", "reported"),
    [
        ("32-bit", {}, False),
        ("32-bit", {"efer": NXE}, False),
        ("32-bit", {"cr4": SMEP}, True),
        ("PAE", {"no_efer": NXE}, False),
        ("PAE", {}, True),
        ("PAE", {"no_efer": NXE, "cr4": SMEP}, True),
        ("4-level", {"no_efer": NXE}, False),
        ("4-level", {}, True),
        ("4-level", {"no_efer": NXE, "cr4": SMEP}, True),
        ("5-level", {"no_efer": NXE}, False),
        ("5-level", {}, True),
    ],
)
def test_a_fetch_is_told_from_a_read_only_with_smep_or_nxe(mode, controls, reported):
    tables = Tables(mode, **controls)
    tables["PTE"] = 0
    assert tables.fault(FETCH, user=False) == (16 if reported else 0)
    assert tables.fault(READ, user=False) == 0


@pytest.mark.parametrize(
    ("page", "access", "user", "code"),
    [
        (P | US, WRITE, True, 0b00111),
        (P | US, WRITE, False, 0b00011),
        (P | RW, READ, True, 0b00101),
        (P | RW, WRITE, True, 0b00111),
        (P | RW, FETCH, True, 0b10101),
        (P | RW | US | XD, FETCH, True, 0b10101),
        (P | RW | XD, FETCH, False, 0b10001),
        (0, READ, True, 0b00100),
        (0, WRITE, False, 0b00010),
        (0, FETCH, True, 0b10100),
        (P | 1 << 45, FETCH, False, 0b11001),
        (P | 1 << 45, WRITE, True, 0b01111),
        (1 << 45, READ, False, 0b00000),
    ],
)
def test_error_code(page, access, user, code):
    tables = Tables("4-level")
    tables["PTE"] = PAGE | page
    assert tables.fault(access, user=user) == code


def test_a_fault_prints_what_a_debugger_would_show():
    assert str(PageFault(0x1234, 7)) == "#PF at 0x1234, error code 0x7"


# 4.8 Accessed and dirty flags -----------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "leaf"), LEAVES)
@pytest.mark.parametrize("access", Access)
def test_an_access_sets_a_in_every_entry_used_and_a_write_sets_d_in_the_leaf(mode, leaf, access):
    tables = Tables(mode, leaf=leaf)
    before = {name: tables[name] for name in tables.where}
    tables.walk(access)
    for name, entry in before.items():
        flags = 0 if name == "PAE PDPTE" else A | D if access == WRITE and name == leaf else A
        assert tables[name] == entry | flags, name


@pytest.mark.parametrize("mode", MODES)
def test_flags_are_set_from_the_top_each_in_one_store_and_only_once(mode):
    tables = Tables(mode)
    tables.walk(WRITE)
    where = [gpa for gpa, _, _ in tables.memory.stores]
    assert where == [tables.where[name] for name in LEVELS[mode]]
    tables.memory.stores.clear()
    tables.walk(WRITE)
    tables.walk(READ)
    assert tables.memory.stores == []


@pytest.mark.parametrize("access", Access)
def test_without_set_bits_nothing_is_stored(access):
    tables = Tables("4-level")
    answer = tables.walk(access, set_bits=False)
    assert tables.memory.stores == []
    assert (answer.readable, answer.writable, answer.executable) == (True, False, True)


def test_a_supervisor_write_that_wp_lets_through_sets_d_too():
    tables = Tables("4-level", no_cr0=WP)
    tables["PTE"] = PAGE | P
    tables.walk(WRITE, user=False)
    assert tables["PTE"] == PAGE | P | A | D


def test_a_page_table_that_maps_itself_gets_a_and_d_in_its_one_entry():
    memory = Memory()
    memory.poke(ROOT, 8, ROOT | FULL)
    answer = walk(memory, Tables("4-level").mode, ROOT, 0, WRITE, user=True)
    assert answer.gpa == ROOT
    assert answer.writable
    assert memory.load(ROOT, 8) == ROOT | FULL | A | D


class Contended(Memory):
    """Another processor changes the entry just before the flags are stored, a number of times."""

    def __init__(self, times, change):
        super().__init__()
        self.times, self.change = times, change

    def compare_and_store(self, gpa, size, old, new):
        if self.times:
            self.times -= 1
            self.change(self, gpa, size)
        super().compare_and_store(gpa, size, old, new)


def contended(times, change):
    tables = Tables("4-level")
    memory = Contended(times, change)
    memory.bytes[:] = tables.memory.bytes
    tables.memory = memory
    return tables


def test_a_walk_that_meets_a_changed_entry_starts_over_with_the_new_one():
    def unmap(memory, gpa, size):
        memory.poke(gpa, size, 0)

    tables = contended(1, unmap)
    with pytest.raises(PageFault) as fault:
        tables.walk(WRITE)
    assert fault.value.error_code == 4 | 2


def test_a_flag_that_another_processor_set_meanwhile_is_kept():
    def use(memory, gpa, size):
        memory.poke(gpa, size, memory.load(gpa, size) | A | 1 << 9)

    tables = contended(1, use)
    top = tables["PML4E"]
    assert tables.walk(READ).gpa == PAGE
    assert tables["PML4E"] == top | A | 1 << 9


def test_an_entry_that_never_holds_still_ends_the_walk_instead_of_hanging_it():
    def tick(memory, gpa, size):
        memory.poke(gpa, size, memory.load(gpa, size) ^ 1 << 9)

    with pytest.raises(EntryChanged):
        contended(10**9, tick).walk(READ)


class Violation(Exception):
    """Stands for an EPT violation."""


@pytest.mark.parametrize("name", LEVELS["4-level"])
def test_a_violation_on_loading_an_entry_comes_through_and_nothing_has_changed(name):
    tables = Tables("4-level")
    load = tables.memory.load

    def refuse(gpa, size):
        if gpa == tables.where[name]:
            raise Violation
        return load(gpa, size)

    tables.memory.load = refuse
    with pytest.raises(Violation):
        tables.walk(WRITE)
    assert tables.memory.stores == []


def test_a_violation_on_storing_a_flag_comes_through():
    tables = Tables("4-level")

    def refuse(gpa, size, old, new):
        raise Violation

    tables.memory.compare_and_store = refuse
    with pytest.raises(Violation):
        tables.walk(READ)


# What may be cached ---------------------------------------------------------------------------------------


def test_a_clean_page_is_not_cached_as_writable_by_a_read():
    tables = Tables("4-level")
    assert not tables.walk(READ).writable
    assert not tables.walk(FETCH).writable
    assert tables.walk(WRITE).writable
    assert tables.walk(READ).writable


def test_a_dirty_page_is_cached_as_writable_only_if_the_asker_may_write():
    tables = Tables("4-level")
    tables["PTE"] = PAGE | P | US | D
    assert not tables.walk(READ, user=True).writable
    tables = Tables("4-level", no_cr0=WP)
    tables["PTE"] = PAGE | P | US | D
    assert not tables.walk(READ, user=True).writable
    assert tables.walk(READ, user=False).writable


def test_rights_are_those_of_the_asker():
    tables = Tables("4-level", cr4=SMEP)
    assert tables.walk(READ, user=True).executable
    assert not tables.walk(READ, user=False).executable
    assert tables.walk(READ, user=False).user


def test_rights_owed_to_ac_say_so():
    tables = Tables("4-level", cr4=SMAP)
    assert tables.walk(READ, user=False, ac=True).ac_dependent
    assert not tables.walk(FETCH, user=False, ac=False).readable
    assert not tables.walk(FETCH, user=False, ac=False).ac_dependent
    assert not tables.walk(READ, user=True, ac=True).ac_dependent
    tables["PTE"] = PAGE | P | RW
    assert not tables.walk(READ, user=False, ac=True).ac_dependent


@pytest.mark.parametrize(
    ("cr4", "g", "expected"), [(0, 0, False), (0, G, False), (PGE, 0, False), (PGE, G, True)]
)
def test_a_page_is_global_if_g_is_set_and_pge_on(cr4, g, expected):
    tables = Tables("4-level", cr4=cr4)
    tables["PTE"] |= g
    assert tables.walk(READ).global_ is expected


# Canonical addresses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gva", "four", "five"),
    [
        (0, True, True),
        (0x0000_7FFF_FFFF_FFFF, True, True),
        (0x0000_8000_0000_0000, False, True),
        (0x00FF_FFFF_FFFF_FFFF, False, True),
        (0x0100_0000_0000_0000, False, False),
        (0xFEFF_FFFF_FFFF_FFFF, False, False),
        (0xFF00_0000_0000_0000, False, True),
        (0xFFFF_7FFF_FFFF_FFFF, False, True),
        (0xFFFF_8000_0000_0000, True, True),
        (0xFFFF_FFFF_FFFF_FFFF, True, True),
        (1 << 64, False, False),
    ],
)
def test_canonical(gva, four, five):
    assert is_canonical(gva, la57=False) is four
    assert is_canonical(gva, la57=True) is five
