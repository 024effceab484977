"""The trace of a boot is a recording like any other: what was typed comes again at the same instruction boundaries."""

from __future__ import annotations

import json
import re
import shutil
import signal

import pc_guests
import pytest
import terminals
from consoles import BUSY, KERNELS, Visitor, boot, kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded import lines, replayed, vmm

from vmm.commands.typist import Typist
from vmm.cpu import countdown
from vmm.errors import OptionError
from vmm.machine import Machine, RunOptions
from vmm.trace.whole import WholeTrace

WAYS = {
    "free": RunOptions(),
    "audited": RunOptions(audit=True),
    "four blocks": RunOptions(capacity=4),
    "stepped": RunOptions(single_step=True),
}
PIECES = [(2, b"a"), (9, b"bc\n"), (0, b"d"), (5, b"")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def replay(tmp_path):
    """Replays these lines."""

    def run(changed, *arguments):
        path = tmp_path / "changed.jsonl"
        path.write_bytes(b"".join(changed))
        return vmm("replay", path, *arguments)

    return run


@pytest.fixture(scope="module")
def visited(files, tmp_path_factory):
    """A trace of a boot that somebody sat at, whose processor was asleep most of the time."""
    path = tmp_path_factory.mktemp("visited") / "trace"
    return boot(path, files["asleep"], lambda machine: Visitor.sit_down(machine, PIECES, [777_777]))


def objects(trace):
    return [json.loads(line) for line in trace.splitlines()]


def inputs(trace):
    return [line for line in objects(trace) if line.get("kind") == "input"]


def typed(trace):
    return [bytes.fromhex(line["data"]) for line in inputs(trace) if line["input"] == "serial"]


def one_line(result, status=2):
    assert result.exit_code == status, result.output
    assert re.fullmatch(r"vmm: [^\n]+\n", result.stderr), result.stderr
    return result.stderr


many = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
instants = st.lists(st.tuples(st.integers(0, 40), st.binary(min_size=1, max_size=12)), max_size=5)
naps = st.lists(st.integers(1_000, 50_000_000), min_size=1, max_size=5)


@pytest.mark.parametrize("name", KERNELS)
@many
@given(pieces=instants, naps=naps)
def test_whatever_is_typed_whenever_comes_again(files, tmp_path, name, pieces, naps):
    """Whatever the host's clock said meanwhile."""
    trace = boot(tmp_path / "t", files[name], lambda machine: Visitor.sit_down(machine, pieces, naps))
    assert typed(trace) == [data for _, data in pieces]
    assert replayed(tmp_path / "t") == (trace, None)


@many
@given(text=st.lists(st.text("ab \x7fé", max_size=6), max_size=4), prompt=st.sampled_from([">", "\n>", "\n", "A"]))
def test_lines_that_are_typed_at_prompts_come_again(files, tmp_path, text, prompt):
    """Also where the prompt ends a line, which the trace has before what is typed then."""
    typist = Typist([each.encode() for each in text], prompt.encode())

    def sit_down(machine):
        machine.type_in(b"a\n")
        typist.connect(machine)
        Visitor.sit_down(machine, [(500, b"")], [1])

    trace = boot(tmp_path / "t", files["busy"], sit_down)
    assert replayed(tmp_path / "t") == (trace, None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KERNELS)
def test_it_comes_again_in_each_way_of_running(files, tmp_path, name, way):
    trace = boot(tmp_path / "t", files[name], lambda machine: Visitor.sit_down(machine, PIECES, [999]), WAYS[way])
    assert replayed(tmp_path / "t") == (trace, None)


@pytest.mark.parametrize("name", KERNELS)
def test_it_comes_again_where_no_machine_code_can_count(files, tmp_path, monkeypatch, name):
    trace = boot(tmp_path / "t", files[name], lambda machine: Visitor.sit_down(machine, PIECES, [999]))
    monkeypatch.setattr(countdown, "placed", lambda _code: None)
    assert replayed(tmp_path / "t") == (trace, None)


def test_a_session_at_a_terminal_comes_again(files, tmp_path):
    trace = tmp_path / "t"
    for name in ("busy", "asleep"):
        with terminals.Session("--kernel", str(files[name]), "--memory", "18M", "--trace", str(trace)) as session:
            session.expect(b">")
            session.type(b"AB")
            session.expect(b"AB")
            session.type(b"\x01\x01C")
            session.expect(b"AB\x01C")
            session.type(b"\x01x")
            session.expect(b"exits")
            assert session.wait() == 0
        result = vmm("replay", trace)
        assert "byte-identical" in result.output, result.stderr
        assert b"".join(typed(trace.read_bytes())) == b"AB\x01C"


def test_a_boot_from_the_command_line_comes_again_with_its_files(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(files["busy"], "kernel")
    (tmp_path / "initrd").write_bytes(b"ramdisk" * 1000)
    (tmp_path / "in").write_bytes(b"hello\n")
    boot_it = ["--initrd", "initrd", "--append", "a=é \udcff", "--memory", "20M", "--input", "in", "--prompt", ">"]
    assert vmm("boot", "-q", "--kernel", "kernel", *boot_it, "--trace", "t").exit_code == 0
    header = objects((tmp_path / "t").read_bytes())[0]
    assert (header["target"], header["files"], header["memory"]) == ("kernel", ["initrd"], 20 << 20)
    assert vmm("replay", "t", "--trace", "new").exit_code == 0
    assert (tmp_path / "new").read_bytes() == (tmp_path / "t").read_bytes()

    (tmp_path / "kernel").rename("elsewhere")
    assert "cannot be read" in one_line(vmm("replay", "t"))
    assert vmm("replay", "t", "--guest", "elsewhere").exit_code == 0
    (tmp_path / "initrd").rename("moved")
    assert "initrd: cannot be read" in one_line(vmm("replay", "t", "--guest", "elsewhere"))
    assert vmm("replay", "t", "--guest", "elsewhere", "--module", "moved").exit_code == 0
    assert "moved: is read by this run" in one_line(
        vmm("replay", "t", "--guest", "elsewhere", "--module", "moved", "--state", "moved")
    )
    assert "2 modules; give each of the 1" in one_line(
        vmm("replay", "t", "--guest", "elsewhere", "--module", "moved", "--module", "moved")
    )


def test_nodes_agree_whatever_their_files_are_called(files, tmp_path):
    (tmp_path / "other").write_bytes(files["busy"].read_bytes())
    (tmp_path / "in").write_bytes(b"hello\n")
    (tmp_path / "in2").write_bytes(b"hullo\n")
    for trace, kernel, text in (("1", files["busy"], "in"), ("2", tmp_path / "other", "in"), ("3", "other", "in2")):
        arguments = ["--kernel", tmp_path / kernel, "--input", tmp_path / text, "--prompt", ">"]
        assert vmm("boot", "-q", *arguments, "--memory", "18M", "--trace", tmp_path / trace).exit_code == 0
    assert vmm("agree", tmp_path / "1", tmp_path / "2").exit_code == 0
    said = vmm("agree", *(tmp_path / trace for trace in "123"))
    assert "/3 was given an input that the others were not given there: input serial data=" in said.output
    assert 'data: the others "68656c6c6f0a", ' in said.output


def test_a_file_that_has_changed_is_named(files, tmp_path):
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    shutil.copy(files["busy"], kernel)
    initrd.write_bytes(b"ramdisk")
    boot(tmp_path / "t", kernel, lambda machine: machine.stop(), initrd=initrd)
    assert vmm("replay", tmp_path / "t").exit_code == 0
    initrd.write_bytes(b"RAMDISK")
    said = one_line(vmm("replay", tmp_path / "t"))
    assert "recorded with the file initrd SHA-256" in said
    assert "give --module with that file" in said
    kernel.write_bytes(kernel.read_bytes() + b"\0")
    assert "give --guest with that image" in one_line(vmm("replay", tmp_path / "t"))


@pytest.mark.parametrize("apic", [True, False])
def test_a_replay_has_the_interrupt_controllers_of_the_recording(tmp_path, apic):
    """A guest that looks for a local APIC, and takes an interrupt of its timer if there is one."""
    source = """
        mov eax, 1; cpuid; bt edx, 9; jnc over
        mov esi, 0xfee00000; mov dword ptr [rsi + 0x3e0], 11; mov dword ptr [rsi + 0x320], 0x10040
        mov dword ptr [rsi + 0x380], 50000; wait: mov eax, [rsi + 0x390]; test eax, eax; jnz wait; over: hlt"""
    kernel = pc_guests.kernel(tmp_path, source)
    trace = boot(tmp_path / "t", kernel, lambda machine: None, apic=apic)
    assert (b'"kind": "device"' in trace) == apic
    assert vmm("replay", tmp_path / "t").exit_code == 0
    assert (b'"apic": true' in lines(trace)[0]) == apic
    (tmp_path / "t").write_bytes(trace.replace(b', "apic": true', b""))
    assert vmm("replay", tmp_path / "t").exit_code == (1 if apic else 0), "without the key there are none"


class TestSpoiled:
    """What is not as it was recorded is found."""

    def test_another_character(self, visited, replay):
        changed = [line.replace(b'"data": "61"', b'"data": "62"') for line in lines(visited)]
        result = replay(changed)
        assert result.exit_code == 1
        assert "value: recorded 0x61, replayed 0x62" in result.stderr

    @pytest.mark.parametrize("by", [-1, 1, 1_000_000])
    def test_another_time(self, visited, replay, by):
        def later(line):
            found = json.loads(line)
            return json.dumps({**found, "time": found["time"] + by}).encode() + b"\n" if "time" in found else line

        result = replay(map(later, lines(visited)))
        assert result.exit_code == 1
        assert "the replay parts from the recording" in result.stderr

    def test_another_place(self, visited, replay):
        changed = [re.sub(rb'"at": "boundary", "time": \d+', b'"at": "output"', line) for line in lines(visited)]
        assert replay(changed).exit_code == 1

    def test_a_time_that_the_guest_is_beyond(self, visited, replay):
        changed = [re.sub(rb'"time": \d+', b'"time": 0', line) for line in lines(visited)]
        result = replay(changed)
        assert result.exit_code == 1
        assert "time: recorded 0, replayed " in result.stderr

    def test_another_command_line(self, visited, replay):
        changed = visited.replace(b'"command_line": ""', b'"command_line": "x"', 1)
        result = replay(lines(changed))
        assert result.exit_code == 1
        assert "memory: recorded" in result.stderr

    @pytest.mark.parametrize(
        ("before", "after", "words"),
        [
            (rb'"protocol": "linux"', rb'"protocol": "other"', "loaded by 'other' with 0 modules"),
            (rb'"protocol": "linux"', rb'"protocol": 5', 'the header has no usable "protocol"'),
            (rb'"command_line": ""', rb'"command_line": null', 'no usable "command_line"'),
            (rb'"command_line": ""', rb'"command_line": "\\ud800"', "the trace's header: a lone surrogate"),
            (rb'"command_line": ""', rb'"command_line": "\\u0000"', "the trace's header: a NUL"),
            (rb'"target": "[^"]*"', rb'"target": "/"', "not a regular file"),
            (rb'"modules": \[\]', rb'"modules": ["x"]', 'no usable "modules"'),
            (rb'"files": \[\]', rb'"files": ["x"]', 'no usable "files"'),
            (rb'"files": \[\]', rb'"files": [5]', 'no usable "files"'),
            (rb'"names": \[\]', rb'"names": ["a", "b"]', 'no usable "names"'),
            (rb'"protocol": "linux"', rb'"protocol": "multiboot"', "loaded by 'multiboot' with 0 modules"),
            (rb'"boot": {[^}]*}', rb'"boot": []', 'no usable "boot"'),
            (rb'"apic": true', rb'"apic": 1', 'no usable "apic"'),
            (rb'"memory": \d+', rb'"memory": 5', "0x5 bytes of memory"),
            (rb'"at": "boundary"', rb'"at": "home"', "at an unusable place"),
            (rb'"at": "boundary"', rb'"at": []', "at an unusable place"),
            (rb', "time": \d+', rb"", "at an unusable time"),
            (rb'"time": \d+', rb'"time": -1', "at an unusable time"),
            (rb'"at": "boundary", ', rb"", "at an unusable time"),
            (rb'"time": ', rb'"depth": -1, "time": ', "with an unusable depth"),
        ],
    )
    def test_what_no_trace_has(self, visited, replay, before, after, words):
        changed = re.sub(before, after, visited, count=1)
        assert changed != visited
        assert words in one_line(replay(lines(changed)))

    def test_modules_of_a_guest_without_any(self, tmp_path):
        assert vmm("run", "-q", "alias-patch", "--trace", tmp_path / "t").exit_code == 0
        said = one_line(vmm("replay", tmp_path / "t", "--module", tmp_path / "t"))
        assert "alias-patch was loaded without modules" in said


def test_a_session_that_was_interrupted_is_replayed_up_to_there(files, tmp_path):
    arguments = ("--kernel", str(files["asleep"]), "--memory", "18M", "--trace", str(tmp_path / "t"))
    with terminals.Session(*arguments) as session:
        session.expect(b">")
        session.type(b"A")
        session.expect(b"A")
        session.process.send_signal(signal.SIGTERM)
        assert session.wait() == 143
    assert "because it was interrupted" in one_line(vmm("replay", tmp_path / "t"))
    assert WholeTrace.read(tmp_path / "t").cut > 0


def test_only_a_pc_has_a_serial_port():
    with Machine.from_manifest("alias-patch") as machine, pytest.raises(OptionError, match="no serial port"):
        machine.type_in(b"a")


def test_a_busy_kernel_reads_what_is_typed_at_once(files, tmp_path):
    """However many exits it has without coming out by itself."""
    assert "hlt" not in BUSY
    trace = boot(tmp_path / "t", files["busy"], lambda machine: Visitor.sit_down(machine, PIECES, [1]))
    assert len(objects(trace)) < 200
