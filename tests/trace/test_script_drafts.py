"""Scripts that are written from a stored trace."""

import json

from vmm.commands.run import RunRequest, run
from vmm.guest.loader import load_guest
from vmm.trace.check import check_trace
from vmm.trace.names import symbols_of
from vmm.trace.script import Script
from vmm.trace.wording import as_line, as_script


def test_the_script_of_a_whole_trace_holds_for_it_and_for_another_run(tmp_path):
    trace = tmp_path / "run.jsonl"
    assert run(RunRequest("patch-ahead", trace=str(trace), quiet=True)) == 0
    _, *records = map(json.loads, trace.read_text().splitlines())
    assert {record["kind"] for record in records} >= {"exit", "modification", "console", "end"}

    text = as_script(records)
    script = Script.parse(text, file="draft.script", symbols=symbols_of(load_guest("patch-ahead")))
    verdict = check_trace(trace, script)
    assert verdict.ok, verdict.divergence.render()
    (tmp_path / "draft.script").write_text(text)
    assert run(RunRequest("patch-ahead", expect=str(tmp_path / "draft.script"), quiet=True)) == 0


def test_a_line_does_not_name_the_number_that_a_trace_gives_a_record():
    assert as_line({"seq": 7, "kind": "end", "reason": "port", "rip": 5, "port": 4}) == "end port rip=5 port=4"
