"""Multiboot headers and what they say goes where; nothing hostile gets further than an ImageError."""

import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiboot_images import ENTRY, LOAD, MAGIC, MEMORY, elf32, flat, header

from vmm.errors import ImageError
from vmm.guest.multiboot_image import SEARCHED, find_header, near_miss, read_multiboot_image

from .elf_builder import Elf, Load

U32 = (1 << 32) - 1
CODE = b"\xfa\xf4"


def read(image, memory=MEMORY):
    return read_multiboot_image(image, "kernel", memory)


class TestHeader:
    @pytest.mark.parametrize("at", [0, 4, 1020, SEARCHED - 12])
    def test_it_lies_on_any_multiple_of_4_of_the_first_8_kib(self, at):
        assert find_header(bytes(at) + header(0)) == at

    @pytest.mark.parametrize("at", [1, 2, 3, 1022, SEARCHED - 8, SEARCHED])
    def test_and_nowhere_else(self, at):
        assert find_header(bytes(at) + header(0) + bytes(64)) is None

    def test_a_wrong_checksum_makes_it_none_and_the_search_goes_on(self):
        assert find_header(header(0, checksum=1) + header(3)) == 12

    def test_the_first_one_counts(self):
        assert find_header(bytes(8) + header(0) + header(3)) == 8

    @pytest.mark.parametrize("size", range(12))
    def test_a_file_that_ends_within_it_has_none(self, size):
        assert find_header(header(0)[:size]) is None

    @pytest.mark.parametrize(
        ("head", "says"),
        [
            (bytes(8) + header(3, checksum=7), "at 0x8 has the checksum 0x7, not 0xe4524ffb"),
            (bytes(6) + header(3), "at 0x6 is not on a multiple of 4"),
            (struct.pack("<4I", 0xE85250D6, 0, 16, -(0xE85250D6 + 16) & U32), "is of version 2, not 1"),
            (b"", None),
            (bytes(SEARCHED), None),
            (header(0)[:11], None),
            (bytes(SEARCHED) + header(0, checksum=1), None),
        ],
    )
    def test_what_is_nearly_one_is_told(self, head, says):
        assert near_miss(head) == says or says in near_miss(head)


class TestFlat:
    def test_all_of_the_file_goes_to_its_address(self):
        image = flat(CODE)
        (segment,) = read(image).segments
        assert (segment.gpa, segment.data, segment.memory_size) == (LOAD, image, len(image))
        assert read(image).entry == ENTRY

    def test_what_comes_before_the_load_address_is_left_out(self):
        image = flat(CODE, before=512, header=LOAD, entry=ENTRY)
        (segment,) = read(image).segments
        assert (segment.gpa, segment.data) == (LOAD, image[512:])

    def test_the_load_address_may_be_below_that_of_the_header(self):
        image = flat(CODE, before=512, header=LOAD + 0x100, entry=LOAD + 0x120)
        assert read(image).segments[0].data == image[0x100:]

    def test_load_end_and_bss_end_bound_it(self):
        image = flat(CODE + b"symbols", load_end=ENTRY + 2, bss_end=ENTRY + 0x1000)
        (segment,) = read(image).segments
        assert segment.data == image[:34]
        assert segment.end == ENTRY + 0x1000

    def test_it_may_end_with_ram(self):
        assert read(flat(CODE, bss_end=MEMORY)).segments[0].end == MEMORY

    def test_it_may_lie_in_low_memory(self):
        low = {"header": 0x8000, "load": 0x8000, "entry": 0x8020}
        assert read(flat(CODE, **low, bss_end=0x9F000)).entry == 0x8020

    def test_addresses_count_for_an_elf_file_too(self):
        """Flag 16 wins, as the specification says."""
        elf = Elf([Load(0x300000)]).build()
        data = elf + bytes(-len(elf) % 4)
        image = data + header(0x10003, (LOAD + len(data), LOAD, 0, 0, LOAD + len(data)))
        assert read(image).segments[0].gpa == LOAD

    @pytest.mark.parametrize("flags", [0x10000, 0x10001, 0x10002, 0x10003, 0xFFFF0003])
    def test_what_is_asked_for_is_given_and_optional_features_are_not_needed(self, flags):
        assert read(flat(CODE, flags=flags)).entry == ENTRY


