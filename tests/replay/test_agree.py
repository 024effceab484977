"""Traces of several nodes: who agrees, who does not, and what the cause is."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded import CLOCK, READER, guest, lines, recorded, vmm

from vmm.machine import RunOptions
from vmm.trace.nodes import Agreement


@pytest.fixture
def nodes(tmp_path):
    """Makes the traces of nodes with these inputs, each with a copy of the guest of its own."""

    def make(*inputs, source=READER):
        paths = []
        for number, data in enumerate(inputs, 1):
            target = guest(tmp_path / f"guest{number}", source)
            paths.append(tmp_path / f"node{number}.jsonl")
            recorded(paths[-1], target, RunOptions(input=data, time=number * 10**9))
        return paths

    return make


def said(*paths):
    result = vmm("agree", *paths)
    assert result.exit_code in (0, 1), result.stderr
    return result.exit_code, result.output.replace(f"{paths[0].parent}/", "")


def test_all_agree_wherever_their_guests_are(nodes):
    status, text = said(*nodes(b"ab", b"ab", b"ab"))
    assert status == 0
    assert re.fullmatch(r"all 3 nodes agree: \d+ records, state [0-9a-f]{16}\n", text)


def test_one_read_something_else(nodes):
    status, text = said(*nodes(b"ab", b"ab", b"aB", b"ab"))
    assert status == 1
    assert text.startswith("3 of 4 nodes agree, 1 does not\n")
    assert "node1.jsonl node2.jsonl node4.jsonl: " in text
    assert "node3.jsonl read 0x42 from port 0xe0 where the others read 0x62" in text
    assert "  the first difference is after #3\n" in text


def test_one_was_given_less(nodes):
    _, text = said(*nodes(b"ab", b"a", b"ab"))
    assert "node2.jsonl read 0x1 from port 0xe1 where the others read 0x2" in text


def test_each_group_that_is_odd_gets_a_report(nodes):
    status, text = said(*nodes(b"a", b"b", b"a", b"c", b"a", b"b", b"a"))
    assert status == 1
    assert "4 of 7 nodes agree, 3 do not" in text
    assert "node2.jsonl node6.jsonl read 0x62 from port 0xe0 where the others read 0x61" in text
    assert "node4.jsonl read 0x63 from port 0xe0 where the others read 0x61" in text


def test_two_that_differ_have_no_majority(nodes):
    status, text = said(*nodes(b"a", b"b"))
    assert status == 1
    assert text.startswith("2 nodes do not agree, and no majority of them does\n")
    assert "node2.jsonl read 0x62 from port 0xe0 where node1.jsonl read 0x61" in text


def test_half_of_them_is_no_majority(nodes):
    assert "no majority" in said(*nodes(b"a", b"b", b"b", b"a"))[1]


def test_another_image(nodes, tmp_path):
    paths = nodes(b"ab", b"ab", b"ab")
    image = tmp_path / "guest2" / "image.bin"
    image.write_bytes(image.read_bytes().replace(b"\x00\xc3", b"\x28\xc3"))  # sub instead of add
    recorded(paths[1], tmp_path / "guest2", RunOptions(input=b"ab", time=0))
    _, text = said(*paths)
    first, second = (json.loads(lines(path.read_bytes())[0])["image"] for path in paths[:2])
    assert f"node2.jsonl ran another image: SHA-256 {second}, the others {first}" in text
    assert re.search(r"  > +#\d+ exit IO_INSTRUCTION .*port=0xf4", text)


def test_another_image_that_does_the_same(nodes, tmp_path):
    """The state says so: memory differs, and nothing else does."""
    paths = nodes(b"ab", b"ab", b"ab")
    image = tmp_path / "guest2" / "image.bin"
    image.write_bytes(image.read_bytes()[:-1] + b"\x55")
    recorded(paths[1], tmp_path / "guest2", RunOptions(input=b"ab", time=0))
    _, text = said(*paths)
    assert "node2.jsonl ran another image" in text
    assert re.search(r"^  memory: the others ", text, re.MULTILINE)
    assert not re.search(r"^  registers: ", text, re.MULTILINE)


def test_another_manifest(nodes, tmp_path):
    paths = nodes(b"ab", b"ab", b"ab")
    manifest = tmp_path / "guest3" / "guest.toml"
    manifest.write_text(manifest.read_text() + "# mine\n")
    recorded(paths[2], tmp_path / "guest3", RunOptions(input=b"ab", time=0))
    _, text = said(*paths)
    assert "node3.jsonl ran by another manifest: SHA-256 " in text
    assert "all records and inputs are the same" in text


def test_another_option(nodes, tmp_path):
    paths = nodes(b"ab", b"ab", b"ab")
    recorded(paths[2], tmp_path / "guest3", RunOptions(input=b"ab", time=0, block_events=True))
    assert "node3.jsonl ran with another blocks: True, the others False" in said(*paths)[1]


def test_a_clock_is_named(nodes):
    source = f"mov edx, {CLOCK}; in eax, dx; out 0xf4, al"
    _, text = said(*nodes(b"", b"", source=source))
    assert "node2.jsonl read 0x2 from port 0xe4 where node1.jsonl read 0x1" in text


def test_an_action_of_the_host_is_named(nodes, tmp_path):
    paths = nodes(b"ab", b"ab", b"ab")

    def act(machine):
        machine.observe(lambda record: None, acts=True)
        machine.write(0x40000, b"\x01")

    recorded(paths[0], tmp_path / "guest1", RunOptions(input=b"ab", time=0), act)
    _, text = said(*paths)
    assert "node1.jsonl ran with another interactive: True, the others False" in text
    assert "node1.jsonl was given an input that the others were not given there: input write gpa=0x40000" in text


def test_a_record_that_differs_with_the_same_inputs(nodes):
    paths = nodes(b"ab", b"ab", b"ab")
    text = paths[1].read_bytes()
    paths[1].write_bytes(text.replace(b'"rip": 6', b'"rip": 7', 1))
    _, text = said(*paths)
    assert "node2.jsonl went another way with the same image and the same inputs up to there" in text
    assert "  the first difference is at #1\n" in text


def test_a_node_that_was_cut_off_is_odd(nodes, tmp_path):
    paths = nodes(b"ab", b"ab", b"ab")

    def act(machine):
        machine.observe(lambda record: machine.break_in() if machine.reporter.total == 3 else None)

    recorded(paths[1], tmp_path / "guest2", RunOptions(input=b"ab", time=0), act)
    _, text = said(*paths)
    assert re.search(r"  > +#\d+ end interrupted", text)
    assert "node2.jsonl: 4 records, no state" in text


class TestBadInput:
    def test_one_trace(self, nodes):
        result = vmm("agree", *nodes(b"a"))
        assert result.exit_code == 2
        assert "two traces or more" in result.stderr

    def test_one_that_is_not_whole(self, nodes):
        paths = nodes(b"ab", b"ab")
        paths[1].write_bytes(paths[1].read_bytes()[:-30])
        result = vmm("agree", *paths)
        assert result.exit_code == 2
        assert "node2.jsonl:" in result.stderr
        assert result.stderr.count("\n") == 1

    def test_one_that_is_not_there(self, nodes, tmp_path):
        assert vmm("agree", *nodes(b"a"), tmp_path / "none").exit_code == 2

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_damaged_ones(self, tmp_path, data):
        whole = tmp_path / "whole"
        if not whole.exists():
            recorded(whole, guest(tmp_path / "g", READER), RunOptions(input=b"ab"))
        text = whole.read_bytes()
        at, cut = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 30))
        (tmp_path / "damaged").write_bytes(text[:at] + data.draw(st.binary(max_size=15)) + text[at + cut :])
        result = vmm("agree", whole, tmp_path / "damaged")
        assert result.exit_code in (0, 1, 2)
        assert result.exception is None or isinstance(result.exception, SystemExit)


def test_long_traces_take_no_memory(nodes):
    """What is kept does not grow with the trace."""
    import tracemalloc

    def peak(times):
        paths = nodes(bytes(times), bytes(times))
        lines_of = lines(paths[1].read_bytes())
        lines_of[-3] = lines_of[-3].replace(b'"rip": 6', b'"rip": 7')
        paths[1].write_bytes(b"".join(lines_of))
        tracemalloc.start()
        (parting,) = Agreement.of(paths).partings()
        assert parting.difference is not None
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    short = peak(100)
    assert peak(2_000) < short + 100_000


def test_a_folder_is_no_trace(tmp_path):
    assert vmm("agree", tmp_path, tmp_path).exit_code == 2
    shutil.rmtree(tmp_path)
