"""Images: what is loaded where, and that nothing hostile gets further than an ImageError."""

import os
import struct
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.errors import ImageError
from vmm.guest.elf import parse_elf
from vmm.guest.image import load_image
from vmm.guest.manifest import Image
from vmm.guest.symbols import Rank, Symbol, Symbols, read_symbols_file

from .elf_builder import EHDR, PHDR, Elf, Load

MEMORY = 0x100000
FUNC, LOCAL_FUNC, FILE, SECTION, OBJECT = 0x12, 0x02, 0x04, 0x03, 0x11
ABS = 0xFFF1

TWO_LOADS = [
    Load(0x20000, b"data", flags=6, memsz=0x3000),
    Load(0x10000, b"\x90" * 0x1800 + b"\xf4", flags=5),
]


def parse(elf, memory=MEMORY):
    return parse_elf(elf if isinstance(elf, bytes) else elf.build(), "guest.elf", memory)


def test_segments_lie_at_their_physical_address_in_order():
    image = parse(Elf(TWO_LOADS, entry=0x10010))
    code, data = image.segments
    assert (code.gpa, code.memory_size, code.data) == (0x10000, 0x1801, b"\x90" * 0x1800 + b"\xf4")
    assert (code.readable, code.writable, code.executable) == (True, False, True)
    assert (data.gpa, data.memory_size, data.data) == (0x20000, 0x3000, b"data")
    assert (data.readable, data.writable, data.executable) == (True, True, False)
    assert image.entry == 0x10010


def test_only_frames_of_executable_segments_are_code():
    assert parse(Elf(TWO_LOADS)).code_frames() == (0x10000, 0x11000)


def test_an_executable_segment_makes_code_of_the_frames_that_it_only_touches():
    assert parse(Elf([Load(0x10FFF, b"\x90\xf4")])).code_frames() == (0x10000, 0x11000)


def test_an_image_holds_what_came_from_the_file_and_not_the_zeros_after_it():
    image = parse(Elf(TWO_LOADS))
    assert [image.holds(gpa) for gpa in (0xFFFF, 0x10000, 0x20003, 0x20004)] == [False, True, True, False]


def test_a_shared_object_is_loaded_at_its_physical_address():
    image = parse(Elf([Load(0x30000, b"\xf4", vaddr=0xFFFF_FFFF_8000_0000)], type=3))
    assert (image.segments[0].gpa, image.segments[0].gva) == (0x30000, 0xFFFF_FFFF_8000_0000)


def test_headers_of_other_types_and_empty_segments_are_passed_over():
    image = parse(Elf([Load(type=4, offset=1 << 60), Load(0x50000, b""), Load()]))
    assert len(image.segments) == 1


def test_no_entry_point_is_none():
    assert parse(Elf(entry=0)).entry is None


def test_segments_may_touch_and_may_end_with_ram():
    loads = [Load(0x10000, b"a" * 16), Load(0x10010, b"b"), Load(MEMORY - 16, b"", memsz=16)]
    assert len(parse(Elf(loads)).segments) == 3


