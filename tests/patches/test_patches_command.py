"""``vmm patches`` from the command line."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from attrs import evolve
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import DIRECT, POKE, at, fetch, injection, modification, physical, store, symbols_file, trace_file

from vmm.cli import main
from vmm.patches.joined import join
from vmm.patches.mechanism import Attributor
from vmm.patches.stores import Stores
from vmm.patches.summary import Summary
from vmm.trace.painter import Painter
from vmm.trace.reading import TraceReader

PLACE = at("patched_function")
JUMP = bytes.fromhex("e9fbffffff")
NOP = bytes.fromhex("0f1f440000")
RECORDS = [
    fetch(0x100_0000, at("_text")),
    injection(14, at("asm_exc_page_fault")),
    modification(store(PLACE, JUMP[:4], NOP[:4], callers=["text_poke_early", "apply_returns"])),
    modification(store(PLACE + 1, JUMP[1:], NOP[1:], callers=["text_poke_early", "apply_returns"])),
    modification(store(PLACE + 16, b"\xf0", b"\x3e", gva=POKE, callers=["__text_poke", "alternatives_smp_module_add"])),
    modification(store(PLACE + 32, b"\x90", b"\xcc", gva=DIRECT + physical(PLACE + 32), rip="free_reserved_area")),
    modification(evolve(store(PLACE + 64, b"\1\2", b"\3\4", cause="window"), gva=None, rip=None)),
    {"kind": "end", "reason": "halt", "rip": at("_text")},
]
TABLES = """
by mechanism                           patches  modifications       bytes
returns                                      1              2           8
SMP locks                                    1              1           1
by a window                                  1              1           2
reuse of memory                              1              1           1

by function                            patches  modifications       bytes
apply_returns                                1              2           8
alternatives_smp_module_add                  1              1           1
free_reserved_area                           1              1           1
not known                                    1              1           2

by mapping                             patches  modifications       bytes
the address that is executed                 1              2           8
not known                                    1              1           2
text_poke's temporary mapping                1              1           1
the kernel's direct map                      1              1           1
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace_file(tmp_path / "trace.jsonl", RECORDS)
    symbols_file(tmp_path / "map")
    return tmp_path


def vmm(*args: str):
    return CliRunner().invoke(main, ["patches", *args])


