"""The command line as tests use it, and small guests made of a few bytes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from cli_guests import MANIFEST, ROOT
from click.testing import CliRunner

from vmm.cli import main


@pytest.fixture
def vmm():
    """Runs ``vmm`` with these arguments in this process."""
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def guest(tmp_path):
    """Makes the folder of a guest that consists of this machine code."""

    def make(code, *, more="", mode="long", name="tiny", memory=0x100000):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "image.bin").write_bytes(code)
        text = MANIFEST.format(name=name, memory=memory, mode=mode, more=more)
        (folder / "guest.toml").write_text(text)
        return folder

    return make


@pytest.fixture
def process():
    """Starts ``python -m vmm`` as a process of its own; what still runs at the end is killed."""
    started = []

    def start(*args, **options):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        command = [sys.executable, "-m", "vmm", *map(str, args)]
        child = subprocess.Popen(
            command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}, env=environment
        )
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            child.kill()
            child.wait()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()
