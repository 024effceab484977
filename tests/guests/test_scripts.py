"""The scripts of the bundled guests hold, and they can fail: for a record that is missing, a byte that is wrong, code
that is stale. And scripts that act on a guest do what they say."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import tiny

from vmm.assembly import Assembly
from vmm.errors import AuditError
from vmm.guest.loader import bundled_guests
from vmm.machine import Machine, RunOptions
from vmm.script_actions import ScriptRun, has_actions
from vmm.trace.matcher import Matcher
from vmm.trace.names import symbols_of
from vmm.trace.script import Script
from vmm.trace.syntax import AnyOrder, Either, Repeat, Section, Watch
from vmm.translation import BlockCache

GUESTS = Path(__file__).parents[2] / "guests"
NAMES = [guest.name for guest in bundled_guests() if not guest.wrong_of]
ACTIONS = Path(__file__).parent / "action_scripts"
ACTION_SCRIPTS = sorted(ACTIONS.glob("*.script"))

PLAIN = RunOptions()
CHECKED = RunOptions(audit=True, check=True, block_events=True)
#: Where translations do not exist, or are evicted before a store could end them.
WITHOUT_BLOCKS = {"stepped": RunOptions(single_step=True), "four blocks": RunOptions(capacity=4)}

#: Guests in which nothing that has run is changed.
CHANGES_NOTHING_THAT_RAN = {"decrypt", "toolpath"}
#: Guests that never come back to the start of a translation that they have made stale: a five-byte call returns
#: into the six bytes of the call that it replaces.
NEVER_STALE = {"decrypt"}
#: Guests that change code only while its page is open to the free-running engine, which drops by itself what it
#: overwrites: nothing of theirs can go stale.
WRITTEN_FREELY = {"w-xor-x"}
#: Guests whose script is the monitor that they call: it acts on them.
MONITORED = {"w-xor-x"}

#: Guests whose code never changes: it is sealed, or they are about something else.
UNCHANGED = {"contract", "mbec", "pml-dirty", "spp-block", "virtualization-exception", "vmfunc-views"}
#: What none of them does.
INVENTED = {"kind": "modification", "gpa": 0x10000, "old": "00", "new": "01", "cause": "store"}

#: How many records of a run each test spoils, evenly spread.
SAMPLES = 12

each_guest = pytest.mark.parametrize("name", NAMES)


def script_of(name, *, blocks=True):
    """The guest's script; without ``blocks`` it demands no more that a translation ends."""
    path = GUESTS / name / "expect.script"
    text = path.read_text(encoding="utf-8")
    if not blocks:
        lines = text.splitlines()
        text = "\n".join(line if line.startswith("never") else line.replace(" blocks!=[]", "") for line in lines)
    return Script.parse(text, file=str(path), symbols=symbols_of(Machine.from_manifest(GUESTS / name).guest))


def connect(machine, matcher):
    """Have a machine's run held against a script; a run that has diverged is ended."""

    def watch(record):
        matcher.feed(record.to_json())
        if matcher.failed:
            machine.stop()

    machine.observe(watch, acts=True)
    machine.on_output(lambda data: matcher.console(data.decode(errors="replace")))


def verdict_of_run(name, options, *, blocks=True):
    machine = Machine.from_manifest(GUESTS / name, options)
    script = script_of(name, blocks=blocks)
    if name in MONITORED:
        run = ScriptRun(machine, script)
        machine.on_output(lambda data: run.matcher.console(data.decode(errors="replace")))
        machine.run()
        return run.finish()
    matcher = Matcher(script)
    connect(machine, matcher)
    machine.run()
    return matcher.finish()


def complaint(verdict):
    return "" if verdict.divergence is None else verdict.divergence.render()


class NotingMatcher(Matcher):
    """A matcher that knows afterwards which line took which record: ``taken[record number]``."""

    def __init__(self, script, actions=None):
        self.taken = {}
        super().__init__(script, actions)

    def took(self, line, record):
        self.taken[self.number] = line
        super().took(line, record)


@cache
def kept(name):
    """A right run: its records, its text, and which line of the script took which record (counted from 1)."""
    machine = Machine.from_manifest(GUESTS / name)
    records, text = [], []
    machine.observe(lambda record: records.append(record.to_json()))
    run = ScriptRun(machine, script_of(name), matcher=NotingMatcher)
    machine.on_output(lambda data: text.append(data.decode()))
    machine.run()
    return records, "".join(text), run.matcher.taken


