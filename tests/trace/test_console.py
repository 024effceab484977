"""The console view: what people see of a run."""

import re

import pytest
import tiny
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st

from vmm.exits import EptViolation, Mtf
from vmm.guest.image import LoadedImage, Segment
from vmm.guest.loader import Guest, bundled_guests, load_guest
from vmm.guest.manifest import CpuSpec, Schedule
from vmm.guest.symbols import Symbol, Symbols
from vmm.machine import Machine
from vmm.trace.console import LIMIT, ConsoleView
from vmm.trace.folding import INNER_CYCLE, SHOWN_CYCLES, Folder, NestedFolder, Skipped
from vmm.trace.names import Names
from vmm.trace.painter import Painter, Style
from vmm.trace.patches import Patch
from vmm.trace.rendering import Entry, line_of


def view_of(name, **options):
    """What a bundled guest's run looks like, line by line."""
    return lines_of(Machine.from_manifest(name), **options)


def lines_of(machine, **options):
    """What a machine's run looks like, line by line."""
    text = []
    view = ConsoleView(machine, Painter(text.append, color=options.pop("color", False)), **options)
    machine.observe(view.record)
    machine.run()
    view.finish()
    return "".join(text).splitlines()


def columns(line):
    return re.split(r"\s{2,}", line.strip())


def test_a_patch_shows_the_code_before_and_after():
    lines = view_of("alias-patch")
    at = next(i for i, text in enumerate(lines) if "01000000 -> 04000000" in text)
    assert columns(lines[at]) == [
        "22", "modification", "writer", "target+0x1 through 0x40011001: 01000000 -> 04000000",
    ]  # fmt: skip
    assert [text.strip() for text in lines[at + 1 : at + 3]] == ["- mov eax, 1", "+ mov eax, 4"]
    assert re.fullmatch(r"drops block \d+: 6 bytes at target", lines[at + 3].strip())


def test_data_among_the_code_is_not_shown_as_instructions():
    lines = view_of("lazy-binding")
    at = next(i for i, text in enumerate(lines) if "near_entry: 6110010000000000 -> 6310010000000080" in text)
    assert columns(lines[at + 1])[1] == "EPT_VIOLATION"


def test_a_violation_is_told_in_words():
    lines = view_of("alias-patch")
    assert ["17", "EPT_VIOLATION", "writer", "write where the EPT allows --x: target+0x1 through 0x40011001"] in [
        columns(text) for text in lines
    ]


def test_printed_text_is_gathered():
    lines = view_of("alias-patch")
    assert columns(lines[0]) == ["1-16", "IO_INSTRUCTION", "puts+0x5", 'out 0xe9 x 16: "alias-patch sum "']


def test_code_that_lies_over_two_frames_is_read_in_its_order():
    """The frames are not neighbours; the instruction is whole all the same."""
    lines = [text.strip() for text in view_of("straddle")]
    assert "- mov eax, 0x1f5d96d2" in lines
    assert "+ mov eax, 0x1e5a96d2" in lines


def test_branches_are_named():
    assert "+ call 0x10080 <function_add>" in [text.strip() for text in view_of("call-site")]


def test_16_bit_code_is_read_as_such():
    lines = [text.strip() for text in view_of("real-mode")]
    assert "- mov ax, 0x7fff" in lines


def test_loops_are_folded_and_counted():
    lines = view_of("alias-patch")
    assert "...  291 more like these, up to 316" in [text.strip() for text in lines]
    assert len(lines) < 60


def test_everything_is_shown_if_it_is_wanted():
    lines = view_of("alias-patch", everything=True)
    assert not any("more" in text for text in lines)
    assert sum("modification" in text for text in lines) == 100


@pytest.mark.parametrize("name", [entry.name for entry in bundled_guests()])
def test_every_record_is_shown_or_counted(name):
    """The numbers go from 1 to the last record without a gap."""
    expected = 1
    for text in view_of(name):
        words = text.split()
        if folded := re.search(r"\.\.\.  ([\d,]+) more like these, up to (\d+)", text):
            expected += int(folded[1].replace(",", ""))
            assert int(folded[2]) == expected - 1
        elif unseen := re.search(r"\.\.\.  ([\d,]+) more records", text):
            expected += int(unseen[1].replace(",", ""))
        elif numbers := re.fullmatch(r"(\d+)(?:-(\d+))?", words[0]):
            assert int(numbers[1]) == expected
            expected = int(numbers[2] or numbers[1]) + 1


