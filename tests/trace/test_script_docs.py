"""Every example of `docs/scripts.md` is run."""

import re
from pathlib import Path

import pytest
from script_runs import SYMBOLS, RecordedActions, records

from vmm.trace.matcher import Matcher
from vmm.trace.script import Script

PAGE = (Path(__file__).parents[2] / "docs" / "scripts.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```([^\n]*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def examples():
    """(script, runs that hold, runs that fail, report of the last failure, actions of the first run)."""
    found = []
    for name, text in BLOCKS:
        if name == "script":
            found.append({"script": text, "run holds": [], "run fails": [], "report": [], "actions": []})
        elif name != "python":
            found[-1][name].append(text)
    return found


def run(example, text, actions=None):
    matcher = Matcher(Script.parse(example["script"], file="expect.script", symbols=SYMBOLS), actions)
    for record in records(text):
        matcher.feed(record)
    return matcher.finish()


EXAMPLES = examples()


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_holds_and_fails_as_the_page_says(example):
    assert example["run holds"]
    for text in example["run holds"]:
        verdict = run(example, text)
        assert verdict.ok, verdict.divergence.render()
    for text in example["run fails"]:
        assert not run(example, text).ok
    for report in example["report"]:
        assert run(example, example["run fails"][-1]).divergence.render() == report.rstrip("\n")


def test_the_actions_on_the_page_are_done():
    (example,) = (one for one in EXAMPLES if one["actions"])
    actions = RecordedActions()
    assert run(example, example["run holds"][0], actions).ok
    words = {int: lambda value: hex(value) if value > 0x20 else str(value), bytes: bytes.hex, str: str}
    done = [" ".join(words[type(part)](part) for part in action) for action in actions.done]
    assert done == example["actions"][0].splitlines()


def test_the_page_has_its_examples():
    assert len(EXAMPLES) >= 14
    assert sum(len(example["run fails"]) for example in EXAMPLES) >= 12


def test_the_python_example_names_what_exists(tmp_path):
    (code,) = (text for name, text in BLOCKS if name == "python")
    imports = "\n".join(line for line in code.splitlines() if line.startswith("from "))
    exec(compile(imports, "scripts.md", "exec"), {})
