"""Relocations, in every kind of table, and where they lead."""

import pytest
from audit_files import (
    ANDROID_RELA,
    ANDROID_RELASZ,
    DATA,
    FLAGS,
    FORMATS,
    JMPREL,
    MIPS,
    PLTREL,
    PLTRELSZ,
    REL,
    RELA,
    RELASZ,
    RELR,
    RELRO_HEADER,
    RELRSZ,
    RELSZ,
    STRTAB,
    SYMTAB,
    TEXT,
    TEXTREL,
    R,
    W,
    dynamic,
    elf,
    found,
    image_of,
    packed,
    rel,
    relr,
    rules,
)
from guest.elf_builder import Load, Section
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.errors import ImageError

RELA_TAGS = [(RELA, "rela"), (RELASZ, "len rela")]


def with_rela(*relocations, tags=(), blobs=None, **options):
    """A file with a RELA table of (address, symbol, type)."""
    table = rel(elf(**options), *relocations, addend=0x55)
    return dynamic([*RELA_TAGS, *tags], {"rela": table, **(blobs or {})}, **options)


class TestTextRelocations:
    @pytest.mark.parametrize(("bits", "order"), FORMATS)
    @pytest.mark.parametrize(
        ("address", "expected"),
        [
            (TEXT, ["text-relocations"]),
            (TEXT + 63, ["text-relocations"]),
            (TEXT - 1, ["relocations-outside"]),
            (TEXT + 64, ["relocations-outside"]),
            (DATA, []),
            (DATA + 4, []),
            (DATA - 1, ["relocations-outside"]),
        ],
    )
    def test_the_loader_writes_to_data_only(self, address, expected, bits, order):
        assert rules(with_rela((address, 0, 8), bits=bits, order=order)) == expected

    @pytest.mark.parametrize(("flags", "text"), [(0, True), (1, True), (4, True), (5, True), (2, False), (6, False)])
    def test_all_memory_without_write_permission_is_text_to_a_loader(self, flags, text):
        """It makes all of it writable, code as well."""
        other = Load(0x40000, bytes(64), flags=flags)
        file = dynamic(RELA_TAGS, {"rela": rel(elf(), (0x40000, 0, 8), addend=0)}, loads=[other])
        assert ("text-relocations" in rules(file)) == text

    def test_what_becomes_read_only_after_relocation_is_writable_before(self):
        relro = Load(type=RELRO_HEADER, data=b"", paddr=DATA, flags=R, memsz=0x1000, filesz=0)
        file = dynamic(RELA_TAGS, {"rela": rel(elf(), (DATA + 8, 0, 8), addend=0)}, loads=[relro])
        assert rules(file) == []

    def test_where_segments_overlap_the_overlap_is_the_finding(self):
        under = Load(0x40000, bytes(64), flags=R)
        over = Load(0x40010, bytes(16), flags=R | W)
        place = rel(elf(), (0x40018, 0, 8), addend=0)
        for loads in ([under, over], [over, under]):
            assert "text-relocations" not in rules(dynamic(RELA_TAGS, {"rela": place}, loads=loads))

    def test_a_relocation_that_writes_nothing_is_none(self):
        assert rules(with_rela((TEXT, 0, 0), (0, 0, 0))) == []

    def test_the_finding_counts_and_shows_the_first(self):
        places = [(TEXT + index, 0, 8) for index in range(20)]
        finding = found(with_rela(*places))["text-relocations"]
        assert (finding.severity, finding.headers, finding.count) == ("error", (0,), 20)
        assert (finding.start, finding.end) == (TEXT, TEXT + 64)
        assert finding.what.startswith("20 relocations into segment 0, code without write permission (R-E)")
        assert [detail.address for detail in finding.details] == [TEXT + index for index in range(8)]

    def test_segments_are_told_apart(self):
        other = Load(0x40000, bytes(64), flags=R)
        places = rel(elf(), (TEXT, 0, 8), (0x40000, 0, 8), (0x40008, 0, 8), addend=0)
        file = image_of(dynamic(RELA_TAGS, {"rela": places}, loads=[other]))
        from vmm.audit import findings

        assert [(f.headers, f.count) for f in findings(file)] == [((0,), 1), ((2,), 2)]

    @pytest.mark.parametrize(("bits", "order"), FORMATS)
    def test_names_of_the_symbol_the_section_and_the_type(self, bits, order):
        file = elf(bits=bits, order=order)
        entry = 24 if bits == 64 else 16
        blobs = {
            "sym": bytes(entry) + self.name(file, 1) + bytes(entry - 4),
            "str": b"\0target\x1b\0",
        }
        sections = [Section(".text", addr=TEXT, size=64, flags=6)]
        options = {"bits": bits, "order": order, "sections": sections, "tags": [(SYMTAB, "sym"), (STRTAB, "str")]}
        finding = found(with_rela((TEXT + 4, 1, 1), blobs=blobs, **options))["text-relocations"]
        assert finding.details[0].text == "DT_RELA R_X86_64_64 in .text against target\\x1b"

    @staticmethod
    def name(file, offset):
        return offset.to_bytes(4, "little" if file.order == "<" else "big")

    @pytest.mark.parametrize("tags", [[], [(SYMTAB, 1 << 40)], [(SYMTAB, DATA), (STRTAB, 1 << 63)]])
    def test_a_symbol_that_is_not_there_has_no_name(self, tags):
        finding = found(with_rela((TEXT, 0xFFFF_FFFF, 1), tags=tags))["text-relocations"]
        assert finding.details[0].text == "DT_RELA R_X86_64_64"


