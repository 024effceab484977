"""``vmm ept``: entries, exit qualifications and walks in words."""

from __future__ import annotations

import json
from typing import Any, Final

from attrs import asdict

from vmm.commands.screen import Screen, standard_output
from vmm.ept import PROFILES, Capabilities, EptProfile
from vmm.ept.bits import GPA_LIMIT
from vmm.ept.explain import Explanation, WalkExplanation, explain_entry, explain_qualification, explain_walk
from vmm.errors import OptionError
from vmm.guest.files import one_line
from vmm.trace.painter import Style

SCHEMA: Final = "vmm-ept/1"
_WORD: Final = 1 << 64


def explain(qualification: str | None, entry: str | None, level: int | None, profile: str, *, as_json: bool) -> None:
    """Write an exit qualification or an entry in words; exactly one of the two is to be given."""
    if (qualification is None) == (entry is None):
        fix = "give --qualification 0x182, or --entry 0x30000407 --level 1"
        raise OptionError("one of --qualification and --entry is needed", where="vmm ept explain", fix=fix)
    if qualification is not None:
        explained = explain_qualification(number(qualification, "--qualification", _WORD), profile_of(profile))
    else:
        if level is None:
            raise OptionError("no --level", where="--entry", fix="say which: 4 PML4E, 3 PDPTE, 2 PDE, 1 PTE")
        explained = explain_entry(number(str(entry), "--entry", _WORD), level, profile_of(profile))
    screen = standard_output()
    if as_json:
        _write_json(screen, asdict(explained))
    else:
        _show(screen, explained)
    screen.flush()


def walk(target: str, gpa: str, access: str, profile: str | None, *, as_json: bool) -> None:
    """Write the walk for a GPA of a guest as it is at its start, by default with its own profile."""
    from vmm.machine import Machine, RunOptions  # noqa: PLC0415 - an explanation needs no machine

    where = number(gpa, "GPA", GPA_LIMIT)
    with Machine.from_manifest(target, RunOptions(ept=None if profile is None else profile_of(profile))) as machine:
        explained = explain_walk(machine.ept, where, access)
        eptp = machine.ept.eptp
    screen = standard_output()
    if as_json:
        fields = {"gpa": where, "eptp": eptp, "access": access}
        verdict = {"verdict": explained.verdict, "section": explained.section}
        _write_json(screen, {**fields, **verdict, "entries": [asdict(entry) for entry in explained.entries]})
    else:
        _show_walk(screen, explained, eptp)
    screen.flush()


def number(text: str, where: str, limit: int) -> int:
    """A number from 0 to ``limit`` - 1, decimal or with 0x; raises ``OptionError``."""
    try:
        value = int(text, 0)
    except ValueError:
        raise OptionError(f"{one_line(text)!r} is no number", where=where, fix="give one like 0x182") from None
    if not 0 <= value < limit:
        raise OptionError(f"{one_line(text)} is out of range", where=where, fix=f"give 0 to {limit - 1:#x}")
    return value


def profile_of(text: str) -> EptProfile:
    """A profile by its name, or by a value of IA32_VMX_EPT_VPID_CAP; raises ``OptionError``."""
    named = PROFILES.get(text)
    if named is not None:
        return named
    if not text[:1].isdigit():
        fix = f"choose {', '.join(PROFILES)}, or give a value of IA32_VMX_EPT_VPID_CAP"
        raise OptionError(f"there is no profile {one_line(text)!r}", where="--profile", fix=fix)
    return EptProfile(capabilities=Capabilities.decode(number(text, "--profile", _WORD)))


def _show(screen: Screen, explained: Explanation) -> None:
    screen.painter.line(f"{explained.what}: {explained.verdict} (SDM vol. 3, {explained.section})", Style.STRONG)
    width = max(len(_digits(field.value)) for field in explained.fields)
    words = max(len(field.meaning) for field in explained.fields)
    for field in explained.fields:
        what = f"{field.bits:>6}  {_digits(field.value):>{width}}  {field.meaning:<{words}}"
        screen.painter.line(f"{what}  {field.section}")


def _digits(value: int) -> str:
    return str(value) if value < 10 else f"{value:#x}"


def _show_walk(screen: Screen, explained: WalkExplanation, eptp: int) -> None:
    screen.painter.line(f"GPA {explained.gpa:#x}, EPTP {eptp:#x}", Style.STRONG)
    for entry in explained.entries:
        screen.painter.line(f"  {entry.what}: {entry.verdict}")
    good = explained.verdict.startswith("the ")
    verdict = f"{explained.verdict} (SDM vol. 3, {explained.section})"
    screen.painter.line(verdict, Style.GOOD if good else Style.TRAP)


def _write_json(screen: Screen, out: dict[str, Any]) -> None:
    screen.write(json.dumps({"schema": SCHEMA, **out}, indent=1) + "\n")
