"""`vmm guests` and `vmm check`."""

import json
from pathlib import Path

from cli_guests import END_0X2A, ROOT


def test_guests_lists_all_with_a_line_each(vmm):
    result = vmm("guests")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for folder in (ROOT / "guests").glob("*/guest.toml"):
        assert sum(line.split()[:1] == [folder.parent.name] for line in lines) == 1


def test_guests_as_json(vmm):
    listed = json.loads(vmm("guests", "--json").stdout)
    assert {entry["name"] for entry in listed} == {path.parent.name for path in (ROOT / "guests").glob("*/guest.toml")}
    for entry in listed:
        assert entry["summary"]
        path = Path(entry["path"])
        assert path.is_file()
        script = (path.parents[1] / entry["wrong_of"] if "wrong_of" in entry else path.parent) / "expect.script"
        assert entry.get("expect") == (str(script) if script.is_file() else None)


def test_a_guest_by_name_by_file_by_folder_by_image(vmm):
    folder = ROOT / "guests" / "patch-ahead"
    shown = vmm("run", "patch-ahead").stdout
    assert vmm("run", folder).stdout == shown
    assert vmm("run", folder / "guest.toml").stdout == shown
    assert vmm("run", folder / "image.elf").exit_code == 0


def test_version_and_help(vmm):
    assert vmm("--version").stdout.startswith("vmm")
    for command in ([], ["run"], ["guests"], ["check"]):
        result = vmm(*command, "--help")
        assert result.exit_code == 0
        assert "Usage: vmm" in result.stdout


def checked(vmm, tmp_path, script, *args):
    trace, file = tmp_path / "trace.jsonl", tmp_path / "check.script"
    vmm("run", "alias-patch", "-q", "--trace", trace)
    file.write_text(script)
    return vmm("check", trace, "--expect", file, *args)


def test_check_holds(vmm, tmp_path):
    script = 'vmm-script/1\nexactly 100 modifications rip=writer\nend port value=0x82\nconsole contains "338350"\n'
    result = checked(vmm, tmp_path, script, "--guest", "alias-patch")
    assert (result.exit_code, result.stdout) == (0, "the script holds\n")


def test_check_fails_as_the_run_does(vmm, tmp_path):
    """The same report, with the same record numbers, from the trace and from the run."""
    script = "vmm-script/1\nend port value=0x83\n"
    from_trace = checked(vmm, tmp_path, script)
    from_run = vmm("run", "alias-patch", "-q", "--expect", tmp_path / "check.script")
    assert from_trace.exit_code == from_run.exit_code == 1
    assert from_trace.stderr.replace(" seq=0x159", "").strip() == from_run.stderr.strip()
    assert "#345 end port" in from_trace.stderr


def test_check_needs_the_guest_for_its_symbols(vmm, tmp_path):
    result = checked(vmm, tmp_path, "vmm-script/1\nmodification rip=writer\n")
    assert result.exit_code == 2
    assert result.stderr.startswith("vmm: ")
    assert "no symbol `writer`" in result.stderr


def test_check_refuses_what_is_no_trace(vmm, tmp_path, guest):
    script = tmp_path / "s"
    script.write_text("vmm-script/1\nend\n")
    for path in (guest(END_0X2A) / "image.bin", tmp_path / "missing", tmp_path):
        result = vmm("check", path, "--expect", script)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
