"""Bad input gets one line that says where, what and what to do, status 2, and leaves no file behind."""

import os
from pathlib import Path

import pytest
from cli_guests import END_0X2A


def refused(result):
    """The one line of a refusal."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("vmm: ")
    assert "Traceback" not in result.stderr
    return result.stderr


CASES = [
    (["nosuch"], "nosuch: no such guest or file; give a file, or a name that `vmm guests` lists"),
    (["alias-patc"], "did you mean the bundled guest alias-patch?"),
    (["GUEST", "--hash", "65536"], "--hash: '65536' is not GPA:LENGTH; write two numbers"),
    (["GUEST", "--hash", "-1:4"], "is not GPA:LENGTH"),
    (["GUEST", "--hash", "0x1g:4"], "is not GPA:LENGTH"),
    (["GUEST", "--hash", "0x10:0"], "0x10:0 has no length"),
    (["GUEST", "--hash", "0xfffff:2"], "0xfffff:2 lies out of RAM, which ends at 0x100000"),
    (["GUEST", "--hash", "99999999999999999999:1"], "lies out of RAM"),
    (["GUEST", "--seconds", "0"], "--seconds 0 is no time limit"),
    (["GUEST", "--seconds", "nan"], "--seconds nan is no time limit"),
    (["GUEST", "--seconds", "inf"], "--seconds inf is no time limit"),
    (["GUEST", "--capacity", "0"], "--capacity 0 keeps no block"),
    (["GUEST", "--color", "sometimes"], "sometimes"),
    (["GUEST", "--nosuch"], "--nosuch"),
    ([], "Missing argument 'TARGET'; see `vmm run --help`"),
    (["GUEST", "--expect", "missing.script"], "missing.script: cannot be read"),
    (["GUEST", "--expect", "BAD_SCRIPT"], "bad.script:2"),
    (["GUEST", "--trace", "missing/trace"], "--trace missing/trace: cannot be written (No such file"),
    (["GUEST", "--trace", "."], "--trace .: cannot be written (it is a folder)"),
    (["GUEST", "--trace", "a\0b"], "cannot be written"),
    (["GUEST", "--trace", "same", "--state", "./same"], "--state ./same: the same file as --trace"),
    (["GUEST", "--trace", "-", "--state", "-"], "--state -: the same file as --trace"),
    (["GUEST", "--state", "GUEST/guest.toml"], "is read by this run"),
    (["GUEST", "--trace", "GUEST/image.bin"], "is read by this run"),
    (["GUEST", "--trace", "BAD_SCRIPT", "--expect", "GOOD_SCRIPT", "--state", "GOOD_SCRIPT"], "is read by this run"),
]


@pytest.mark.parametrize(("args", "message"), CASES, ids=lambda value: str(value)[:40])
def test_one_line(vmm, guest, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    folder = guest(END_0X2A)
    (tmp_path / "bad.script").write_text("vmm-script/1\nexpect nonsense\n")
    (tmp_path / "good.script").write_text("vmm-script/1\nend\n")
    names = {"GUEST": str(folder), "BAD_SCRIPT": "bad.script", "GOOD_SCRIPT": "good.script"}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, real in names.items():
        args = [arg.replace(name, real) for arg in args]
    line = refused(vmm("run", *args))
    assert message in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_names_of_one_file(vmm, guest, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("before")
    os.link(one, other)
    line = refused(vmm("run", guest(END_0X2A), "--trace", one, "--state", other))
    assert "the same file as --trace" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("option", ["--trace", "--state"])
def test_a_full_disk(vmm, guest, tmp_path, option):
    other = {"--trace": "--state", "--state": "--trace"}[option]
    result = vmm("run", guest(END_0X2A), "-q", option, "/dev/full", other, tmp_path / "other")
    assert f"vmm: {option} /dev/full: cannot be written (No space left on device)" in refused(result)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_full_disk_in_the_middle_of_a_run_leaves_nothing(vmm, guest, tmp_path, monkeypatch):
    from vmm.commands import outputs

    def full(file, _data):
        raise file._error(OSError(28, "No space left on device"))

    monkeypatch.setattr(outputs.OutputFile, "write", full)
    trace = tmp_path / "trace"
    trace.write_text("what was there before")
    line = refused(vmm("run", "read-code", "-q", "--trace", trace))
    assert "No space left on device" in line
    assert trace.read_text() == "what was there before"
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(vmm, guest, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "cannot be written (Permission denied)" in refused(vmm("run", guest(END_0X2A), "--trace", closed / "t"))


def test_an_engine_that_nobody_knows(vmm, guest, monkeypatch):
    from vmm import assembly
    from vmm.errors import EngineError

    def refuse():
        raise EngineError("Unicorn 9.9 is not known; run: pip install unicorn==2.1.4")

    monkeypatch.setattr(assembly, "verify_engine", refuse)
    assert refused(vmm("run", guest(END_0X2A))) == (
        "vmm: Unicorn 9.9 is not known; run: pip install unicorn==2.1.4\n"
    )


def test_a_name_cannot_drive_the_terminal(vmm):
    assert "\x1b" not in refused(vmm("run", "no\x1b[31msuch\nguest"))


def test_unknown_commands(vmm):
    assert "No such command 'dance'" in refused(vmm("dance"))
    result = vmm()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr
