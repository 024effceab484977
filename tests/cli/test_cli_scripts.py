"""What a script does to a guest through `vmm run --expect`."""

import json

import pytest
from cli_guests import READ_PORT

HANDLER = 0x11000


@pytest.fixture
def scripted(vmm, tmp_path):
    """Runs a guest under a script; the result, the state and the records of the trace."""

    def run(folder, *lines):
        script, state, trace = tmp_path / "s.script", tmp_path / "s.json", tmp_path / "s.jsonl"
        script.write_text("\n".join(["vmm-script/1", *lines, ""]))
        result = vmm("run", folder, "--expect", script, "--state", state, "--trace", trace, "-q", "--check")
        if not state.exists():
            return result, None, None
        lines = [json.loads(line) for line in trace.read_text().splitlines()[1:]]
        records = [line for line in lines if line["kind"] not in ("input", "state")]
        return result, json.loads(state.read_text()), records

    return run


def test_answer_a_port(scripted, guest):
    result, state, _ = scripted(guest(READ_PORT), "exit IO_INSTRUCTION port=0x60 -> answer 0x5a", "end port value=0x5a")
    assert result.exit_code == 0, result.stderr
    assert state["end"]["value"] == 0x5A


def test_only_an_in_can_be_answered(scripted, guest):
    result, _, _ = scripted(guest(READ_PORT), "exit IO_INSTRUCTION port=0xf4 -> answer 1")
    assert result.exit_code == 1
    assert "s.script:2" in result.stderr
    assert "only an IN can be answered" in result.stderr


def test_stop(scripted, guest):
    result, state, records = scripted(guest(READ_PORT), "exit IO_INSTRUCTION port=0x60 -> stop", "next end stopped")
    assert result.exit_code == 0, result.stderr
    assert state["end"] == {"reason": "stopped"}
    assert [record["kind"] for record in records[-2:]] == ["exit", "end"]


def test_write_code(scripted, guest):
    """mov al, 1 behind a port access becomes mov al, 7: the old translation must not run."""
    code = bytes.fromhex("e680 b001 e6f4")
    result, state, records = scripted(
        guest(code),
        "exit IO_INSTRUCTION port=0x80 -> write gpa=0x10003 bytes=07",
        "next modification host gpa=0x10003 old=01 new=07 rip=none",
        "end port value=7",
    )
    assert result.exit_code == 0, result.stderr
    assert state["end"]["value"] == 7
    kinds = [record["kind"] for record in records]
    assert kinds.index("modification") == kinds.index("exit", 2) + 1


def test_a_write_outside_of_memory_is_a_divergence(scripted, guest):
    result, _, _ = scripted(guest(READ_PORT), "exit IO_INSTRUCTION -> write gpa=0xfffff bytes=0102")
    assert result.exit_code == 1
    assert "s.script:2" in result.stderr
    assert "the action cannot be done" in result.stderr


def test_protect(scripted, guest):
    """The byte is read without an exit, and with one after the page was made unreadable."""
    read = bytes.fromhex("a00000020000000000")  # mov al, [0x20000]
    result, _, _ = scripted(
        guest(read + b"\xe6\x80" + read + b"\xe6\xf4"),
        "exit IO_INSTRUCTION port=0x80 -> protect gpa=0x20000 length=0x1000 access=---",
        "exit EPT_VIOLATION gpa=0x20000 qualification has 1",
        "exactly 1 exit EPT_VIOLATION gpa=0x20000",
        "end port",
    )
    assert result.exit_code == 0, result.stderr


def test_protect_never_makes_code_writable(scripted, guest):
    result, _, _ = scripted(
        guest(READ_PORT), "exit IO_INSTRUCTION -> protect gpa=0x10000 length=0x1000 access=rwx"
    )
    assert result.exit_code == 1
    assert "never both" in result.stderr