def verdict_of(name, records, text):
    matcher = Matcher(script_of(name))
    matcher.console(text)
    for record in records:
        matcher.feed(record)
    return matcher.finish()


def statements(nodes):
    """All statements of a script, and the watches of its sections."""
    for node in nodes:
        yield node
        match node:
            case Section():
                yield from node.watches
                yield from statements(node.body)
            case Repeat():
                yield from statements(node.body)
            case AnyOrder():
                yield from statements(node.members)
            case Either():
                for branch in node.branches:
                    yield from statements(branch)


def counts(name):
    """The watches that want records to come."""
    every = statements([script_of(name).program.root])
    return [watch for watch in every if isinstance(watch, Watch) and watch.least]


def spread(items):
    """Some of the items, from the first to the last."""
    count = min(len(items), SAMPLES)
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def modifications(records):
    """The numbers of the modifications, counted from 1."""
    return [number for number, record in enumerate(records, 1) if record["kind"] == "modification"]


def fields(line):
    """The fields for which a record line demands one value."""
    return {condition.field for condition in line.pattern.conditions if condition.operator == "="}


@each_guest
class TestHolds:
    def test_free_running(self, name):
        verdict = verdict_of_run(name, PLAIN)
        assert verdict.ok, complaint(verdict)

    def test_with_auditor_checks_and_block_events(self, name):
        verdict = verdict_of_run(name, CHECKED)
        assert verdict.ok, complaint(verdict)

    @pytest.mark.parametrize("way", WITHOUT_BLOCKS)
    def test_but_for_the_blocks_where_there_are_none(self, name, way):
        verdict = verdict_of_run(name, WITHOUT_BLOCKS[way], blocks=False)
        assert verdict.ok, complaint(verdict)

    def test_what_it_prints_and_ends_with_is_told(self, name):
        """The script alone says how the guest ends; the manifest says the same."""
        script, manifest = script_of(name), Machine.from_manifest(GUESTS / name).guest.manifest
        assert [check.operator for check in script.program.console] == ["is"]
        last = script.program.root.body[-1]
        wanted = {c.field: c.value.evaluate({}, {}) for c in last.pattern.conditions}
        assert (last.pattern.kind, wanted) == ("end", {"port": manifest.end.port, "value": manifest.end.value})

    def test_it_only_watches_unless_the_guest_calls_it(self, name):
        assert has_actions(script_of(name)) == (name in MONITORED)


@each_guest
class TestFails:
    def test_for_another_end_value(self, name):
        records, text, taken = kept(name)
        end = {**records[-1], "value": records[-1]["value"] ^ 1}
        verdict = verdict_of(name, [*records[:-1], end], text)
        assert verdict.divergence.line == taken[len(records)].line

    def test_for_other_text(self, name):
        records, text, _ = kept(name)
        verdict = verdict_of(name, records, text.replace(" ", "  ", 1))
        assert verdict.divergence.line == script_of(name).program.console[0].line

    def test_for_a_modification_that_is_missing(self, name):
        """The line that would have taken it is named, or a count that it belongs to."""
        records, text, taken = kept(name)
        for number in spread(modifications(records)):
            record = records[number - 1]
            right = {watch.line for watch in counts(name) if watch.pattern.matches(record, {})}
            if number in taken:
                right.add(taken[number].line)
            verdict = verdict_of(name, records[: number - 1] + records[number:], text)
            assert not verdict.ok, f"{name}: nobody misses {json.dumps(record)}"
            assert verdict.divergence.line in right, complaint(verdict)

    def test_for_a_wrong_byte_that_was_written(self, name):
        """The line that says the bytes is named; where a line only captures them, the one that needs the capture."""
        records, text, taken = kept(name)
        told = [n for n in modifications(records) if n in taken and self.says_bytes(taken[n], taken.values())]
        assert bool(told) == (name not in UNCHANGED)
        for number in spread(told):
            line = taken[number]
            lines = [line] if "new" in fields(line) else self.users(line, taken.values())
            right = {each.line for each in lines}
            new = bytearray.fromhex(records[number - 1]["new"])
            new[0] ^= 0x40
            spoiled = {**records[number - 1], "new": new.hex()}
            verdict = verdict_of(name, [*records[: number - 1], spoiled, *records[number:]], text)
            assert not verdict.ok, f"{name}: nobody minds {json.dumps(spoiled)}"
            assert verdict.divergence.line in right, complaint(verdict)

    def test_for_a_modification_too_many(self, name):
        records, text, _ = kept(name)
        last = modifications(records)[-1] if name not in UNCHANGED else 1
        extra = records[last - 1] if name not in UNCHANGED else INVENTED
        verdict = verdict_of(name, [*records[:last], extra, *records[last:]], text)
        assert not verdict.ok

    def says_bytes(self, line, lines):
        return "new" in fields(line) or bool(self.users(line, lines))

    @staticmethod
    def users(line, lines):
        """The lines that need what this line captures of ``new``."""
        names = {f"${name}" for field, name in line.captures if field == "new"}
        return [
            other
            for other in lines
            if names & {condition.wanted for condition in other.pattern.conditions}
        ]


