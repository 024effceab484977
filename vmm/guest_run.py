"""A whole run as a value: what ``vmm.testing`` gives to tests."""

from __future__ import annotations

from textwrap import dedent
from typing import TYPE_CHECKING, Any

from attrs import frozen

from vmm.errors import OptionError
from vmm.guest.loader import load_guest
from vmm.machine import Machine, RunOptions
from vmm.outcome import Status, judge
from vmm.printed import hear_text
from vmm.script_actions import ScriptRun
from vmm.state_file import MemoryRange, state_of
from vmm.trace.names import symbols_of
from vmm.trace.script import Script

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from vmm.guest.loader import Guest
    from vmm.records import End, Record
    from vmm.trace.report import Divergence


@frozen(slots=True)
class GuestRun:
    """A run that is over. Objects are those of trace lines and of a state file (``docs/formats.md``).

    ``status`` is what ``vmm run`` would exit with for the guest alone: 0 if it ended as its manifest says.
    ``divergence`` says where the script did not hold, None if it did or there was none.
    """

    status: int
    end: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    state: dict[str, Any]
    console: str
    divergence: Divergence | None

    def of(self, kind: str, **fields: object) -> list[dict[str, Any]]:
        """The records of a kind with these values, in order: ``run.of("exit", reason="HLT")``."""
        return [
            record
            for record in self.records
            if record["kind"] == kind and all(record.get(name) == value for name, value in fields.items())
        ]


def run(
    target: str | Path,
    *,
    expect: str | Path | None = None,
    script: str | None = None,
    hashes: Iterable[str] = (),
    options: RunOptions | None = None,
) -> GuestRun:
    """Run ``target`` and hold it against a script.

    Raises ``InputError`` for what cannot be run, ``GuestError`` where the VMM gives up.
    """
    guest = load_guest(target)
    parsed = _script(guest, expect, script)
    ranges = [MemoryRange.parse(text, memory=guest.manifest.machine.memory) for text in hashes]
    machine = Machine(guest, options or RunOptions(audit=True, check=True))
    records: list[dict[str, Any]] = []
    printed: list[str] = []

    def keep(record: Record) -> None:
        records.append({"seq": len(records) + 1, **record.to_json()})

    machine.observe(keep)
    scripted = None if parsed is None else ScriptRun(machine, parsed)
    hear_text(machine, [printed.append] if scripted is None else [printed.append, scripted.matcher.console])
    with machine:
        end = machine.run()
    return GuestRun(
        status=int(_judge(machine, end, scripted=scripted is not None)),
        end=end.to_json(),
        records=tuple(records),
        state=state_of(machine, end, ranges),
        console="".join(printed),
        divergence=None if scripted is None else scripted.finish().divergence,
    )


def _judge(machine: Machine, end: End, *, scripted: bool) -> Status:
    """What a run without a script makes of stale code and stale translations; a script has the say."""
    stale, translations = (0, 0) if scripted else (machine.stale, machine.stale_translations)
    return judge(machine.guest.manifest, end, stale=stale, translations=translations).status


def _script(guest: Guest, expect: str | Path | None, text: str | None) -> Script | None:
    if expect is not None and text is not None:
        raise OptionError("both expect and script", where="run_guest", fix="give one of the two")
    if expect is not None:
        return Script.load(expect, symbols=symbols_of(guest))
    if text is not None:
        return Script.parse(dedent(text).lstrip("\n"), file="script", symbols=symbols_of(guest))
    return None