class TestDeclarations:
    @pytest.mark.parametrize(("bits", "order"), FORMATS)
    @pytest.mark.parametrize(
        ("tags", "names"),
        [
            ([(TEXTREL, 0)], "(DT_TEXTREL)"),
            ([(FLAGS, 4)], "(DF_TEXTREL)"),
            ([(FLAGS, 0xFF), (TEXTREL, 1)], "(DT_TEXTREL, DF_TEXTREL)"),
        ],
    )
    def test_the_dynamic_table_asks_for_text_relocations(self, tags, names, bits, order):
        finding = found(dynamic(tags, bits=bits, order=order))["text-relocations-declared"]
        assert (finding.severity, finding.headers, finding.start) == ("error", (2,), DATA)
        assert names in finding.what

    @pytest.mark.parametrize("flags", [0, 1, 2, 8, 0xFB])
    def test_other_flags_do_not(self, flags):
        assert rules(dynamic([(FLAGS, flags)])) == []

    def test_nothing_counts_behind_the_end_of_the_table(self):
        assert rules(dynamic([(0, 0), (TEXTREL, 0)])) == []

    def test_the_header_for_tools_does_not_hide_it_from_the_audit(self):
        """p_filesz of PT_DYNAMIC is 16 here; a loader reads on until DT_NULL."""
        file = dynamic([(FLAGS, 0), (TEXTREL, 0)])
        file.loads[2].filesz = file.loads[2].memsz = 16
        file.loads[2].offset = 0
        assert rules(file) == ["text-relocations-declared"]

    @pytest.mark.parametrize(("tags", "faults"), [([], True), ([(TEXTREL, 0)], False)])
    def test_relocations_without_the_declaration_fault(self, tags, faults):
        finding = found(with_rela((TEXT, 0, 8), tags=tags))["text-relocations"]
        assert ("faults" in finding.why) == faults


