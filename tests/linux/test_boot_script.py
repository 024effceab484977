"""The script of the page holds for a boot, and names the right line where a boot is not as it should be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from boots import Boot

from vmm.records import Json
from vmm.trace.matcher import Matcher, Verdict
from vmm.trace.script import Script

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from pages import ROOT, blocks_of

pytestmark = pytest.mark.linux

(TEXT,) = [block.text for block in blocks_of(ROOT / "docs" / "linux.md") if block.opening == "script boot.script"]
USER_HALF = 1 << 47


def judge(records: list[Json], console: str) -> Verdict:
    matcher = Matcher(Script.parse(TEXT, file="boot.script", symbols={}))
    matcher.console(console)
    for record in records:
        matcher.feed(record)
        if matcher.failed:
            break
    return matcher.finish()


def stores(record: Json, **fields: object) -> bool:
    return record.get("cause") == "store" and all(record[name] == value for name, value in fields.items())


def through_an_alias(record: Json) -> bool:
    return record.get("cause") == "store" and record["gva"] < USER_HALF


def first_site(records: list[Json]) -> int:
    return next(r["gpa"] for r in records if stores(r, new="cc") and r["old"] != "cc" and through_an_alias(r))


def test_it_holds(booted: Boot):
    verdict = judge(booted.objects, booted.console)
    assert verdict.ok, verdict.divergence.render()


#: What is taken out of a boot, by a record and the first site that is patched, and what the line that misses it says.
MISSING: list[tuple[Callable[[Json, int], bool], str]] = [
    (lambda r, _: stores(r, new="1f440000") and not through_an_alias(r), "new=1f440000"),
    (lambda r, _: stores(r, old="f0", new="3e") and through_an_alias(r), "old=f0 new=3e"),
    (lambda r, _: stores(r, new="cc") and through_an_alias(r), "old!=cc new=cc"),
    (lambda r, site: stores(r) and r["gpa"] == site + 1, "gpa=$site+1"),
    (lambda r, site: stores(r, gpa=site, old="cc"), "old=cc because"),
    (lambda r, _: stores(r, new="cc" * 8), "new=cccccccccccccccc"),
    (lambda r, _: r["kind"] == "end", "end halt"),
]


@pytest.mark.parametrize(("is_gone", "line"), MISSING, ids=[line for _, line in MISSING])
def test_what_is_missing_is_missed(booted, is_gone, line):
    site = first_site(booted.objects)
    verdict = judge([record for record in booted.objects if not is_gone(record, site)], booted.console)
    assert not verdict.ok
    assert line in TEXT.splitlines()[verdict.divergence.line - 1], verdict.divergence.render()


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"kind": "modification", "cause": "host", "gpa": 0, "old": "00", "new": "01"}, "never modification host"),
        ({"kind": "exit", "reason": "TRIPLE_FAULT", "rip": 0}, "never exit TRIPLE_FAULT"),
        ({"kind": "refusal", "rule": "seal", "gpa": 0}, "never refusal"),
    ],
)
def test_what_must_not_be_is_seen(booted, record, line):
    middle = len(booted.objects) // 2
    verdict = judge([*booted.objects[:middle], record], booted.console)
    assert line in TEXT.splitlines()[verdict.divergence.line - 1]


def test_a_panic_is_seen(booted):
    verdict = judge(booted.objects, booted.console.replace("slept", "Kernel panic - not syncing"))
    assert "Kernel panic" in TEXT.splitlines()[verdict.divergence.line - 1]
