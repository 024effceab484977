"""A boot of Debian's kernel is recorded, and comes again from its trace.

Run with ``pytest -m linux``; the packages are fetched with apt.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmm.cli import main

pytestmark = pytest.mark.linux

COMMANDS = "uname -s\nseq 1 1000 | md5sum\npoweroff -f\n"


def vmm(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trace(files, tmp_path_factory) -> Path:
    kernel, initrd = files
    folder = tmp_path_factory.mktemp("recorded")
    commands, trace = folder / "commands", folder / "trace"
    commands.write_text(COMMANDS)
    append = ("--append", "console=ttyS0 quiet panic=-1")
    made = vmm("boot", "--kernel", kernel, "--initrd", initrd, *append, "--input", commands, "--trace", trace)
    assert made.exit_code == 0, made.output
    assert "53d025127ae99ab79e8502aae2d9bea6" in made.output, "seq 1 1000 | md5sum"
    commands.unlink()
    return trace


def test_the_same_boot_comes_again(trace, tmp_path):
    again = vmm("replay", trace, "--trace", tmp_path / "again")
    assert again.exit_code == 0, again.output
    *_, state, end = (json.loads(line) for line in trace.read_bytes().splitlines()[-2:])
    assert (state["kind"], end["reason"]) == ("state", "halt")
    assert f"state {state['sha256']}\n" in again.output
    assert (tmp_path / "again").read_bytes() == trace.read_bytes()


@pytest.mark.parametrize(("kind", "key"), [("input", "data"), ("modification", "new")])
def test_whatever_is_spoiled_is_found(trace, tmp_path, kind, key):
    """The first line of a kind."""
    lines = trace.read_bytes().splitlines(keepends=True)
    at = next(at for at, line in enumerate(lines) if f'"kind": "{kind}"'.encode() in line)
    found = json.loads(lines[at])
    lines[at] = json.dumps({**found, key: flipped(found[key])}).encode() + b"\n"
    (tmp_path / "spoiled").write_bytes(b"".join(lines))
    again = vmm("replay", tmp_path / "spoiled")
    assert again.exit_code == 1
    assert "the replay parts from the recording" in again.output


def flipped(digits: str) -> str:
    """Hexadecimal digits of which the last one is another."""
    return digits[:-1] + f"{int(digits[-1], 16) ^ 1:x}"