class TestTables:
    @pytest.mark.parametrize(("bits", "order"), FORMATS)
    def test_each_kind_of_table_is_read(self, bits, order):
        options = {"bits": bits, "order": order}
        file = elf(**options)
        blobs = {
            "rel": rel(file, (TEXT, 0, 8)),
            "rela": rel(file, (TEXT + 1, 0, 8), addend=0),
            "plt": rel(file, (TEXT + 2, 0, 7)),
            "relr": file.words(TEXT + 8, 0b101),
            "packed": packed([(TEXT + 3, 8)], seed=1),
        }
        tags = [(REL, "rel"), (RELSZ, "len rel"), *RELA_TAGS, (JMPREL, "plt"), (PLTRELSZ, "len plt"), (PLTREL, REL)]
        tags += [(RELR, "relr"), (RELRSZ, "len relr"), (ANDROID_RELA, "packed"), (ANDROID_RELASZ, "len packed")]
        image = image_of(dynamic(tags, blobs, **options))
        tables = {table.name: [entry.address for entry in table.entries] for table in image.relocations}
        assert tables == {
            "DT_REL": [TEXT],
            "DT_RELA": [TEXT + 1],
            "DT_JMPREL": [TEXT + 2],
            "DT_RELR": [TEXT + 8, TEXT + 8 + 2 * bits // 8],
            "DT_ANDROID_RELA": [TEXT + 3],
        }
        assert all(table.count == len(tables[table.name]) for table in image.relocations)

    def test_a_plt_table_that_is_part_of_another_counts_once(self):
        table = rel(elf(), (TEXT, 0, 8), (TEXT + 8, 0, 7), addend=0)
        blobs = {"rela": table[:24], "plt": table[24:]}
        tags = [(RELA, "rela"), (RELASZ, 48), (JMPREL, "plt"), (PLTRELSZ, 24), (PLTREL, RELA)]
        assert found(dynamic(tags, blobs))["text-relocations"].count == 2

    @pytest.mark.parametrize("order", ["<", ">"])
    def test_symbol_and_type_of_mips64(self, order):
        """r_info is not one number there: r_sym, r_ssym, r_type3, r_type2, r_type, one after the other."""
        symbol = (7).to_bytes(4, "little" if order == "<" else "big")
        file = elf(order=order, machine=MIPS)
        entry = file.words(TEXT) + symbol + bytes([0, 0, 18, 3])
        image = image_of(dynamic([(REL, "rel"), (RELSZ, 16)], {"rel": entry}, order=order, machine=MIPS))
        (relocation,) = image.relocations[0].entries
        assert (relocation.symbol, relocation.type & 0xFF) == (7, 3)

    def test_a_static_executable_tells_of_its_relocations_by_sections(self):
        table = rel(elf(), (TEXT, 0, 37), (DATA, 0, 0), addend=0)
        of_memory, of_tools = 2, 0
        section = Section(".rela.plt", type=4, flags=of_memory, data=table)
        finding = found(elf(sections=[section]))["text-relocations"]
        assert finding.details[0].text.startswith(".rela.plt R_X86_64_IRELATIVE")
        assert rules(elf(sections=[Section(".rela.text", type=4, flags=of_tools, data=table)])) == []

    def test_sections_are_not_asked_where_there_is_a_dynamic_table(self):
        table = rel(elf(), (TEXT, 0, 37), addend=0)
        assert rules(dynamic([], sections=[Section(".rela.plt", type=4, data=table)])) == []

    @given(st.sets(st.integers(0, 600), max_size=80), st.sampled_from(FORMATS))
    @settings(max_examples=200, deadline=None)
    def test_relr_gives_back_what_was_packed(self, places, form):
        bits, order = form
        addresses = [DATA + place * bits // 8 for place in sorted(places)]
        file = elf(bits=bits, order=order)
        words = file.words(*relr(addresses, bits // 8))
        image = image_of(dynamic([(RELR, "relr"), (RELRSZ, len(words))], {"relr": words}, bits=bits, order=order))
        assert [e.address for table in image.relocations for e in table.entries] == addresses
        assert sum(table.count for table in image.relocations) == len(addresses)

    @given(
        st.lists(st.tuples(st.integers(0, 1 << 40), st.sampled_from([8, 0x3_0000_0006, 0x9_0000_0001])), max_size=30),
        st.integers(0, 1 << 30),
    )
    @settings(max_examples=200, deadline=None)
    def test_android_tables_give_back_what_was_packed(self, relocations, seed):
        table = packed(relocations, seed)
        tags = [(ANDROID_RELA, "packed"), (ANDROID_RELASZ, len(table))]
        (read,) = image_of(dynamic(tags, {"packed": table})).relocations
        assert [(entry.address, entry.symbol << 32 | entry.type) for entry in read.entries] == relocations
        assert read.count == len(relocations)


BAD = [
    ([(RELA, 0x50000), (RELASZ, 24)], {}, "DT_RELA at 0x50000, of 0x18 bytes, lies in no segment"),
    ([(RELA, TEXT), (RELASZ, 65)], {}, "DT_RELA at 0x10000"),
    ([(RELA, TEXT), (RELASZ, (1 << 64) - 1)], {}, "DT_RELA at 0x10000"),
    ([(JMPREL, TEXT), (PLTRELSZ, 24)], {}, "DT_PLTREL says neither"),
    ([(JMPREL, TEXT), (PLTRELSZ, 24), (PLTREL, RELR)], {}, "DT_PLTREL says neither"),
    ([(ANDROID_RELA, TEXT), (ANDROID_RELASZ, 8)], {}, "DT_ANDROID_RELA does not begin with APS2"),
    ([(ANDROID_RELA, "p"), (ANDROID_RELASZ, 5)], {"p": b"APS2\x01"}, "DT_ANDROID_RELA breaks off"),
    ([(ANDROID_RELA, "p"), (ANDROID_RELASZ, 8)], {"p": b"APS2\x01\0\x02\x02"}, "a group of 2 relocations where 1"),
    ([(ANDROID_RELA, "p"), (ANDROID_RELASZ, 8)], {"p": b"APS2\x01\0\0\x02"}, "a group of 0 relocations where 1"),
    ([(ANDROID_RELA, "p"), (ANDROID_RELASZ, 24)], {"p": b"APS2" + b"\xff" * 20}, "more than 64 bits"),
    ([(ANDROID_RELA, "p"), (ANDROID_RELASZ, 6)], {"p": b"APS2\x7f\0"}, "DT_ANDROID_RELA has -1 relocations"),
    ([(0x1000 + i, 0) for i in range(20_000)], {}, "more than 16384 entries in the dynamic table"),
]


@pytest.mark.parametrize(("tags", "blobs", "says"), BAD, ids=[f"{i}-{row[2]}" for i, row in enumerate(BAD)])
def test_a_table_that_is_not_there_is_bad_input(tags, blobs, says):
    with pytest.raises(ImageError, match=says) as caught:
        image_of(dynamic(tags, blobs))
    assert str(caught.value).isprintable()


def test_a_dynamic_table_that_is_not_in_the_file_is_bad_input():
    file = dynamic([])
    file.loads[1].filesz, file.loads[1].memsz = 0, 0x1000
    with pytest.raises(ImageError, match="the dynamic table at 0x20000 lies in no segment"):
        image_of(file)


def test_two_dynamic_tables_are_bad_input():
    header = Load(type=2, data=b"", paddr=DATA, filesz=16, memsz=16)
    with pytest.raises(ImageError, match="2 PT_DYNAMIC headers"):
        image_of(dynamic([], loads=[header]))
