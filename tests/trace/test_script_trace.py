"""Finished traces held against scripts, and what is no trace."""

import json

import pytest
from script_runs import records, script

from vmm.errors import InputError
from vmm.trace.check import check_trace

HEADER = '{"schema": "vmm-trace/1", "guest": "example"}\n'


def written(tmp_path, text):
    path = tmp_path / "run.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def trace(tmp_path, run):
    return written(tmp_path, HEADER + "".join(json.dumps(record) + "\n" for record in records(run)))


def test_a_trace_is_judged_like_the_run_itself(tmp_path):
    path = trace(tmp_path, 'exit HLT rip=5; console "ok"; end port value=1')
    assert check_trace(path, script('exit HLT -> stop\nend port value=1\nconsole contains "ok"')).ok
    verdict = check_trace(path, script("exit HLT\nend port value=2"))
    assert verdict.divergence.line == 3


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    """Inputs, the state hash, and whatever comes later: none of them counts, and `next` looks past them."""
    run = [
        {"seq": 0, "kind": "input", "input": "stop"},
        {"seq": 1, "kind": "exit", "reason": "HLT", "number": 12, "rip": 5},
        {"seq": 1, "kind": "input", "input": "port", "port": 1, "size": 1, "value": 2},
        {"seq": 1, "kind": "novelty", "rip": 5},
        {"seq": 2, "kind": "exit", "reason": "MTF", "number": 37, "rip": 6},
        {"seq": 2, "kind": "state", "sha256": "00"},
        {"seq": 3, "kind": "end", "reason": "stopped", "rip": 7},
    ]
    path = written(tmp_path, HEADER + "".join(json.dumps(line) + "\n" for line in run))
    assert check_trace(path, script("exit HLT\nnext exit MTF\nnext end stopped")).ok
    divergence = check_trace(path, script("exit HLT\nnext exit HLT")).divergence
    assert divergence.record == 2


def test_a_trace_without_records_is_a_run_without_records(tmp_path):
    assert check_trace(written(tmp_path, HEADER), script("")).ok


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "expected a header"),
        ('{"schema": "vmm-trace/2"}\n', 1, "expected a header"),
        ('{"kind": "exit"}\n', 1, "expected a header"),
        (HEADER + "exit HLT\n", 2, "expected a JSON object, found 'exit HLT"),
        (HEADER + '{"kind": "exit"}\n[1]\n', 3, "expected a JSON object, found [1]"),
        (HEADER + '{"kind": "exit", "rip"', 2, "the file ends in the middle of a line"),
        (HEADER + '{"rip": 5}\n', 2, 'expected a record with a "kind"'),
        (HEADER + '{"kind": 5}\n', 2, 'expected a record with a "kind"'),
        (HEADER + '{"kind": ["exit"]}\n', 2, 'expected a record with a "kind"'),
        (HEADER + '{"kind": "exit", "rip": NaN}\n', 2, "expected a JSON object"),
        (HEADER + "[" * 100_000 + "\n", 2, "expected a JSON object"),
        (HEADER + '{"kind": "exit", "rip": ' + "9" * 10_000 + "}\n", 2, "expected a JSON object"),
        (HEADER.encode() + b'{"kind": "\xff"}\n', 2, "expected a JSON object"),
        (HEADER + " " * (17 << 20) + "\n", 2, "the line is too long"),
        (HEADER + "\n", 2, "expected a JSON object"),
    ],
    ids=range(15),
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path, text, line, says):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        check_trace(path, script("exit HLT"))
    assert caught.value.where == f"{path}:{line}"
    assert says in caught.value.what
    assert "\n" not in str(caught.value)


def test_a_trace_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        check_trace(tmp_path / "none.jsonl", script(""))
    with pytest.raises(InputError, match="cannot be read"):
        check_trace(tmp_path, script(""))
    with pytest.raises(InputError, match="cannot be read"):
        check_trace("a\0b", script(""))