class TestStale:
    """Worlds in which a translation outlives the bytes that it was made from."""

    @each_guest
    def test_code_that_the_engine_keeps_running(self, name, monkeypatch):
        """The records are right, blocks die on paper; what runs is the version before."""
        monkeypatch.setattr(Assembly, "_forget", lambda *_: None)
        assert self.holds(name) == (name in NEVER_STALE | WRITTEN_FREELY | UNCHANGED)

    @staticmethod
    def holds(name):
        """Several vCPUs are paced by their blocks: a block that the cache does not hold ends the run at once."""
        try:
            return verdict_of_run(name, RunOptions(seconds=20)).ok
        except AuditError:
            return False

    @each_guest
    def test_a_cache_that_drops_nothing(self, name, monkeypatch):
        monkeypatch.setattr(BlockCache, "invalidate", lambda *_: [])
        holds = verdict_of_run(name, RunOptions(seconds=20)).ok
        assert holds == (name in CHANGES_NOTHING_THAT_RAN | WRITTEN_FREELY | UNCHANGED)


#: Ends the run with 0xbb: the #BP handler of the guest that asks.
HANDLER = tiny.CODE + 0x800


def asking(name):
    """The guest of ask.asm; with a gate for #BP where the script is about one."""
    parts = {tiny.CODE: (ACTIONS / "ask.asm").read_text(encoding="ascii")}
    if name != "ask.breakpoint":
        return tiny.build(parts).machine
    gate = (HANDLER & 0xFFFF).to_bytes(2, "little") + b"\x08\0\0\x8e" + (HANDLER >> 16).to_bytes(2, "little")
    parts |= {HANDLER: "mov al, 0xbb; out 0xf4, al", tiny.DATA: bytes(3 * 16) + gate + bytes(8)}
    return tiny.build(parts, idt=tiny.DATA, code=(tiny.CODE, HANDLER)).machine


def run_with_actions(path, *, acting=True):
    guest = path.name.split(".")[0]
    machine = asking(path.stem) if guest == "ask" else Machine.from_manifest(GUESTS / guest, CHECKED)
    script = Script.load(path, symbols=symbols_of(machine.guest))
    assert has_actions(script)
    if acting:
        run = ScriptRun(machine, script)
        machine.on_output(lambda data: run.matcher.console(data.decode()))
        machine.run()
        return run.finish()
    matcher = Matcher(script)
    connect(machine, matcher)
    machine.run()
    return matcher.finish()


@pytest.mark.parametrize("path", ACTION_SCRIPTS, ids=lambda path: path.stem)
class TestActions:
    def test_the_guest_does_what_the_script_brings_about(self, path):
        verdict = run_with_actions(path)
        assert verdict.ok, complaint(verdict)

    def test_without_the_actions_it_does_not(self, path):
        assert not run_with_actions(path, acting=False).ok


def test_every_action_has_an_example():
    text = "".join(path.read_text(encoding="ascii") for path in ACTION_SCRIPTS)
    assert set(re.findall(r"-> ([a-z]+)", text)) == {"answer", "approve", "inject", "protect", "stop", "write"}
