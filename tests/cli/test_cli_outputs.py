"""The files of a run: whole, the same every time, and where they were asked for."""

import hashlib
import json
import os
import stat

import pytest
from cli_guests import END_0X2A, ROOT, TWO_VCPUS

from vmm.guest.loader import bundled_guests, load_guest

GUESTS = [entry.name for entry in bundled_guests()]
RIGHT = {entry.name for entry in bundled_guests() if not entry.wrong_of}
#: What else a run is given, so that nothing of it comes from the host.
GIVEN = {
    entry.name: ("--time", "1700000000") if load_guest(entry.path).manifest.clock is not None else ()
    for entry in bundled_guests()
}


def trace_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", GUESTS)
def test_two_runs_give_the_same_bytes(vmm, tmp_path, name):
    files = []
    for turn in "ab":
        trace, state = tmp_path / f"{turn}.jsonl", tmp_path / f"{turn}.json"
        result = vmm("run", name, *GIVEN[name], "--blocks", "--trace", trace, "--state", state, "--hash", "0:0x20000")
        assert result.exit_code in ((0,) if name in RIGHT else (0, 1)), result.output
        shown = result.stdout.replace(str(trace), "T").replace(str(state), "S")
        files.append((result.exit_code, trace.read_bytes(), state.read_bytes(), shown))
    assert files[0] == files[1]


@pytest.mark.parametrize("name", GUESTS)
def test_looking_changes_nothing(vmm, tmp_path, name):
    """The state is the same, traced or not, shown or not."""
    quiet, seen = tmp_path / "quiet", tmp_path / "seen"
    vmm("run", name, *GIVEN[name], "--quiet", "--state", quiet, "--hash", "0:0x20000")
    vmm("run", name, *GIVEN[name], "--all", "--trace", tmp_path / "trace", "--state", seen, "--hash", "0:0x20000")
    assert quiet.read_bytes() == seen.read_bytes()


def test_several_vcpus(vmm, tmp_path, guest):
    """Records say whose they are, the state has the registers of all, and the seed decides both."""
    folder = guest(bytes.fromhex("b910000000 0f31 e2fc f4"), more=f"{TWO_VCPUS}[end]\nhalt = true")  # 16 RDTSC
    traces, states = [], []
    for turn, seed in enumerate((5, 5, 6)):
        trace, state = tmp_path / f"{turn}.jsonl", tmp_path / f"{turn}.json"
        result = vmm("run", folder, "-q", "--seed", seed, "--trace", trace, "--state", state)
        assert result.exit_code == 0, result.output
        traces.append([record.get("vcpu") for record in trace_of(trace)[1:] if record["kind"] != "state"])
        states.append(json.loads(state.read_text()))
    assert traces[0] == traces[1] != traces[2]
    assert set(traces[0]) == {0, 1}
    assert [sorted(trace) for trace in traces] == 3 * [sorted(traces[0])]
    for state in states:
        assert state["registers"] == state["vcpus"][0]
        assert [registers["rip"] for registers in state["vcpus"]] == [0x1000A, 0x1000A]


def test_a_trace(vmm, tmp_path):
    trace = tmp_path / "trace.jsonl"
    vmm("run", "alias-patch", "-q", "--trace", trace)
    header, *records = trace_of(trace)
    image = ROOT / "guests" / "alias-patch" / "image.elf"
    assert header == {
        "schema": "vmm-trace/1",
        "guest": "alias-patch",
        "image": hashlib.sha256(image.read_bytes()).hexdigest(),
        "memory": 0x100000,
        "policy": {
            "reads": "step", "writes": "step", "code": "load", "coherence": "coherent", "wx": "off",
            "tlb": "loose",
        },
        "ept": {},
        "manifest": hashlib.sha256(image.with_name("guest.toml").read_bytes()).hexdigest(),
        "target": "alias-patch",
        "options": {"blocks": False, "capacity": 65536, "single_step": False, "traps": True},
        "seed": 0,
        "interactive": False,
        "exact_ports": [],
    }
    numbers = [record["seq"] for record in records if record["kind"] not in ("console", "state")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert records[-1] == {"seq": numbers[-1], "kind": "end", "reason": "port", "rip": 69797, "port": 244, "value": 130}
    assert [record["text"] for record in records if record["kind"] == "console"] == ["alias-patch sum 338350 -> 0x82\n"]
    assert sum(record["kind"] == "modification" for record in records) == 100


def test_a_state(vmm, tmp_path, guest):
    folder, state = guest(END_0X2A), tmp_path / "state.json"
    vmm("run", folder, "-q", "--state", state, "--hash", "0x10000:4", "--hash", "65536:0x1")
    document = json.loads(state.read_text())
    assert document["schema"] == "vmm-state/1"
    assert document["end"] == {"reason": "port", "port": 244, "value": 42}
    assert document["registers"]["rip"] == 0x10004
    assert document["registers"]["rax"] == 0x2A
    assert document["registers"]["rsp"] == 0x80000
    assert document["hashes"] == [
        {"gpa": 0x10000, "length": 4, "sha256": hashlib.sha256(END_0X2A).hexdigest()},
        {"gpa": 0x10000, "length": 1, "sha256": hashlib.sha256(END_0X2A[:1]).hexdigest()},
    ]
    counters = document["counters"]
    assert counters["exits"] == sum(counters["exits_by_reason"].values())
    assert counters["exits_by_reason"] == {"IO_INSTRUCTION": 1, "EPT_VIOLATION": 1}
    assert counters["modifications"] == counters["console_bytes"] == 0
    assert set(counters["blocks"]) == {"created", "live", "invalidated", "evicted"}


def test_standard_output_as_a_file(vmm, guest):
    result = vmm("run", guest(END_0X2A), "--trace", "-")
    kinds = [json.loads(line).get("kind") for line in result.stdout.splitlines()]
    assert kinds == [None, "exit", "frame", "exit", "state", "end"]
    assert "written to port 0xf4" in result.stderr


def test_a_file_keeps_its_mode_and_its_links(vmm, guest, tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("before")
    real.chmod(0o640)
    link.symlink_to(real)
    assert vmm("run", guest(END_0X2A), "-q", "--state", link).exit_code == 0
    assert link.is_symlink()
    assert json.loads(real.read_text())["schema"] == "vmm-state/1"
    if os.name == "posix":
        assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_new_file_has_the_usual_mode(vmm, guest, tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    state = tmp_path / "state"
    vmm("run", guest(END_0X2A), "-q", "--state", state)
    assert state.stat().st_mode == usual.stat().st_mode


def test_a_device_may_be_both(vmm, guest):
    assert vmm("run", guest(END_0X2A), "-q", "--state", os.devnull, "--trace", os.devnull).exit_code == 0


def test_a_wrong_run_keeps_its_files(vmm, guest, tmp_path):
    folder = guest(END_0X2A, more="[end]\nport = 0xf4\nvalue = 1")
    trace = tmp_path / "trace"
    assert vmm("run", folder, "-q", "--trace", trace).exit_code == 1
    assert trace_of(trace)[-1]["kind"] == "end"
