"""The pytest plugin, in a pytest of its own."""

import os
import subprocess
import sys

from cli_guests import ROOT

TESTS = '''
import pytest
from vmm.errors import InputError

def test_holds(run_guest):
    run = run_guest(
        "alias-patch",
        script="""
            vmm-script/1
            exactly 100 modifications rip=writer
            end port value=0x82
            console contains "338350"
        """,
        hashes=["0x10000:16"],
    )
    assert run.status == 0
    assert run.end == {"kind": "end", "reason": "port", "rip": run.state["registers"]["rip"], "port": 244, "value": 130}
    assert len(run.of("modification")) == 100
    assert run.of("exit", reason="IO_INSTRUCTION")[-1]["port"] == 244
    assert [record["seq"] for record in run.records] == list(range(1, len(run.records) + 1))
    assert run.console == "alias-patch sum 338350 -> 0x82\\n"
    assert run.state["hashes"][0]["length"] == 16
    with pytest.raises(AttributeError):
        run.status = 1

def test_from_a_file(run_guest, tmp_path):
    (tmp_path / "s").write_text("vmm-script/1\\nend port\\n")
    run_guest("patch-ahead", expect=tmp_path / "s")

def test_without_a_script(run_guest):
    assert run_guest("patch-ahead").status == 0

def test_bad_input(run_guest):
    for bad in ({"script": "no"}, {"hashes": ["1"]}, {"script": "a", "expect": "b"}):
        with pytest.raises(InputError):
            run_guest("patch-ahead", **bad)
    with pytest.raises(InputError):
        run_guest("nosuch")

def test_diverges(run_guest):
    run_guest("alias-patch", script="vmm-script/1\\nexactly 99 modifications rip=writer\\n")
'''


def test_the_fixture(tmp_path):
    (tmp_path / "test_guests.py").write_text(TESTS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "vmm.testing", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert "1 failed, 4 passed" in done.stdout, done.stdout
    assert "alias-patch does not run as its script says" in done.stdout
    assert "script:2" in done.stdout
    assert "> " in done.stdout
    assert 'run_guest("alias-patch", script=' in done.stdout
    assert "vmm/testing.py" not in done.stdout