BAD = [
    ({"flags": 0x10007}, "wants a video mode"),
    ({"flags": 0x10008}, "requires features that are unknown, by flags 3"),
    ({"flags": 0x18010}, "unknown, by flags 4, 15"),
    ({"flags": 3}, "no flag 16"),
    ({"header": LOAD - 4}, "header_addr 0xffffc with load_addr 0x100000; give the address of the header"),
    ({"header": LOAD + 4}, "header_addr 0x100004"),
    ({"header": U32}, "header_addr 0xffffffff"),
    ({"load": 0}, "header_addr 0x100000 with load_addr 0x0"),
    ({"load": U32}, "load_addr 0xffffffff"),
    ({"load_end": LOAD}, "load_end_addr 0x100000 is not above"),
    ({"load_end": 1}, "load_end_addr 0x1 is not above"),
    ({"load_end": LOAD + 35}, "asks for 0x23 bytes of the file, which has 0x22; the file is truncated"),
    ({"load_end": U32}, "asks for 0xffefffff bytes"),
    ({"bss_end": LOAD + 33}, "bss_end_addr 0x100021 is below 0x100022"),
    ({"bss_end": 1}, "bss_end_addr 0x1 is below"),
    ({"bss_end": MEMORY + 1}, "reaches from 0x100000 to 0x400001, and RAM ends at 0x400000; give it --memory 6M"),
    ({"bss_end": U32}, "to 0xffffffff, and RAM ends"),
    ({"header": 0xF0000000, "load": 0xF0000000}, "RAM ends at 0x400000"),
    ({"header": 0xFFFFFFF0, "load": 0xFFFFFFF0}, "to 0x100000012, and RAM ends"),
    ({"header": 0x9EFF0, "load": 0x9EFF0}, "occupies 0x9eff0 to 0x9f012, and the boot information is at 0x9f000"),
    ({"header": 0x8000, "load": 0x8000, "bss_end": 0x200000}, "the boot information is at 0x9f000"),
    ({"entry": LOAD - 1}, "the entry point 0xfffff is outside of the image"),
    ({"entry": LOAD + 34}, "the entry point 0x100022 is outside"),
    ({"entry": 0}, "the entry point 0x0 is outside"),
    ({"entry": LOAD + 0x100, "bss_end": LOAD + 0x200}, "outside of the image"),
    ({"entry": U32}, "the entry point 0xffffffff is outside"),
]


