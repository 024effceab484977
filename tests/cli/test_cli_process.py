"""What only a process of its own can show: Ctrl-C, pipes, start-up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_guests import EXITS_FOR_EVER, ROOT, SPIN, TWO_VCPUS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def wait_until_it_runs(child, folder):
    """Wait until the guest executes: then the trace's temporary file is there, and a moment has passed."""
    deadline = time.monotonic() + 20
    while not list(folder.glob(".vmm-*.tmp")):
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
@pytest.mark.parametrize("more", ["", TWO_VCPUS], ids=["one vCPU", "two vCPUs"])
@pytest.mark.parametrize("code", [SPIN, EXITS_FOR_EVER], ids=["no exits", "many exits"])
def test_a_signal_ends_the_run_and_leaves_whole_files(process, guest, tmp_path, code, more, number, status):
    folder = guest(code, more=f"{more}\n[limits]\nexits = 1000000000")
    out = tmp_path / "out"
    out.mkdir()
    child = process("run", folder, "-q", "--trace", out / "trace", "--state", out / "state")
    wait_until_it_runs(child, out)
    began = time.monotonic()
    child.send_signal(number)
    _, complaint = child.communicate(timeout=20)
    took = time.monotonic() - began
    assert child.returncode == status
    assert complaint == b"vmm: tiny: interrupted before the guest had ended\n"
    assert sorted(path.name for path in out.iterdir()) == ["state", "trace"]
    records = [json.loads(line) for line in (out / "trace").read_text().splitlines()]
    assert (records[-1]["kind"], records[-1]["reason"]) == ("end", "interrupted")
    assert json.loads((out / "state").read_text())["end"] == {"reason": "interrupted"}
    assert took < 2  # 0.2 s on a machine with nothing else to do


def test_many_signals_cannot_spoil_a_file(process, guest, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "trace").write_text("before")
    child = process("run", guest(EXITS_FOR_EVER, more="[limits]\nexits = 1000000000"), "--trace", out / "trace")
    wait_until_it_runs(child, out)
    while child.poll() is None:
        child.send_signal(signal.SIGINT)
        time.sleep(0.002)
    child.communicate()
    assert child.returncode == 130
    assert [path.name for path in out.iterdir()] == ["trace"]
    assert json.loads((out / "trace").read_text().splitlines()[-1])["kind"] == "end"


def test_a_reader_that_leaves_is_no_error(process, guest, tmp_path):
    trace = tmp_path / "trace"
    child = process("run", "read-code", "--all", "--trace", trace)
    assert child.stdout.readline() == b"read-code\n"
    child.stdout.close()
    complaint = child.stderr.read()
    assert child.wait(20) == 0
    assert complaint == b""
    assert json.loads(trace.read_text().splitlines()[-1])["kind"] == "end"


@pytest.mark.parametrize("command", [["guests"], ["guests", "--json"], ["run", "patch-ahead", "--trace", "-"]])
def test_nobody_reads_at_all(process, command):
    reader, writer = os.pipe()
    os.close(reader)
    child = process(*command, stdout=writer)
    os.close(writer)
    complaint = child.stderr.read()
    assert child.wait(20) == 0
    assert b"Traceback" not in complaint
    assert b"BrokenPipe" not in complaint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", [["guests"], ["run", "patch-ahead"]])
def test_no_room_for_standard_output(process, command):
    with Path("/dev/full").open("wb") as full:
        child = process(*command, stdout=full)
    complaint = child.stderr.read()
    assert child.wait(20) == 2
    assert complaint.startswith(b"vmm: standard output: cannot be written (No space left on device)")
    assert complaint.count(b"\n") == 1


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT, text=True)
    return set(done.stdout.split())


def test_the_engine_is_loaded_only_to_run_a_guest():
    commands = ", ".join(f"vmm.commands.{name}" for name in ("guests", "check", "audit"))
    assert "unicorn" not in loaded_by(f"import vmm.cli, vmm.testing, {commands}")


def test_scripts_are_loaded_only_for_a_run_with_one():
    assert "vmm.trace.matcher" not in loaded_by("import vmm.commands.run")


def test_the_status_line_is_for_terminals(process, guest):
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    child = process("run", guest(SPIN), "--seconds", "2.6", stderr=slave)
    shown, _ = child.communicate(timeout=30)
    os.close(slave)
    line = os.read(master, 10000).decode()
    os.close(master)
    assert "tiny: 1 exits, 0 modifications so far" in line
    assert b"so far" not in shown
    assert child.returncode == 3


def test_colours_are_for_terminals(process):
    pty = pytest.importorskip("pty")

    def shown(*args, **env):
        master, slave = pty.openpty()
        child = process("run", "patch-ahead", *args, stdout=slave, env={"TERM": "xterm", **env})
        os.close(slave)
        text = b""
        try:
            while piece := os.read(master, 4096):
                text += piece
        except OSError:  # how Linux says that the other side is closed
            pass
        os.close(master)
        child.communicate()
        return b"\x1b[" in text

    assert shown()
    assert not shown(NO_COLOR="1")
    assert not shown("--color", "never")
    assert shown("--color", "always", NO_COLOR="1")
