"""`vmm ept`: what it says, as text and as JSON, and what it refuses."""

from __future__ import annotations

import json

import pytest


def test_a_qualification_is_put_into_words_one_field_a_line(vmm):
    done = vmm("ept", "explain", "--qualification", "0x182")
    lines = done.output.splitlines()
    assert done.exit_code == 0
    assert lines[0] == "exit qualification 0x182: a write was refused: the EPT allows --- (SDM vol. 3, table 28-7)"
    assert lines[2].split() == ["1", "1", "the", "access", "was", "a", "data", "write", "table", "28-7"]
    assert len(lines) == 1 + 17


def test_an_entry_is_judged_for_a_processor(vmm):
    fine = vmm("ept", "explain", "--entry", "0x30000034", "--level", "1")
    assert "maps a page of 4 KiB at HPA 0x30000000, --x" in fine.output
    for profile in ("minimal", "0x4040"):
        wrong = vmm("ept", "explain", "--entry", "0x30000034", "--level", "1", "--profile", profile)
        assert "misconfigured: X without R, on a processor without execute-only translations" in wrong.output


def test_explanations_are_json_objects(vmm):
    out = json.loads(vmm("ept", "explain", "--entry", "0", "--level", "2", "--json").output)
    assert out["schema"] == "vmm-ept/1"
    assert out["verdict"] == "not present; all other bits are ignored"
    assert out["fields"][0] == {"bits": "0", "value": 0, "meaning": "forbids reads", "section": "29.3.2"}


def test_a_walk_shows_the_entries_and_the_rule_that_decides(vmm):
    done = vmm("ept", "walk", "alias-patch", "0x11000", "--access", "write")
    lines = done.output.splitlines()
    assert [line.split()[0] for line in lines] == ["GPA", "PML4E", "PDPTE", "PDE", "PTE", "EPT"]
    assert lines[-1] == "EPT violation: the PTE does not allow a write (SDM vol. 3, 29.3.3.2)"
    assert vmm("ept", "walk", "alias-patch", "0x11abc", "--access", "fetch").output.endswith(
        "the fetch reaches HPA 0x11abc (SDM vol. 3, 29.3.3.3)\n"
    )


def test_so_does_its_json(vmm):
    out = json.loads(vmm("ept", "walk", "alias-patch", "0x11000", "--profile", "accessed-dirty", "--json").output)
    assert (out["gpa"], out["eptp"], out["access"]) == (0x11000, 0x105E, "read")
    assert [entry["what"].split()[0] for entry in out["entries"]] == ["PML4E", "PDPTE", "PDE", "PTE"]
    assert out["verdict"] == "EPT violation: the PTE does not allow a read"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["explain"], "one of --qualification and --entry is needed"),
        (["explain", "--qualification", "1", "--entry", "1", "--level", "1"], "one of --qualification and --entry"),
        (["explain", "--entry", "7"], "no --level; say which"),
        (["explain", "--entry", "7", "--level", "5"], "--level"),
        (["explain", "--qualification", "many"], "'many' is no number"),
        (["explain", "--qualification", "1\n2"], "is no number"),
        (["explain", "--qualification", str(1 << 64)], "is out of range; give 0 to 0xffffffffffffffff"),
        (["explain", "--entry", "-1", "--level", "1"], "is out of range"),
        (["explain", "--entry", "7", "--level", "1", "--profile", "pentium"], "there is no profile 'pentium'; choose"),
        (["explain", "--entry", "7", "--level", "1", "--profile", "1"], "set bits 6 and 14"),
        (["walk", "alias-patch", "1000000000000000"], "GPA: 1000000000000000 is out of range"),
        (["walk", "no-such-guest", "0"], "no such guest"),
    ],
)
def test_bad_input_is_one_line_and_status_2(vmm, arguments, complaint):
    done = vmm("ept", *arguments)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert complaint in done.stderr