def test_a_long_run_does_not_flood():
    """100,000 exits with no pattern in them: the first ones, a count, the end."""
    machine = Machine.from_manifest("patch-ahead")
    text = []
    view = ConsoleView(machine, Painter(text.append, color=False))
    for at in range(100_000):
        view.record(Mtf(0x10000 + at * at % 7919))
    view.finish()
    machine.observe(view.record)
    machine.run()
    view.finish()
    lines = "".join(text).splitlines()
    assert len(lines) <= LIMIT + 3
    assert re.search(r"\.\.\.  [\d,]+ more records \(--all shows them, --trace keeps them\)", lines[-2])
    assert lines[-1].split()[1] == "end"


class TestSeveralVcpus:
    def test_each_line_says_whose_it_is(self):
        rows = [columns(text) for text in view_of("cross-modify", everything=True)]
        kinds = {(row[1], row[2]) for row in rows if row[0].split("-")[0].isdecimal()}
        assert {vcpu for vcpu, _ in kinds} == {"0", "1"}
        assert {("0", "modification"), ("1", "EXTERNAL_INTERRUPT"), ("1", "CPUID")} <= kinds
        assert not {("1", "modification"), ("0", "EXTERNAL_INTERRUPT"), ("0", "CPUID")} & kinds

    def test_the_columns_stand_below_each_other(self):
        lines = view_of("cross-modify", everything=True)
        interrupt = next(text for text in lines if "EXTERNAL_INTERRUPT" in text)
        violation = next(text for text in lines if "EPT_VIOLATION" in text)
        assert interrupt.index("vector 0x40") == violation.index("write where")
        assert interrupt.split()[1:3] == ["1", "EXTERNAL_INTERRUPT"]

    def test_a_block_that_dies_has_an_owner(self):
        assert any(re.search(r"drops block \d+ of vCPU 1: \d+ bytes at ", text) for text in view_of("cross-modify"))

    def test_one_vcpu_needs_no_number(self):
        rows = [columns(text) for text in view_of("alias-patch")]
        assert not any(row[1].isdecimal() for row in rows if row[0].isdecimal())

    def test_ten_need_two_digits(self):
        made = tiny.build("hlt", others=[CpuSpec(tiny.CODE) for _ in range(10)])
        halts = [line for line in lines_of(made.machine) if "HLT" in line]
        assert {line.split()[1] for line in halts} == {str(number) for number in range(11)}
        assert len({line.index("HLT") for line in halts}) == 1

    def test_what_two_print_is_not_mixed(self):
        both = "mov al, 0x61; out 0xe9, al; out 0xe9, al; hlt"
        other = CpuSpec(0x20000, registers={"rsp": tiny.STACK})
        maps = [tiny.map_page(0x20000, 0x20000)]
        made = tiny.build({tiny.CODE: both, 0x20000: both}, maps=maps, others=[other], schedule=Schedule(3, 2))
        prints = [columns(line) for line in lines_of(made.machine) if "IO_INSTRUCTION" in line]
        assert sum(row[-1].count("a") for row in prints) == 4
        assert {row[1] for row in prints} == {"0", "1"}
        assert len(prints) > 2


def test_colours():
    plain, coloured = view_of("patch-ahead"), view_of("patch-ahead", color=True)
    assert not any("\x1b" in text for text in plain)
    assert [re.sub("\x1b\\[[0-9;]*m", "", text) for text in coloured] == plain
    assert sum("\x1b" in text for text in coloured) > 10


def test_a_guest_cannot_drive_the_terminal():
    names = Names(load_guest("patch-ahead"))
    record = EptViolation(rip=0x10000, qualification=2, gpa=0x10000, gva=0x10000)
    from vmm.exits import IoInstruction

    printing = IoInstruction(rip=0x10000, port=0xE9, size=1, direction="out", value=0x1B, qualification=0)
    shown = line_of(Entry(1, printing, 1, text=b"\x1b[2J\n\xff"), names).what
    assert shown == 'out 0xe9: "\\x1b[2J\\n\ufffd"'
    assert line_of(Entry(1, record, 1), names).style is Style.TRAP


# Names


def guest_with(symbols, segments):
    loaded = load_guest("alias-patch")
    extents = [(segment.gva, segment.gva + segment.memory_size) for segment in segments]
    return Guest(loaded.manifest, LoadedImage(tuple(segments), None, Symbols(symbols, extents)), 0x10000)


