"""What ``entries`` shows of a walk."""

from paging_tables import FULL, GVA, LEVELS, MODES, NXE, PAGE, PS, ROOT, SMAP, XD, A, D, G, P, Tables

from vmm.paging import PagingMode, entries


def explain(tables):
    return entries(tables.memory, tables.mode, tables.cr3, tables.gva)


def test_paging_off_has_no_entries():
    assert entries(Tables("4-level").memory, PagingMode.of(0, 0, 0), ROOT, 0x1234) == []


def test_every_entry_is_named_and_found_where_it_lies_in_every_mode():
    for mode in MODES:
        tables = Tables(mode)
        found = explain(tables)
        names = ["PDPTE", *LEVELS[mode]] if mode == "PAE" else list(LEVELS[mode])
        assert [entry.name for entry in found] == names
        assert [entry.level for entry in found] == list(range(len(names), 0, -1))
        assert [entry.gpa for entry in found] == list(tables.where.values())
        assert [entry.raw for entry in found] == [tables[name] for name in tables.where]
        assert [entry.leaf for entry in found] == [False] * (len(names) - 1) + [True]
        assert found[-1].address == PAGE


def test_each_bit_shows_in_its_field():
    tables = Tables("4-level")
    for bits, field, value in [
        (0, "present", False),
        (P, "present", True),
        (P, "writable", False),
        (P | 2, "writable", True),
        (P, "user", False),
        (P | 4, "user", True),
        (P, "accessed", False),
        (P | A, "accessed", True),
        (P, "dirty", False),
        (P | D, "dirty", True),
        (P, "global_", False),
        (P | G, "global_", True),
        (P, "nx", False),
        (P | XD, "nx", True),
        (P, "reserved", 0),
        (P | 1 << 45, "reserved", 1 << 45),
    ]:
        tables["PTE"] = PAGE | bits
        assert getattr(explain(tables)[-1], field) == value, f"{field} of {bits:#x}"


def test_bits_that_an_entry_does_not_have_are_none():
    upper, *_ = explain(Tables("4-level"))
    assert (upper.dirty, upper.global_, upper.page_size) == (None, None, None)
    pdpte, pde, _ = explain(Tables("PAE"))
    assert (pdpte.writable, pdpte.user, pdpte.accessed, pdpte.nx) == (None, None, None, None)
    assert (pde.writable, pde.user, pde.accessed, pde.nx) == (True, True, False, False)
    assert explain(Tables("4-level", no_efer=NXE))[-1].nx is None
    assert explain(Tables("32-bit"))[-1].nx is None


def test_a_large_page_ends_the_list_with_its_size_and_address():
    tables = Tables("32-bit PSE", leaf="PDE")
    tables["PDE"] = 0x0040_0000 | 0x12 << 13 | PS | FULL
    (pde,) = explain(tables)
    assert (pde.leaf, pde.page_size, pde.address) == (True, 4 << 20, 0x12_0040_0000)
    last = explain(Tables("4-level", leaf="PDPTE"))[-1]
    assert (last.name, last.page_size) == ("PDPTE", 1 << 30)


def test_the_list_ends_at_the_entry_that_stops_the_walk():
    tables = Tables("4-level")
    tables["PDPTE"] = 0
    assert [entry.name for entry in explain(tables)] == ["PML4E", "PDPTE"]
    tables["PML4E"] |= PS
    assert [(entry.name, entry.reserved) for entry in explain(tables)] == [("PML4E", PS)]


def test_explaining_changes_nothing_and_asks_no_rights():
    tables = Tables("4-level", cr4=SMAP)
    tables["PTE"] = PAGE | P | XD
    explain(tables)
    assert tables.memory.stores == []
    assert tables.gva == GVA["4-level"]
