"""Names for addresses of a kernel, and by how much it was moved."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import NAMES, TEXT, at, injection, store, symbols_file, trace_file
from traces import modification as record_of

from vmm.errors import InputError
from vmm.guest.symbols import Symbol, Symbols
from vmm.patches.symbols import KernelSymbols, find_slide, read_kernel_symbols
from vmm.trace.reading import TraceReader

MIB = 1 << 20
SLIDES = st.integers(0, 511).map(lambda number: number * 2 * MIB)


def slide_of(tmp_path, events, **options) -> int | None:
    symbols = read_kernel_symbols(symbols_file(tmp_path / "map", **options))
    with TraceReader(trace_file(tmp_path / "trace", [injection(*event) for event in events])) as reader:
        return find_slide(symbols, reader)


class TestLookUp:
    @given(st.sets(st.integers(0, 1 << 20), min_size=2), st.integers(0, 1 << 21), SLIDES)
    def test_an_address_belongs_to_the_nearest_symbol_below_it(self, offsets, offset, slide):
        symbols = Symbols([Symbol(f"s{each}", TEXT + each) for each in offsets], [(TEXT, TEXT + (1 << 21))])
        found = KernelSymbols("map", symbols, slide).lookup(TEXT + offset + slide)
        below = [each for each in offsets if each <= offset]
        expected = (f"s{max(below)}", offset - max(below)) if below and offset - max(below) < 1 << 16 else None
        assert found == expected

    def test_what_is_far_from_everything_has_no_name(self, tmp_path):
        symbols = read_kernel_symbols(symbols_file(tmp_path / "map"))
        assert symbols.label(at("patched_function", 4)) == "patched_function+0x4"
        assert symbols.label(at("patched_function")) == "patched_function"
        for address in (0, TEXT - 1, at("patched_function", 1 << 16), (1 << 64) - 1, 0x40_1000):
            assert symbols.lookup(address) is None

    def test_modules_come_from_proc_kallsyms(self, tmp_path):
        path = tmp_path / "kallsyms"
        path.write_text("ffffffff81000000 T _text\nffffffffc0000000 t helper\t[nf_tables]\n")
        assert read_kernel_symbols(path).label(0xFFFF_FFFF_C000_0010) == "helper+0x10"


class TestSlide:
    @given(number=st.integers(0, 511), vectors=st.lists(st.sampled_from([3, 14, 33, 48]), min_size=1, max_size=5))
    def test_it_is_found_by_where_events_are_delivered_to(self, number, vectors, tmp_path_factory):
        slide = number * 2 * MIB
        entries = {3: at("asm_exc_int3"), 14: at("asm_exc_page_fault"), 33: at("irq_entries_start", 8),
                   48: at("irq_entries_start", 128)}  # fmt: skip
        events = [(vector, entries[vector] + slide) for vector in vectors]
        assert slide_of(tmp_path_factory.mktemp("slide"), events) == slide

    def test_early_handlers_tell_as_well(self, tmp_path):
        assert slide_of(tmp_path, [(14, at("early_idt_handler_array", 14 * 9) + 6 * MIB)]) == 6 * MIB

    def test_what_comes_before_the_kernel_proper_does_not_count(self, tmp_path):
        assert slide_of(tmp_path, [(14, 0x1D6_0000)]) is None
        assert slide_of(tmp_path, [(14, 0x1D6_0000), (14, at("asm_exc_page_fault"))]) == 0

    @pytest.mark.parametrize(
        "entry", [at("asm_exc_page_fault", 0x10), at("asm_exc_page_fault") + MIB, at("asm_exc_page_fault") + (1 << 30)]
    )
    def test_symbols_of_another_kernel_are_refused(self, tmp_path, entry):
        with pytest.raises(InputError, match=f"whose entry for vector 14 is at {entry:#x}"):
            slide_of(tmp_path, [(14, entry)])

    def test_a_few_that_fit_by_chance_are_not_enough(self, tmp_path):
        wrong = [(14, at("asm_exc_page_fault", 0x10 * number)) for number in range(1, 5)]
        with pytest.raises(InputError, match="not the symbols of this kernel"):
            slide_of(tmp_path, [(14, at("asm_exc_page_fault")), *wrong])

    def test_without_deliveries_nobody_knows(self, tmp_path):
        with TraceReader(trace_file(tmp_path / "trace", [record_of(store())])) as reader:
            assert find_slide(read_kernel_symbols(symbols_file(tmp_path / "map")), reader) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no symbols of a kernel"),
        ("0000000000001000 T user\n0000000000002000 T code\n", "no symbols of a kernel"),
        ("0000000000000000 T _text\n0000000000000000 T _stext\n", "no symbols of a kernel"),
        ("ffffffffffffffff B The real System.map is in the linux-image-dbg package\n", ":1: not a symbol"),
        ("ffffffff81000000 T _text\nnonsense\n", ":2: not a symbol"),
        ("ffffffff81000000 T _text\nzzz T other\n", ":2: 'zzz' is not an address"),
        ("1ffffffff81000000 T _text\n", "more than 64 bits"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "map"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_kernel_symbols(path)


def test_the_names_of_the_made_up_kernel_are_all_there(tmp_path):
    assert len(read_kernel_symbols(symbols_file(tmp_path / "map"))) == len(NAMES)
