"""Segments that get into each other's way."""

import pytest
from audit_files import FORMATS, TEXT, R, W, X, elf, found, rules
from guest.elf_builder import Load
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.audit import Image, findings
from vmm.audit.model import Segment

#: The first byte of the file that belongs to the code segment of ``elf`` with three headers.
CODE_END = TEXT + 64


def load(start, size, flags=R, **more):
    return Load(start, b"", flags=flags, memsz=size, **more)


@pytest.mark.parametrize(("bits", "order"), FORMATS)
@pytest.mark.parametrize(
    ("start", "size", "flags", "expected"),
    [
        (TEXT + 63, 1, R, ["segments-overlap"]),
        (TEXT - 8, 9, R, ["segments-overlap", "segments-out-of-order"]),
        (TEXT - 8, 8, R, ["segments-out-of-order"]),
        (CODE_END, 1, R, []),
        (CODE_END, 1, R | X, []),
        (CODE_END, 1, R | W, ["page-writable-and-executable"]),
        (TEXT + 0xFFF, 1, R | W, ["page-writable-and-executable"]),
        (TEXT + 0x1000, 1, R | W, []),
        (TEXT - 1, 1, R | W, ["segments-out-of-order"]),
        (TEXT + 63, 1, R | W, ["segments-overlap"]),  # which says it all
    ],
)
def test_no_memory_belongs_to_two_segments(start, size, flags, expected, bits, order):
    assert rules(elf(load(start, size, flags), bits=bits, order=order)) == expected


def test_an_overlap_says_of_what_and_where():
    finding = found(elf(load(TEXT + 0x20, 0x1000, R | W)))["segments-overlap"]
    assert (finding.severity, finding.headers) == ("error", (0, 1))
    assert (finding.start, finding.end) == (TEXT + 0x20, TEXT + 0x40)
    assert "segments 0 (R-E) and 1 (RW-) overlap" in finding.what


def test_a_shared_page_is_named_by_its_addresses():
    finding = found(elf(load(TEXT + 0x800, 0x4000, R | W)))["page-writable-and-executable"]
    assert (finding.severity, finding.start, finding.end) == ("error", TEXT, TEXT + 0x1000)


@pytest.mark.parametrize(
    ("offset", "flags", "twice"),
    [(0, R | W, True), (63, R | W, True), (64, R | W, False), (-8, R | W, False), (-7, R | W, True), (0, R | X, False)],
)
def test_file_bytes_that_are_mapped_as_code_and_as_data(offset, flags, twice):
    code = elf(load(0x30000, 8)).build().index(b"\x90" * 64)
    alias = Load(0x30000, b"", flags=flags, offset=code + offset, filesz=8, memsz=8)
    assert ("file-bytes-mapped-twice" in rules(elf(alias))) == twice


def test_such_an_alias_is_a_note_with_the_addresses_of_the_code():
    code = elf(load(0x30000, 8)).build().index(b"\x90" * 64)
    alias = Load(0x30000, b"", flags=R | W, offset=code + 16, filesz=8, memsz=8)
    finding = found(elf(alias))["file-bytes-mapped-twice"]
    assert (finding.severity, finding.start, finding.end) == ("note", TEXT + 16, TEXT + 24)


def test_order_is_a_note():
    finding = found(elf(load(0x30000, 8), load(0x20000, 8)))["segments-out-of-order"]
    assert (finding.severity, finding.headers) == ("note", (1, 2))


@pytest.mark.parametrize(("bits", "order"), FORMATS)
def test_a_segment_holds_what_the_file_has_for_it(bits, order):
    small = Load(0x30000, b"12345678", memsz=7)
    beyond = Load(0x30000, b"", offset=0x10000, filesz=8, memsz=8)
    wrapping = Load((1 << bits) - 0x1000, b"", memsz=0x1001)
    for segment, rule in (
        (small, "segment-smaller-than-file-bytes"),
        (beyond, "segment-beyond-file"),
        (wrapping, "segment-beyond-address-space"),
    ):
        finding = found(elf(segment, bits=bits, order=order))[rule]
        assert (finding.severity, finding.headers) == ("error", (1,))


def test_the_limits_themselves_are_no_finding():
    last = Load((1 << 64) - 0x1000, b"", memsz=0x1000)
    file = elf(Load(0x30000, b"12345678", memsz=8), last)
    assert rules(file) == []
    assert rules(file.build()[:-1]) == ["segment-beyond-file"]


SEGMENTS = st.lists(
    st.builds(
        Segment,
        number=st.just(0),
        start=st.integers(0, 0x4000),
        size=st.integers(1, 0x2000),
        offset=st.integers(0, 64),
        file_size=st.integers(0, 32),
        readable=st.booleans(),
        writable=st.booleans(),
        executable=st.booleans(),
    ),
    max_size=5,
)


@given(SEGMENTS)
@settings(max_examples=400, deadline=None)
def test_every_byte_and_page_is_looked_at(segments):
    """Against going through all bytes, pages and file bytes one by one."""
    image = Image(64, "little", "EM_X86_64", "ET_EXEC", 0, 1 << 20, tuple(segments))
    found_rules = {str(finding.rule) for finding in findings(image)}
    memory = [set(range(s.start, s.start + s.size)) for s in segments]
    pages = [{address // 4096 for address in addresses} for addresses in memory]
    file = [set(range(s.offset, s.offset + s.file_size)) for s in segments]
    pairs = [(i, k) for i in range(len(segments)) for k in range(len(segments)) if i != k]
    split = [(i, k) for i, k in pairs if segments[i].writable and segments[k].executable]
    assert ("segments-overlap" in found_rules) == any(memory[i] & memory[k] for i, k in pairs)
    assert ("page-writable-and-executable" in found_rules) == any(
        pages[i] & pages[k] and not memory[i] & memory[k] for i, k in split
    )
    assert ("file-bytes-mapped-twice" in found_rules) == any(file[i] & file[k] for i, k in split)
    starts = [segment.start for segment in segments]
    assert ("segments-out-of-order" in found_rules) == (starts != sorted(starts))


def test_a_thousand_segments_in_one_place_make_a_finding_each_at_most():
    many = [load(0x30000 + index, 0x1000, R | W if index % 2 else R | X) for index in range(1000)]
    overlaps = [rule for rule in rules(elf(*many)) if rule == "segments-overlap"]
    assert len(overlaps) == 999