# The hostile files: (what is built, what the message says of it).
BAD = [
    (b"", "not an ELF file"),
    (b"MZ" + bytes(100), "not an ELF file"),
    (b"\x7fELF\x02\x01\x01", "truncated"),
    (Elf().build()[:63], "truncated"),
    (Elf().build()[:100], "program header 0 is cut off"),
    (Elf().build()[:64], "beyond the end"),
    (Elf().build()[:-1], "segment 0 ends at"),
    (Elf(ident=b"\x7fELF\x01\x01\x01" + bytes(9)), "not 64-bit"),
    (Elf(ident=b"\x7fELF\x02\x02\x01" + bytes(9)), "not little-endian"),
    (Elf(ident=b"\x7fELF\x02\x01\x00" + bytes(9)), "version 0"),
    (Elf(machine=3), "not x86-64"),
    (Elf(machine=0xFEED), "not x86-64"),
    (Elf(type=1), "not an executable"),
    (Elf(type=4), "not an executable"),
    (Elf(type=0xBEEF), "not an executable"),
    (Elf(version=2), "version"),
    (Elf(phentsize=32), "32 bytes instead of 56"),
    (Elf(phnum=0), "no program headers"),
    (Elf(phnum=129), "more than 128"),
    (Elf(phnum=0xFFFF), "more than 128"),
    (Elf(phnum=5), "program header"),
    (Elf([Load(type=2)]), "nothing to load"),
    (Elf([Load(offset=1 << 63)]), "of the file"),
    (Elf([Load(offset=(1 << 64) - 1)]), "of the file"),
    (Elf([Load(filesz=0x8000, memsz=0x8000)]), "of the file"),
    (Elf([Load(memsz=1)]), "0x2 bytes of file for 0x1"),
    (Elf([Load(filesz=(1 << 64) - 1)]), "of file for"),
    (Elf([Load(0x10000, vaddr=(1 << 64) - 1)]), "wraps around: p_vaddr"),
    (Elf([Load((1 << 64) - 1, vaddr=0)]), "wraps around: p_paddr"),
    (Elf([Load(0x10000, memsz=(1 << 64) - 1, vaddr=0)]), "wraps around: p_paddr"),
    (Elf([Load(MEMORY)]), "RAM ends at 0x100000"),
    (Elf([Load(MEMORY - 1)]), "RAM ends at 0x100000"),
    (Elf([Load(0x10000, memsz=MEMORY)]), "RAM ends at 0x100000"),
    (Elf([Load(0x10000, b"a" * 17), Load(0x10010)]), "overlap at physical address 0x10010"),
    (Elf([Load(0x10000), Load(0x10000)]), "overlap"),
    (Elf(symbols=[("main", FUNC, 1, 0x10000)], shentsize=40), "40 bytes instead of 64"),
    (Elf(symbols=[("main", FUNC, 1, 0x10000)], shnum=5000), "more than 4096"),
    (Elf(symbols=[("main", FUNC, 1, 0x10000)], shnum=4), "beyond the end"),
    (Elf(symbols=[("main", FUNC, 1, 0x10000)]).build()[:-1], "section header 2 is cut off"),
    (Elf(symbols=[("main", FUNC, 1, 0x10000)], symbol_entsize=0), "24 bytes each"),
    (Elf(symbols=[("main", FUNC, 1, 0x10000)], symbol_entsize=25), "24 bytes each"),
    (Elf(symbols=[("main", FUNC, 1, 0x10000)], symbol_link=1), "no string table"),
    (Elf(symbols=[("main", FUNC, 1, 0x10000)], symbol_link=1 << 31), "no string table"),
    (Elf(symbols=[("main", FUNC, 1, 0x10000)], name_offset=1 << 30), "outside of the string table"),
]


@pytest.mark.parametrize(("elf", "says"), BAD, ids=[f"{i}-{row[1]}" for i, row in enumerate(BAD)])
def test_a_hostile_elf_is_refused(elf, says):
    with pytest.raises(ImageError) as caught:
        parse(elf)
    assert caught.value.where == "guest.elf"
    assert says in caught.value.what
    assert str(caught.value).isprintable()


GOOD = Elf(
    [*TWO_LOADS, Load(0x40000, b"\xcc" * 64, flags=7, memsz=128)],
    symbols=[("start", FUNC, 1, 0x10000), ("inner", LOCAL_FUNC, 1, 0x10010), ("PORT", FUNC, ABS, 0xF4)],
).build()
FIELDS = [0, *range(4, EHDR.size + 3 * PHDR.size), *range(len(GOOD) - 300, len(GOOD))]
NASTY = [
    0,
    1,
    0x7F,
    0xFF,
    0xFFFF,
    *(1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1, (1 << 64) - 0x1000),
]
CHANGES = st.tuples(st.sampled_from(FIELDS), st.sampled_from([1, 2, 4, 8]), st.sampled_from(NASTY))


@given(
    st.lists(CHANGES, max_size=5),
    st.one_of(st.none(), st.integers(0, len(GOOD))),
)
@settings(max_examples=1500, deadline=1000)
def test_mutated_elf_files_give_an_image_in_ram_or_an_image_error(changes, cut):
    data = bytearray(GOOD)
    for place, size, value in changes:
        data[place : place + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    check_parses_safely(bytes(data[:cut]))


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=1000)
def test_noise_behind_the_magic_is_an_image_error(noise):
    check_parses_safely(b"\x7fELF\x02\x01\x01" + bytes(9) + noise)


