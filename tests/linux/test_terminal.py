"""A boot with somebody at the terminal, and boots that are cut off: by a signal, and by the limit of time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from boots import APPEND
from terminals import ROOT, Session

from vmm.memory import PAGE

pytestmark = pytest.mark.linux

#: Seconds that a boot may take on a machine that has much else to do.
PATIENCE = 900.0


def options(files: tuple[Path, Path]) -> list[str]:
    kernel, initrd = files
    return ["--kernel", str(kernel), "--initrd", str(initrd), "--append", APPEND]


def test_a_shell_at_a_terminal(files):
    with Session(*options(files), patience=PATIENCE) as session:
        session.expect(b"/ # ")
        assert not session.modes[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        session.type(b"echo $((6 * 7))\r")
        session.expect(b"\r\n42\r\n")
        session.type(b"sh -c 'echo be''gun; sleep 100000'\r")
        session.expect(b"begun\r\n")
        session.type(b"\x03")  # the guest's
        session.expect(b"^C")
        session.type(b"echo $?\r")
        session.expect(b"\r\n130\r\n")
        session.type(b"\x01x")
        session.expect(b"exits ")
        assert session.wait() == 0
        assert session.modes == session.before


@pytest.fixture
def cut_off(files, tmp_path):
    """Starts a boot with a trace; gives the process and the file that the trace is written to until the end."""
    started = []

    def start(*more: str):
        command = [sys.executable, "-m", "vmm", "boot", *options(files), "-q", "--trace", "boot.jsonl", *more]
        child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)})
        started.append(child)
        while not (parts := list(tmp_path.glob(".vmm-*.tmp"))):
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.01)
        return child, parts[0]

    yield start
    for child in started:
        child.kill()
        child.wait()
        child.stderr.close()


def whole_trace(path: Path) -> list[dict]:
    """The records of a trace, each with its number; every modification begins with what the one before it left."""
    lines = path.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"}\n") for line in lines)
    objects = [json.loads(line) for line in lines]
    records = [record for record in objects[1:] if record["kind"] not in ("console", "input", "state")]
    assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
    left: dict[int, int] = {}
    code: set[int] = set()
    for record in records:
        if record["kind"] == "frame":
            code.add(record["gpa"])
        elif record["kind"] == "modification":
            old, new = bytes.fromhex(record["old"]), bytes.fromhex(record["new"])
            for gpa, (before, after) in enumerate(zip(old, new, strict=True), record["gpa"]):
                assert left.get(gpa, before) == before or gpa & -PAGE not in code
                left[gpa] = after
    return records


@pytest.mark.parametrize("size", [50_000, 5_000_000], ids=["early", "in the midst"])
def test_a_signal_leaves_the_trace_whole(cut_off, tmp_path, size):
    child, part = cut_off()
    while part.stat().st_size < size:
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, complaint = child.communicate()
    assert (child.returncode, complaint.count(b"interrupted")) == (130, 1)
    last = whole_trace(tmp_path / "boot.jsonl")[-1]
    assert (last["kind"], last["reason"]) == ("end", "interrupted")


def test_the_limit_of_time_leaves_the_trace_whole(cut_off, tmp_path):
    child, _ = cut_off("--seconds", "4")
    _, complaint = child.communicate()
    assert (child.returncode, b"time limit of 4 s" in complaint) == (3, True)
    last = whole_trace(tmp_path / "boot.jsonl")[-1]
    assert (last["kind"], last["reason"], last["limit"]) == ("end", "time", 4)
