"""A replay finds whatever is not as it was recorded, and refuses what is no whole recording."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded import READER, guest, lines, recorded, vmm

from vmm.commands.run import run_to_end
from vmm.errors import InputError
from vmm.inputs import KINDS, parse
from vmm.machine import Machine, RunOptions
from vmm.recording import record
from vmm.trace.whole import WholeTrace

FOR_EVER = "again: out 0x80, al\njmp again"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("divergence")


@pytest.fixture(scope="module")
def target(folder):
    return guest(folder / "reader", READER)


@pytest.fixture(scope="module")
def trace(folder, target):
    """Lines: header; for each byte its count, an exit, its value, an exit; the last count; the end."""
    return recorded(folder / "whole", target, RunOptions(input=b"abcd"))


@pytest.fixture
def replay(tmp_path):
    """Replays these lines."""

    def run(changed, *arguments):
        path = tmp_path / "changed.jsonl"
        path.write_bytes(changed if isinstance(changed, bytes) else b"".join(changed))
        return vmm("replay", path, *arguments)

    return run


def one_line(result, status=2):
    assert result.exit_code == status
    assert re.fullmatch(r"vmm: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


def test_it_says_in_one_line_that_all_is_the_same(trace, replay):
    result = replay(trace)
    assert result.exit_code == 0
    words = r".*: the replay is byte-identical: (\d+) records, (\d+) inputs, state [0-9a-f]{64}\n"
    found = re.fullmatch(words, result.output)
    assert found
    assert (int(found[1]), int(found[2])) == (trace.count(b'"exit"') + 1, 9)


def test_the_new_trace_and_state_can_be_kept(trace, replay, tmp_path):
    assert replay(trace, "--trace", tmp_path / "new", "--state", tmp_path / "state").exit_code == 0
    assert (tmp_path / "new").read_bytes() == trace
    assert json.loads((tmp_path / "state").read_text())["schema"] == "vmm-state/1"


def test_a_trace_cannot_replace_the_one_that_is_replayed(trace, replay, tmp_path):
    assert "is read by this run" in one_line(replay(trace, "--trace", tmp_path / "changed.jsonl"))


def test_each_record_that_is_changed_is_found(trace, replay):
    for at, line in enumerate(lines(trace)):
        if b'"kind": "exit"' in line:
            changed = lines(trace)
            changed[at] = line.replace(b'"rip": 6', b'"rip": 7')
            result = replay(changed)
            assert result.exit_code == 1
            assert f"the replay parts from the recording at #{json.loads(line)['seq']}\n" in result.stderr
            assert "  rip: recorded 0x1" in result.stderr


def test_the_records_around_are_shown(trace, replay):
    changed = lines(trace)
    changed[6] = changed[6].replace(b'"size": 1', b'"size": 2')
    assert b'"seq": 3' in changed[6]
    shown = replay(changed).stderr.splitlines()
    assert "  both" in shown
    assert [text.split()[1] for text in shown if text.startswith("  >")] == ["#3", "#3"]
    assert shown[-1] == "  size: recorded 2, replayed 1"
    assert any("input port port=0xe0 size=1 value=0x61" in text for text in shown)


def test_an_input_that_is_changed_changes_the_run(trace, replay):
    changed = [line.replace(b'"size": 1, "value": 98}', b'"size": 1, "value": 99}') for line in lines(trace)]
    assert changed != lines(trace)
    result = replay(changed)
    assert result.exit_code == 1
    assert "  value: recorded 0x62, replayed 0x63" in result.stderr


@pytest.mark.parametrize("left_out", [1, 3, 5])
def test_an_input_that_is_missing_is_found(trace, replay, left_out):
    changed = lines(trace)
    assert b'"kind": "input"' in changed.pop(left_out)
    assert replay(changed).exit_code == 1


def test_an_input_too_many_is_found(trace, replay):
    changed = lines(trace)
    changed.insert(1, b'{"seq": 0, "kind": "input", "input": "port", "port": 5, "size": 1, "value": 0}\n')
    result = replay(changed)
    assert result.exit_code == 1
    assert "input port port=5" in result.stderr


def test_another_state_is_found(trace, replay):
    changed = lines(trace)
    changed[-2] = re.sub(rb'"memory": "..', b'"memory": "zz', changed[-2])
    result = replay(changed)
    assert result.exit_code == 1
    assert "memory: recorded" in result.stderr


def test_another_end_is_found(trace, replay):
    changed = lines(trace)
    changed[-1] = changed[-1].replace(b'"port": 244', b'"port": 245')
    assert "port: recorded 0xf5, replayed 0xf4" in replay(changed).stderr


def test_another_option_in_the_header_is_another_run(trace, replay):
    assert replay(trace.replace(b'"blocks": false', b'"blocks": true', 1)).exit_code == 1


def test_a_changed_image_is_named_by_what_is_wanted(trace, replay, target, tmp_path):
    other = guest(tmp_path / "other", READER)
    image = other / "image.bin"
    image.write_bytes(image.read_bytes()[:-1] + b"\x01")
    said = one_line(replay(trace, "--guest", other))
    assert f"recorded with the image SHA-256 {json.loads(lines(trace)[0])['image']}" in said
    assert "give --guest with that image" in said


def test_a_changed_manifest_is_named_by_what_is_wanted(trace, replay, tmp_path):
    other = guest(tmp_path / "other", READER)
    manifest = other / "guest.toml"
    manifest.write_text(manifest.read_text() + "# changed\n")
    assert "recorded with the manifest SHA-256" in one_line(replay(trace, "--guest", other))


def test_a_guest_may_be_elsewhere(trace, replay, tmp_path):
    guest(tmp_path / "moved", READER)
    assert replay(trace, "--guest", tmp_path / "moved").exit_code == 0


def test_a_guest_that_is_gone(trace, replay, target):
    gone = trace.replace(str(target).encode(), str(target).encode() + b"-gone")
    assert "no such guest or file" in one_line(replay(gone))


def test_an_image_without_a_manifest(tmp_path):
    import shutil

    from vmm.guest.loader import load_guest

    image = tmp_path / "bare.elf"
    shutil.copy(load_guest("real-mode").manifest.path.parent.parent / "lock-rmw" / "image.elf", image)
    assert vmm("run", "-q", image, "--trace", tmp_path / "t").exit_code == 0
    assert json.loads((tmp_path / "t").read_text().splitlines()[0])["manifest"] is None
    assert vmm("replay", tmp_path / "t").exit_code == 0


class TestNotWhole:
    """One line, with the place."""

    def test_a_trace_that_breaks_off(self, trace, replay):
        assert "breaks off after this line" in one_line(replay(lines(trace)[:-1]))

    def test_a_line_that_breaks_off(self, trace, replay):
        assert f":{len(lines(trace))}:" in one_line(replay(trace[:-3]))

    def test_an_end_of_line_that_is_missing(self, trace, replay):
        assert "in the middle of a line" in one_line(replay(trace[:-1]))

    def test_a_trace_that_goes_on(self, trace, replay):
        assert "goes on after its end" in one_line(replay(trace + lines(trace)[1]))

    def test_a_record_that_is_missing(self, trace, replay):
        assert 'expected "seq": 2' in one_line(replay(lines(trace)[:4] + lines(trace)[6:]))

    def test_an_old_trace(self, trace, replay):
        old = [b'{"schema": "vmm-trace/1", "guest": "alias-patch"}\n', *lines(trace)[1:]]
        assert "record the run again" in one_line(replay(old))

    @pytest.mark.parametrize(
        "line",
        [
            {"input": "port", "port": 224, "size": 1, "value": "x"},
            {"input": "port", "port": 224, "size": 1},
            {"input": "magic"},
            {"input": 5},
            {"input": "write", "gpa": 0, "data": "abc"},
            {"input": "protect", "gpa": 0, "size": 1, "access": "xyz"},
            {"input": "inject", "event": {"vector": 300, "type": "nmi"}},
            {"input": "inject", "event": None},
            {"input": "registers", "vcpu": 0, "values": {"rax": -1}},
            {"input": "interrupt", "vector": 1 << 70, "vcpu": 0},
        ],
        ids=str,
    )
    def test_an_input_that_is_none(self, trace, replay, line):
        changed = lines(trace)
        changed.insert(1, json.dumps({"seq": 0, "kind": "input", **line}).encode() + b"\n")
        assert ":2:" in one_line(replay(changed))

    @pytest.mark.parametrize(
        "line",
        [
            {"input": "write", "gpa": 1 << 40, "data": "00"},
            {"input": "protect", "gpa": 0, "size": 1, "access": "rwx"},
            {"input": "alias", "gpa": 1, "target": 2, "size": 3},
            {"input": "registers", "vcpu": 9, "values": {"rax": 1}},
            {"input": "registers", "vcpu": 0, "values": {"cs": 1}},
            {"input": "registers", "vcpu": 0, "values": {"rax": 1 << 64}},
            {"input": "registers", "vcpu": 0, "values": {"rflags": 1 << 17}},
            {"input": "interrupt", "vector": 256, "vcpu": 0},
            {"input": "interrupt", "vector": 32, "vcpu": 1},
            {"input": "seal", "gpa": 1 << 63, "size": 1},
        ],
        ids=str,
    )
    def test_an_input_that_the_machine_refuses(self, trace, replay, line):
        changed = lines(trace)
        changed.insert(1, json.dumps({"seq": 0, "kind": "input", **line}).encode() + b"\n")
        assert ":2: an input that no run could have" in one_line(replay(changed))

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (b'"reads": "step"', b'"reads": "maybe"'),
            (b'"reads": "step"', b'"what": "step"'),
            (b'"ept": {}', b'"ept": {"accessed_dirty": 1}'),
            (b'"ept": {}', b'"ept": {"profile": "what"}'),
            (b'"ept": {}', b'"ept": []'),
            (b'"capacity": 65536', b'"capacity": 0'),
            (b'"single_step": false', b'"single_step": 1'),
            (b'"exact_ports": []', b'"exact_ports": [65536]'),
            (b'"exact_ports": []', b'"exact_ports": [233]'),
            (b'"interactive": false', b'"interactive": null'),
            (b'"seed": 0', b'"seed": -1'),
            (b'"image": "', b'"image": "x'),
        ],
    )
    def test_a_header_that_no_run_has(self, trace, replay, before, after):
        assert before in trace
        one_line(replay(trace.replace(before, after, 1)))


class TestCutOff:
    """A run that something outside of it ended has no end that comes again."""

    def said(self, path):
        return one_line(vmm("replay", path))

    def test_by_time(self, tmp_path):
        folder = guest(tmp_path / "g", FOR_EVER)
        vmm("run", "-q", folder, "--seconds", "0.2", "--trace", tmp_path / "t")
        assert b'"state"' not in (tmp_path / "t").read_bytes()
        assert "because its time limit ended it" in self.said(tmp_path / "t")

    def test_by_time_without_any_record(self, tmp_path):
        vmm("run", "-q", guest(tmp_path / "g", "here: jmp here"), "--seconds", "0.2", "--trace", tmp_path / "t")
        assert "its first 0 records are the same" in self.said(tmp_path / "t")

    def test_by_an_interruption_with_windows_open(self, tmp_path):
        """What closing the windows left in the trace belongs to the cut."""
        folder = guest(tmp_path / "g", "mov esi, 0x12000\nagain: mov byte ptr [rsi], 1\nout 0x80, al\njmp again")
        manifest = folder / "guest.toml"
        manifest.write_text(manifest.read_text().replace('code = "load"', 'code = "load"\nwrites = "window"'))

        def act(machine):
            machine.observe(lambda record: machine.break_in() if machine.reporter.total == 50 else None)

        trace = recorded(tmp_path / "t", folder, prepare=act)
        assert b'"cause": "end of run"' in trace
        assert b'"interrupted"' in trace
        assert "because it was interrupted" in self.said(tmp_path / "t")

    def test_by_an_error_of_the_vmm(self, tmp_path):
        folder = guest(tmp_path / "g", "again: out 0x80, al\nnop\njmp again")
        with Machine.from_manifest(folder, RunOptions(audit=True)) as machine, (tmp_path / "t").open("wb") as output:
            sink = record(machine, output, target=str(folder))
            machine.observe(
                lambda record: machine.memory.write(0x10002, b"\x91") if machine.reporter.total == 50 else None
            )
            assert run_to_end(machine).reason == "error"
            sink.flush()
        assert "because the VMM gave up" in self.said(tmp_path / "t")

    def test_a_difference_before_is_still_found(self, tmp_path):
        folder = guest(tmp_path / "g", FOR_EVER)
        vmm("run", "-q", folder, "--seconds", "0.2", "--trace", tmp_path / "t")
        text = (tmp_path / "t").read_bytes()
        (tmp_path / "t").write_bytes(text.replace(b'"size": 1', b'"size": 2', 1))
        result = vmm("replay", tmp_path / "t")
        assert (result.exit_code, "at #1\n" in result.stderr) == (1, True)

    def test_the_budget_of_exits_is_no_cut(self, tmp_path):
        folder = guest(tmp_path / "g", FOR_EVER)
        manifest = folder / "guest.toml"
        manifest.write_text(manifest.read_text() + "[limits]\nexits = 100\n")
        assert vmm("run", "-q", folder, "--trace", tmp_path / "t").exit_code == 3
        assert vmm("replay", tmp_path / "t").exit_code == 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1 << 65) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class TestHostile:
    """Whatever is in the file, there is one answer of the three, and no traceback."""

    def judge(self, path, data):
        path.write_bytes(data)
        result = vmm("replay", path, "--seconds", "5")
        assert result.exit_code in (0, 1, 2), result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        if result.exit_code == 2:
            one_line(result)

    @fuzzed
    @given(data=st.data())
    def test_bytes(self, trace, tmp_path, data):
        at = data.draw(st.integers(0, len(trace)))
        cut = data.draw(st.integers(0, 40))
        self.judge(tmp_path / "t", trace[:at] + data.draw(st.binary(max_size=20)) + trace[at + cut :])

    @fuzzed
    @given(data=st.data())
    def test_lines(self, trace, tmp_path, data):
        some = lines(trace)
        chosen = data.draw(st.lists(st.sampled_from(some), max_size=6))
        at = data.draw(st.integers(1, len(some) - 1))
        self.judge(tmp_path / "t", b"".join([*some[:at], *chosen, *some[at:]]))

    @fuzzed
    @given(data=st.data())
    def test_values(self, trace, tmp_path, data):
        some = [json.loads(line) for line in lines(trace)]
        line = data.draw(st.sampled_from(some))
        line[data.draw(st.sampled_from(sorted(line)))] = data.draw(json_values)
        self.judge(tmp_path / "t", "".join(json.dumps(each) + "\n" for each in some).encode())

    @given(name=st.sampled_from(sorted(KINDS)), values=st.dictionaries(st.text(max_size=8), json_values))
    def test_what_is_no_input_is_a_value_error(self, name, values):
        with contextlib.suppress(ValueError):
            parse({**values, "input": name})

    @given(st.binary(max_size=300))
    def test_what_is_no_trace_is_bad_input(self, tmp_path_factory, data):
        path = tmp_path_factory.getbasetemp() / "any.jsonl"
        path.write_bytes(data)
        with pytest.raises(InputError):
            WholeTrace.read(path)