def check_parses_safely(data):
    refused = None
    try:
        image = parse(data)
    except ImageError as error:
        refused = str(error)
    if refused is not None:
        assert refused.isprintable()
        return
    previous = 0
    for segment in image.segments:
        assert previous <= segment.gpa
        assert len(segment.data) <= segment.memory_size
        previous = segment.end
    assert previous <= MEMORY
    assert all(name.isprintable() for name in image.symbols)


def test_a_million_claimed_bytes_and_symbols_cost_neither_time_nor_memory():
    bombs = [
        Elf([Load(0x10000, memsz=1 << 62, filesz=1 << 62)]),
        Elf([Load(0x1000 * i, b"", memsz=1 << 40) for i in range(128)]),
        # All names lie in one long run without an end.
        Elf(symbols=[("", FUNC, 1, 0)] * 20_000, names_in_front=b"A" * (8 << 20), name_offset=-(8 << 20)),
    ]
    files = [bomb.build() for bomb in bombs]
    before = time.process_time()
    tracemalloc.start()
    for file in files:
        check_parses_safely(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - before < 3
    assert peak < 32 << 20


# Symbols


def symbols(*entries):
    return parse(Elf(TWO_LOADS, symbols=list(entries))).symbols


def test_symbols_name_addresses_and_addresses_belong_to_symbols():
    table = symbols(("start", FUNC, 1, 0x10000), ("loop", LOCAL_FUNC, 1, 0x10010))
    assert table.address("loop") == 0x10010
    assert table.address("other") is None
    assert table.lookup(0x1000F) == ("start", 0xF)
    assert table.lookup(0x10010) == ("loop", 0)
    assert table.label(0x10012) == "loop+0x2"
    assert list(table) == ["start", "loop"]


def test_no_symbol_reaches_beyond_the_segment_that_holds_it():
    table = symbols(("start", FUNC, 1, 0x10000))
    assert table.lookup(0x11800) == ("start", 0x1800)
    assert table.lookup(0x11801) is None
    assert table.lookup(0x20000) is None
    assert table.lookup(0xFFFF) is None


def test_constants_are_found_by_name_only():
    table = symbols(("PORT", FUNC, ABS, 0x10010), ("start", FUNC, 1, 0x10000))
    assert table.address("PORT") == 0x10010
    assert table.lookup(0x10010) == ("start", 0x10)


def test_at_one_address_a_global_name_is_preferred_to_a_local_and_that_to_a_linkers_mark():
    assert symbols(("a", LOCAL_FUNC, 1, 0x10000), ("b", FUNC, 1, 0x10000)).label(0x10000) == "b"
    assert symbols(("_end", FUNC, 1, 0x10000), ("a", LOCAL_FUNC, 1, 0x10000)).label(0x10000) == "a"


def test_what_belongs_to_an_object_is_data():
    table = symbols(("start", FUNC, 1, 0x10000), ("table", OBJECT, 1, 0x10010), ("more", FUNC, 1, 0x10020))
    assert [address for address in range(0x10000, 0x10030) if table.is_data(address)] == list(range(0x10010, 0x10020))
    assert not table.is_data(0x20000)


def test_files_sections_undefined_and_nameless_symbols_name_nothing():
    nameless = [(".text", SECTION, 1, 0x10000), ("ext", FUNC, 0, 0), ("", FUNC, 1, 0x10000)]
    assert len(symbols(("f.c", FILE, ABS, 0), *nameless)) == 0


def test_names_cannot_drive_a_terminal():
    assert list(symbols(("a\x1b[2J", FUNC, 1, 0x10000))) == ["a\\x1b[2J"]


@given(
    st.dictionaries(st.integers(0, 200), st.text("ab", min_size=1, max_size=6), max_size=20),
    st.integers(-5, 260),
)
def test_lookup_agrees_with_a_search_through_all_symbols(places, address):
    extents = [(0, 50), (60, 120), (120, 150)]
    table = Symbols([Symbol(f"{name}{place}", place) for place, name in places.items()], extents)

    def extent(place):
        return next((e for e in extents if e[0] <= place < e[1]), (place, place + 1))

    below = [place for place in places if place <= address]
    expected = None
    if below and (max(below) == address or address < extent(max(below))[1]):
        expected = (f"{places[max(below)]}{max(below)}", address - max(below))
    assert table.lookup(address) == expected


# Flat images


def flat(tmp_path, data=b"\x90\xf4", load=0x1000, symbols=None, memory=0x4000):
    (tmp_path / "image.bin").write_bytes(data)
    return load_image(Image("flat", tmp_path / "image.bin", load, symbols), memory)


def test_a_flat_image_is_one_segment_that_may_do_everything(tmp_path):
    image = flat(tmp_path)
    (segment,) = image.segments
    assert (segment.gpa, segment.data, segment.memory_size) == (0x1000, b"\x90\xf4", 2)
    assert (segment.readable, segment.writable, segment.executable) == (True, True, True)
    assert image.entry is None


def test_a_flat_image_may_fill_ram_to_its_end(tmp_path):
    assert flat(tmp_path, bytes(0x3000)).segments[0].end == 0x4000


@pytest.mark.parametrize(
    ("data", "says"), [(b"", "empty"), (bytes(0x3001), "out of RAM"), (bytes(0x4001), "larger")]
)
def test_a_flat_image_that_does_not_fit_is_refused(tmp_path, data, says):
    with pytest.raises(ImageError, match=says):
        flat(tmp_path, data)


def test_a_missing_image_says_which_key_to_correct(tmp_path):
    with pytest.raises(ImageError) as caught:
        load_image(Image("flat", tmp_path / "none.bin", 0), 0x1000)
    assert caught.value.where == str(tmp_path / "none.bin")
    assert "[image].file" in caught.value.fix


@pytest.mark.parametrize("name", [os.devnull, "."])
def test_an_image_that_is_no_regular_file_is_refused(tmp_path, name):
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(Image("flat", tmp_path / name, 0), 0x1000)


def test_a_symbols_file_is_what_nm_prints(tmp_path):
    path = tmp_path / "image.sym"
    lines = [
        "# names",
        "0000000000001000 T start",
        "1001 next",
        "0x1001 t local",
        "00f4 a PORT",
        "   U ext",
        "",
    ]
    path.write_text("\n".join(lines))
    table = flat(tmp_path, symbols=path).symbols
    assert [table.address(n) for n in ("start", "next", "local", "PORT")] == [0x1000, 0x1001, 0x1001, 0xF4]
    assert table.label(0x1001) == "next"
    assert table.lookup(0x1002) is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("start", "not a symbol"),
        ("1000 T a b", "not a symbol"),
        ("1000 TT a", "not a symbol"),
        ("zz T a", "not an address"),
        ("-1 T a", "64 bits"),
        ("1" + "0" * 16 + " T a", "64 bits"),
        ("\x1b[2J T a", "not an address"),
    ],
)
def test_a_bad_line_of_a_symbols_file_is_named(tmp_path, line, says):
    path = tmp_path / "image.sym"
    path.write_text(f"1000 T ok\n{line}\n")
    with pytest.raises(ImageError) as caught:
        read_symbols_file(path, [])
    assert caught.value.where == f"{path}:2"
    assert says in caught.value.what
    assert str(caught.value).isprintable()


def test_letters_of_a_symbols_file_tell_data_from_code(tmp_path):
    path = tmp_path / "image.sym"
    path.write_text("1000 T code\n1010 D table\n1020 t more\n1030 r text\n1040 b buffer\n1050 untold\n")
    table = read_symbols_file(path, [(0x1000, 0x2000)])
    assert [table.is_data(address) for address in range(0x1000, 0x1060, 16)] == [False, True, False, True, True, False]


def test_ranks_are_in_order_of_preference():
    assert Rank.GLOBAL < Rank.LOCAL < Rank.MARK < Rank.CONSTANT


def test_the_builder_makes_what_the_format_says():
    assert struct.unpack_from("<H", Elf().build(), 18) == (62,)