@pytest.mark.parametrize(("fields", "says"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_header_is_refused_in_one_line(fields, says):
    with pytest.raises(ImageError) as caught:
        read(flat(CODE, **fields))
    assert says in str(caught.value)
    assert caught.value.where.startswith("kernel")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("size", range(12, 32))
def test_a_file_that_ends_within_the_addresses_is_refused(size):
    with pytest.raises(ImageError, match="ends within its addresses"):
        read(flat(CODE)[:size])


class TestElf:
    def test_elf32_goes_to_its_physical_addresses(self):
        image = read(elf32("cli; hlt"))
        assert [segment.gpa for segment in image.segments] == [LOAD]
        assert image.entry == LOAD + 12

    def test_an_entry_point_is_virtual_if_it_is_an_address_of_the_image(self):
        """As GRUB and QEMU take it: kernels of the higher half are entered before there is paging."""
        high = Load(LOAD, header(3) + CODE, vaddr=0xC0100000)
        assert read(Elf([high], bits=32, machine=3, entry=0xC010000C).build()).entry == LOAD + 12

    def test_and_else_physical(self):
        high = Load(LOAD, header(3) + CODE, vaddr=0xC0100000)
        assert read(Elf([high], bits=32, machine=3, entry=LOAD + 12).build()).entry == LOAD + 12

    def test_elf64_is_entered_the_same_way(self):
        high = Load(LOAD, header(3) + CODE, vaddr=0xFFFF_FFFF_8010_0000)
        assert read(Elf([high], entry=0xFFFF_FFFF_8010_000C).build()).entry == LOAD + 12

    def test_symbols_of_elf32_are_known(self):
        data = header(3) + CODE
        elf = Elf([Load(LOAD, data)], bits=32, machine=3, entry=LOAD + 12, symbols=[("start", 0x12, 1, LOAD + 12)])
        elf.symbol_entsize = 16
        symbols = read(elf.build()).symbols
        assert symbols.address("start") == LOAD + 12
        assert symbols.label(LOAD + 13) == "start+0x1"

    @pytest.mark.parametrize(
        ("elf", "says"),
        [
            (Elf([Load(MEMORY - 1, header(3))], bits=32, machine=3), "give it more --memory"),
            (Elf([Load(LOAD, header(3)), Load(LOAD + 11, CODE)], bits=32, machine=3), "overlap at physical address"),
            (Elf([Load(LOAD, header(3), memsz=U32)], bits=32, machine=3), "RAM ends at 0x400000"),
            (Elf([Load(U32, header(3))], bits=32, machine=3), "RAM ends at"),
            (Elf([Load(LOAD, header(3), filesz=0x1000, memsz=0x1000)], bits=32, machine=3), "truncated or damaged"),
            (Elf([Load(LOAD, header(3), memsz=4)], bits=32, machine=3), "0xc bytes of file for 0x4 of memory"),
            (Elf([Load(0x9F000, header(3))], bits=32, machine=3), "the boot information is at 0x9f000"),
            (Elf([Load(LOAD, header(3))], bits=32, machine=3, entry=LOAD + 12), "0x10000c is outside of the image"),
            (Elf([Load(LOAD, header(3))], bits=32, machine=3, entry=0), "no entry point"),
            (Elf([Load(LOAD, header(3))], bits=32, machine=40), "is not i386"),
            (Elf([Load(LOAD, header(3))], bits=64, machine=3), "is not x86-64"),
            (Elf([Load(LOAD, header(3))], bits=32, machine=3, type=1), "is not an executable"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_bad_one_is_refused_in_one_line(self, elf, says):
        with pytest.raises(ImageError) as caught:
            read(elf.build())
        assert says in str(caught.value)
        assert str(caught.value).isprintable()

    def test_segments_that_overlap_are_refused_before_they_are_copied(self):
        """A hundred headers that all want the same mebibytes of the file cost nothing."""
        big = 1 << 20
        loads = [Load(LOAD + number, b"", memsz=big, filesz=big, offset=0) for number in range(100)]
        image = Elf(loads, bits=32, machine=3).build()
        image += bytes(-len(image) % 4) + header(3) + bytes(big)
        tracemalloc.start()
        try:
            with pytest.raises(ImageError, match="overlap"):
                read(image)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < big


ADDRESS = st.one_of(st.integers(0, U32), st.integers(LOAD - 64, LOAD + 0x200), st.sampled_from([0, 1, 0x9F000, MEMORY]))


def loads_or_is_refused(data):
    """What is loaded lies in RAM, in order, apart from the boot information, and is entered inside."""
    try:
        image = read(data)
    except ImageError as error:
        return str(error).isprintable()
    assert all(segment.gpa >= 0 and segment.end <= MEMORY for segment in image.segments)
    assert all(len(segment.data) <= segment.memory_size for segment in image.segments)
    assert all(a.end <= b.gpa for a, b in zip(image.segments, image.segments[1:], strict=False))
    assert all(segment.end <= 0x9F000 or segment.gpa >= 0xA0000 for segment in image.segments)
    return image.holds(image.entry)


@settings(max_examples=400, deadline=None)
@given(
    addresses=st.tuples(*[ADDRESS] * 5),
    flags=st.one_of(st.just(0x10003), st.integers(0, U32)),
    before=st.integers(0, 100).map(lambda n: n * 4),
    cut=st.integers(0, 200),
)
def test_no_header_does_more_than_load_or_be_refused(addresses, flags, before, cut):
    image = bytes(before) + header(flags, addresses) + bytes(100)
    assert loads_or_is_refused(image[: len(image) - cut])


@settings(max_examples=400, deadline=None)
@given(
    bits=st.sampled_from([32, 64]),
    places=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 60),
)
def test_no_elf_file_does_more_than_load_or_be_refused(bits, places, cut):
    elf = Elf([Load(LOAD, header(3) + CODE), Load(LOAD + 0x1000, b"data")], bits=bits, machine=3 if bits == 32 else 62)
    elf.entry = LOAD + 12
    image = bytearray(elf.build())
    for at, value in places:
        image[at % len(image)] = value
    assert loads_or_is_refused(bytes(image[: len(image) - cut]))


def test_the_magic_is_that_of_the_specification():
    assert MAGIC.to_bytes(4, "little") == bytes.fromhex("02b0ad1b")
