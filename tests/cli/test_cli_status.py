"""What `vmm run` exits with."""

import json

import pytest
from cli_guests import END_0X2A, EXITS_FOR_EVER, HALT, INVALID, SPIN


def wants(value):
    return f"[end]\nport = 0xf4\nvalue = {value}"


UNMAPPED = bytes.fromhex("a100000070")  # mov eax, [0x70000000], in protected mode without paging


def ends(vmm, folder, *args):
    """The exit status and the reason in the state file."""
    state = folder / "state.json"
    result = vmm("run", folder, "--quiet", "--state", state, *args)
    return result.exit_code, json.loads(state.read_text())["end"]["reason"], result.stderr


def test_0_for_the_value_that_the_manifest_wants(vmm, guest):
    assert ends(vmm, guest(END_0X2A, more=wants(0x2A))) == (0, "port", "")


def test_0_for_any_value_if_the_manifest_wants_none(vmm, guest):
    assert ends(vmm, guest(END_0X2A)) == (0, "port", "")


def test_1_for_another_value(vmm, guest):
    status, _, complaint = ends(vmm, guest(END_0X2A, more=wants(0x2B)))
    assert status == 1
    assert complaint == (
        "vmm: tiny: the guest ended by 0x2a written to port 0xf4; its manifest wants 0x2b written to port 0xf4\n"
    )


def test_halt_is_an_end_only_if_the_manifest_says_so(vmm, guest):
    assert ends(vmm, guest(HALT, name="wanted", more="[end]\nhalt = true"))[:2] == (0, "halt")
    assert ends(vmm, guest(HALT, name="unwanted"))[:2] == (1, "halt")


def test_1_for_a_guest_that_does_not_keep_w_xor_x(vmm, guest):
    status, reason, complaint = ends(vmm, guest(END_0X2A), "--wx", "stop")
    assert (status, reason) == (1, "W^X violation")
    assert "a fetch at 0x10000 that the W^X policy refuses (rule mapping)" in complaint


#: Its first instruction changes the operand of the second one: mov byte [0x10008], 0x2b
SELF_PATCH = bytes.fromhex("c605080001002b") + END_0X2A


@pytest.mark.parametrize(("model", "value"), [("coherent", 0x2B), ("serialised", 0x2A), ("explicit", 0x2A)])
def test_1_for_stale_code_of_its_own_even_if_the_end_is_right(vmm, guest, model, value):
    folder = guest(SELF_PATCH, mode="protected", more=wants(value))
    status, reason, complaint = ends(vmm, folder, "--coherence", model)
    assert (status, reason) == (int(model != "coherent"), "port")
    words = "1 execution of stale code: it was changed, and executed without synchronising"
    assert complaint == ("" if model == "coherent" else f"vmm: tiny: {words}\n")


def test_0_for_stale_code_that_another_vcpu_wrote_if_the_end_is_right(vmm):
    """A protocol for cross-modifying code permits it between a store and the interrupt behind it."""
    result = vmm("run", "cross-modify", "--coherence", "serialised")
    assert (result.exit_code, result.stderr) == (0, "")
    words = "13 executions of stale code (serialised); all of what another vCPU wrote, as the model permits"
    assert words in result.stdout


def test_1_if_the_guest_cannot_do_with_it(vmm):
    result = vmm("run", "-q", "cross-modify-unsynchronised")
    assert result.exit_code == 1
    assert "its manifest wants 0x41" in result.stderr


def test_2_for_a_guest_without_page_tables_that_should_keep_it(vmm):
    result = vmm("run", "real-mode", "--wx", "stop")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("vmm: wx: without page tables everything is writable and executable; ")


def test_3_for_a_triple_fault(vmm, guest):
    status, reason, complaint = ends(vmm, guest(INVALID))
    assert (status, reason) == (3, "triple fault")
    assert complaint.startswith("vmm: tiny: the guest died: triple fault at 0x10000")


def test_3_for_exits_used_up(vmm, guest):
    status, reason, complaint = ends(vmm, guest(EXITS_FOR_EVER, more="[limits]\nexits = 50"))
    assert (status, reason) == (3, "exits")
    assert "budget of 50 exits" in complaint
    assert "raise [limits].exits" in complaint


def test_3_for_time_used_up(vmm, guest):
    status, reason, complaint = ends(vmm, guest(SPIN), "--seconds", "0.2")
    assert (status, reason) == (3, "time")
    assert "time limit of 0.2 s" in complaint


def test_3_for_memory_that_does_not_exist(vmm, guest):
    status, reason, complaint = ends(vmm, guest(UNMAPPED, mode="protected"))
    assert (status, reason) == (3, "unmapped memory")
    assert "0x70000000" in complaint


def test_1_if_the_script_does_not_hold(vmm, guest, tmp_path):
    script = tmp_path / "expect.script"
    script.write_text("vmm-script/1\nend port value=0x2b\n")
    status, _, complaint = ends(vmm, guest(END_0X2A), "--expect", script)
    assert status == 1
    assert "expect.script:2" in complaint
    assert "it is 0x2a" in complaint


def test_0_if_the_script_holds(vmm, guest, tmp_path):
    script = tmp_path / "expect.script"
    script.write_text("vmm-script/1\nend port value=0x2a\n")
    assert ends(vmm, guest(END_0X2A), "--expect", script) == (0, "port", "")


def test_3_is_stronger_than_a_script_that_fails(vmm, guest, tmp_path):
    script = tmp_path / "expect.script"
    script.write_text("vmm-script/1\nend port\n")
    status, _, complaint = ends(vmm, guest(INVALID), "--expect", script)
    assert status == 3
    assert "expect.script:2" in complaint
    assert "triple fault" in complaint


def test_1_and_a_whole_trace_where_the_vmm_gives_up(vmm, guest, tmp_path, monkeypatch):
    from vmm.errors import AuditError
    from vmm.run_loop import RunLoop

    def give_up(*_):
        raise AuditError("block 7 at 0x10000 is stale")

    monkeypatch.setattr(RunLoop, "run", give_up)
    trace = tmp_path / "trace.jsonl"
    status, reason, complaint = ends(vmm, guest(END_0X2A), "--trace", trace)
    assert (status, reason) == (1, "error")
    assert complaint.startswith("vmm: tiny: AuditError: block 7 at 0x10000 is stale; guest at 0x10000")
    assert json.loads(trace.read_text().splitlines()[-1])["error"] == "AuditError"


@pytest.mark.parametrize("option", ["--audit", "--check", "--blocks", "--all", "--verbose"])
def test_no_option_changes_the_end(vmm, guest, option):
    assert ends(vmm, guest(END_0X2A, more=wants(0x2A)), option)[:2] == (0, "port")


def test_four_blocks_are_enough(vmm, tmp_path):
    state = tmp_path / "state.json"
    assert vmm("run", "patch-ahead", "-q", "--capacity", 4, "--state", state).exit_code == 0
    blocks = json.loads(state.read_text())["counters"]["blocks"]
    assert blocks["evicted"] > 0
    assert blocks["created"] == blocks["live"] + blocks["invalidated"] + blocks["evicted"]