def test_an_alias_has_the_name_of_what_it_reaches():
    names = Names(load_guest("alias-patch"))
    assert names.code(0x11000) == "target"
    assert names.code(0x40011000) == "target@0x40011000"
    assert names.code(0x99999999) == "0x99999999"


def test_memory_that_was_linked_elsewhere():
    high = Segment(0x10000, b"\0" * 64, 64, readable=True, writable=True, executable=True, gva=0xFFFF8000_00010000)
    names = Names(guest_with([Symbol("kernel", high.gva)], [high]))
    assert names.memory(0x10004, high.gva + 4) == "kernel+0x4 at GPA 0x10004"
    assert names.memory(0x10004, 0x5004) == "kernel+0x4 at GPA 0x10004 through 0x5004"
    assert names.memory(0x50000, 0x50000) == "0x50000"


# Patches


def patch(old, new, first, size):
    return Patch(0x1000, bytes.fromhex(old), bytes.fromhex(new), first, first + size, 64)


def test_only_touched_instructions_are_shown():
    assert patch("90b801000000c390", "90b802000000c390", 2, 4).difference() == (["mov eax, 1"], ["mov eax, 2"])


def test_instructions_that_stay_are_left_out():
    old, new = "b801000000ffc8c3" + "90" * 15, "b801000000ffc0c3" + "90" * 15
    assert patch(old, new, 0, 8).difference() == (["dec eax"], ["inc eax"])


def test_what_stands_behind_an_int3_is_not_guessed():
    """The int3 may be the first byte of an instruction that is being patched."""
    assert patch("90 cc 01010101", "90 cc 02020202", 2, 4).difference() == ([], [])
    assert patch("90 cc", "90 90", 1, 1).difference() == (["int3"], ["nop"])


def test_an_instruction_that_goes_on_elsewhere_is_not_guessed():
    assert patch("b8ffff", "b8e0a0", 1, 2).difference() == ([], [])


def test_runs_of_one_instruction_take_one_line():
    assert patch("cc" * 24, "90" * 24, 0, 8).difference() == (["int3 x 8"], ["nop x 8"])


# Folding


@frozen
class Step:
    """An item of one record."""

    seq: int
    shape: str

    @property
    def first(self):
        return self.seq


def fold(shapes, folder=lambda show: Folder(show, INNER_CYCLE)):
    """What a folder makes of these items: the number of one that is shown, (first, last) of a fold."""
    out = []
    folder = folder(lambda item: out.append((item.first, item.seq) if isinstance(item, Skipped) else item.seq))
    for at, shape in enumerate(shapes):
        folder.add(Step(at, shape))
    folder.flush()
    return out


def test_a_cycle_is_folded_after_three_rounds():
    assert fold("xababababab") == [0, 1, 2, 3, 4, 5, 6, (7, 10)]
    assert fold("aaaaab") == [0, 1, 2, (3, 4), 5]
    assert fold("abcabc") == [0, 1, 2, 3, 4, 5]


def test_the_beginning_of_a_round_that_is_not_whole_is_shown():
    assert fold("ababababac") == [0, 1, 2, 3, 4, 5, (6, 7), 8, 9]


def test_a_loop_in_a_loop_is_folded_with_it():
    inner = "aaaaaab"
    assert fold(inner * 5, NestedFolder) == [
        *(0, 1, 2, (3, 5), 6),
        *(7, 8, 9, (10, 12), 13),
        *(14, 15, 16, (17, 19), 20),
        (21, 34),
    ]


@pytest.mark.parametrize("folder", [lambda show: Folder(show, INNER_CYCLE), NestedFolder], ids=["one", "nested"])
@given(shapes=st.text(alphabet="abc", max_size=80))
def test_nothing_is_lost(folder, shapes):
    at = 0
    for item in fold(shapes, folder):
        first, last = item if isinstance(item, tuple) else (item, item)
        assert first == at
        at = last + 1
    assert at == len(shapes)


@given(st.text(alphabet="abcdefgh", min_size=1, max_size=INNER_CYCLE), st.integers(SHOWN_CYCLES, 200))
def test_a_loop_takes_few_lines(cycle, rounds):
    assert len(fold(cycle * rounds, NestedFolder)) <= len(cycle) * (SHOWN_CYCLES + 2)