def refused(*args: str) -> str:
    result = vmm(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_summary_counts_everything_in_three_ways(files):
    result = vmm("trace.jsonl", "--symbols", "map")
    assert result.exit_code == 0
    assert "trace     trace.jsonl: 5 modifications in 4 patches\n" in result.output
    assert "symbols   map: 19, as they are\n" in result.output
    assert TABLES in result.output
    assert "windows   1 modification, 2 bytes: no instruction is known; boot with --attribute" in result.output


def test_a_kernel_that_was_moved_is_found(files):
    moved = 0x80_0000
    symbols_file(files / "moved", slide=-moved)
    result = vmm("trace.jsonl", "--symbols", "moved")
    assert "moved by 0x800000" in result.output
    assert TABLES in result.output
    assert TABLES in vmm("trace.jsonl", "--symbols", "moved", "--slide", hex(moved)).output


def test_without_symbols_it_says_so_and_counts_all_the_same(files):
    output = vmm("trace.jsonl").output
    assert "symbols   none, so that functions are not known; give --symbols\n" in output
    assert "by function" not in output
    assert re.search(r"^not known without symbols +1 +2 +8$", output, re.MULTILINE)


def test_the_list_shows_instructions_with_names(files):
    output = vmm("trace.jsonl", "--symbols", "map", "--list").output
    assert output.startswith(
        "3-4  patched_function: 5 bytes by apply_returns (returns)\n"
        f"    - jmp {PLACE:#x} <patched_function>"
    )
    assert "    + nop [rax+rax]" in output
    assert f"through text_poke's temporary mapping at {POKE:#x}\n    - lock " in output
    assert "patched_function+0x40: 2 bytes, by a window\n" in output


def test_a_trace_without_patches(files):
    trace_file(files / "none.jsonl", RECORDS[-1:])
    result = vmm("none.jsonl")
    assert result.exit_code == 0
    assert "0 modifications in 0 patches" in result.output


def test_a_trace_without_a_kernel_is_called_one(files):
    early = evolve(store(), gva=physical(PLACE), rip=0x200_0000, executed_at=None)
    trace_file(files / "early.jsonl", [fetch(physical(PLACE), physical(PLACE)), modification(early)])
    output = vmm("early.jsonl").output
    assert "kernel    none: nothing was executed in the upper half of the address space\n" in output
    assert re.search(r"^before a kernel +1 +1 +1$", output, re.MULTILINE)
    assert re.search(r"^an identity mapping +1 +1 +1$", output, re.MULTILINE)
    assert "kernel    none" not in vmm("trace.jsonl").output


def test_where_a_frame_is_executed_is_remembered(files):
    """text_poke's address space may not show that the frame is the kernel's: what came before does."""
    place = at("some_driver")
    poke = store(place, gva=POKE, callers=["__text_poke"])
    for first in (modification(store(place)), fetch(physical(place) & -0x1000, place & -0x1000)):
        trace_file(files / "known.jsonl", [*RECORDS[:2], first, modification(evolve(poke, executed_at=None))])
        output = vmm("known.jsonl", "--symbols", "map", "--list").output
        assert "some_driver: 1 byte, text_poke, for whom is not known, through text_poke's temporary mapping" in output
        assert f" at {POKE:#x}\n" in output


class TestBadInput:
    def test_a_trace_that_is_none(self, files):
        assert "missing.jsonl: cannot be read" in refused("missing.jsonl")
        (files / "other").write_text("hello\n")
        assert "other:1: expected a JSON object" in refused("other")
        assert "expected a header" in refused("map") or "expected a JSON object" in refused("map")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("gpa", None), ("gpa", -1), ("gpa", 1 << 64), ("gpa", True), ("gva", "x"), ("rip", 1.5), ("old", "zz"),
            ("old", "9090"), ("new", 7), ("cause", None), ("callers", 5), ("callers", [-1]), ("callers", [0] * 2000),
            ("aliases", [None]),
        ],
    )  # fmt: skip
    def test_a_record_that_is_none(self, files, key, value):
        trace_file(files / "bad.jsonl", [{**RECORDS[2], key: value}])
        line = refused("bad.jsonl")
        assert 'bad.jsonl:2: a modification without a usable "' in line

    def test_symbols_of_another_kernel(self, files):
        symbols_file(files / "other", slide=0x1234)
        assert "other: not the symbols of this kernel" in refused("trace.jsonl", "--symbols", "other")

    @pytest.mark.parametrize("slide", ["x", "", "1e6", hex(1 << 64)])
    def test_a_slide_that_is_none(self, files, slide):
        assert "is no slide" in refused("trace.jsonl", "--symbols", "map", "--slide", slide)

    def test_a_slide_without_symbols(self, files):
        assert "--slide: nothing to move; give --symbols as well" in refused("trace.jsonl", "--slide", "0")

    def test_a_file_of_symbols_that_is_none(self, files):
        assert "nowhere: cannot be read" in refused("trace.jsonl", "--symbols", "nowhere")


@given(st.lists(st.sampled_from(RECORDS[2:7]), max_size=30))
@settings(max_examples=50, deadline=None)
def test_each_table_adds_up_to_all_modifications(tmp_path_factory, records):
    path = trace_file(tmp_path_factory.mktemp("sums") / "trace", records)
    summary, attributor = Summary(), Attributor(None)
    with TraceReader(path) as reader:
        for patch in join(Stores(reader)):
            summary.add(patch, attributor.of(patch))
    assert summary.total.modifications == len(records)
    for table in (summary.mechanisms, summary.functions, summary.mappings):
        assert sum(count.modifications for count in table.values()) == len(records)
        assert sum(count.size for count in table.values()) == summary.total.size
    summary.show(Painter(StringIO().write, color=True), functions=True)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1 << 65),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=6),
    st.binary(max_size=6).map(bytes.hex),
    st.lists(st.integers(-1, 1 << 65), max_size=4),
)
KEYS = ("gpa", "gva", "rip", "old", "new", "cause", "callers", "aliases", "qualification", "number", "vector", "seq")


@given(
    st.lists(
        st.tuples(st.sampled_from(RECORDS), st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=2)), max_size=8
    ),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_whatever_records_hold_they_are_counted_or_refused_in_one_line(tmp_path_factory, changed, every):
    folder = tmp_path_factory.mktemp("any")
    path = trace_file(folder / "trace", [{**record, **other} for record, other in changed])
    symbols_file(folder / "map")
    result = vmm(str(path), "--symbols", str(folder / "map"), *(["--list"] if every else []))
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code in (0, 2)
    assert result.stderr.count("\n") == (result.exit_code == 2)