def with_handler(guest, code, handler, vector):
    """A guest in real mode: the vector table is at 0, so that a handler needs no more than four bytes."""
    setup = bytes.fromhex("31c0 8ed8 8ed0 bc0070".replace(" ", ""))  # ds = ss = 0, sp = 0x7000
    setup += b"\xc7\x06" + (4 * vector).to_bytes(2, "little") + b"\x00\x11"  # mov word ptr [4 * vector], 0x1100
    setup += b"\xc7\x06" + (4 * vector + 2).to_bytes(2, "little") + b"\x00\x00"
    folder = guest((setup + code).ljust(0x100, b"\xf4") + handler, mode="real", memory=0x10000)
    manifest = folder / "guest.toml"
    text = manifest.read_text().replace("load = 0x10000", "load = 0x1000").replace("entry = 0x10000", "entry = 0x1000")
    manifest.write_text(text.replace("rsp = 0x80000", "rsp = 0x7000"))
    return folder


REPORT_3 = bytes.fromhex("b003 e6f4".replace(" ", ""))  # mov al, 3; out 0xf4, al


def test_inject_an_interrupt(scripted, guest):
    folder = with_handler(guest, bytes.fromhex("e680 b001 e6f4".replace(" ", "")), REPORT_3, 0x40)
    result, state, _ = scripted(
        folder,
        "exit IO_INSTRUCTION port=0x80 -> inject vector=0x40",
        'injection "external interrupt" vector=0x40',
        "end port value=3",
    )
    assert result.exit_code == 0, result.stderr
    assert state["end"]["value"] == 3


def test_an_event_at_a_violation_comes_instead_of_the_instruction(scripted, guest):
    """A store to code gets #GP from the script: the bytes stay, and the handler runs."""
    store = bytes.fromhex("c606001190 b001 e6f4".replace(" ", ""))  # mov byte ptr [0x1100], 0x90
    folder = with_handler(guest, store, REPORT_3, 13)
    result, state, _ = scripted(
        folder,
        "exit EPT_VIOLATION gpa=0x1100 -> inject vector=13",
        "never modification gpa=0x1100",
        "end port value=3",
    )
    assert result.exit_code == 0, result.stderr
    assert state["end"]["value"] == 3


def test_hlt_is_woken(scripted, guest):
    folder = with_handler(guest, b"\xf4", REPORT_3, 0x41)
    result, state, _ = scripted(folder, "exit HLT -> inject vector=0x41", "end port value=3")
    assert result.exit_code == 0, result.stderr
    assert state["end"]["value"] == 3


def test_an_error_code_that_the_exception_has_not(scripted, guest):
    result, _, _ = scripted(guest(READ_PORT), "exit IO_INSTRUCTION -> inject vector=3 error=1")
    assert result.exit_code == 1
    assert "vector 3 has no error code" in result.stderr


def test_a_run_that_lost_its_script_is_stopped(scripted, guest):
    """A guest that polls a port for ever, because the script gave up answering it, must not use up its budget."""
    poll = bytes.fromhex("e460 a801 74fa b001 e6f4".replace(" ", ""))  # in al, 0x60; test al, 1; jz; ...
    result, state, _ = scripted(
        guest(poll, more="[limits]\nexits = 100000"),
        "next exit IO_INSTRUCTION port=0x61 -> answer 1",
    )
    assert result.exit_code == 1
    assert state["end"] == {"reason": "stopped"}
    assert state["counters"]["exits"] < 10


def test_own_is_the_script_beside_the_manifest(vmm, guest):
    folder = guest(READ_PORT)
    missing = vmm("run", folder, "--expect", "own", "-q")
    assert missing.exit_code == 2
    assert "expect.script" in missing.stderr
    (folder / "expect.script").write_text("vmm-script/1\nexit IO_INSTRUCTION port=0x60 -> answer 7\nend port value=7\n")
    assert vmm("run", folder, "--expect", "own", "-q").exit_code == 0
