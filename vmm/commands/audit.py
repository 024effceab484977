"""``vmm audit``: whether images hold code that could change itself, before they run."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from vmm.audit import Detail, Finding, Image, Severity, findings, read_image
from vmm.commands.screen import Screen, standard_output
from vmm.errors import ImageError
from vmm.guest.files import one_line, read_file
from vmm.guest.loader import bundled_image
from vmm.outcome import Status
from vmm.trace.painter import Painter, Style

SCHEMA: Final = "vmm-audit/1"
_FILE_LIMIT: Final = 1 << 30
_WIDTH: Final = 112
_INDENT: Final = " " * 9
_MISSING: Final = "give an ELF executable or shared object, or the name of a bundled guest"


@frozen(slots=True)
class Audited:
    """An image and what was found in it.

    ``target`` is what the user called it, ``digest`` the SHA-256 of the file, hexadecimal.
    """

    target: str
    path: Path
    digest: str
    image: Image
    findings: tuple[Finding, ...]

    def count(self, severity: Severity) -> int:
        """How many findings of this severity there are."""
        return sum(finding.severity is severity for finding in self.findings)


def audit(targets: tuple[str, ...], *, as_json: bool, color: str) -> Status:
    """Audit files, or bundled guests by name; the exit status. Raises ImageError before anything is written."""
    audited = [audit_file(target) for target in targets]
    screen = standard_output(color=color)
    if as_json:
        screen.write(json.dumps(document(audited), indent=1) + "\n")
    else:
        _show(audited, screen)
    screen.flush()
    return Status.WRONG if any(one.count(Severity.ERROR) for one in audited) else Status.OK


def audit_file(target: str) -> Audited:
    """One file, audited; a file goes before a bundled guest of the same name. Raises ImageError."""
    path = _path(target)
    data = read_file(path, _FILE_LIMIT, error=ImageError, fix=_MISSING)
    image = read_image(data, one_line(path))
    return Audited(target, path, hashlib.sha256(data).hexdigest(), image, findings(image))


def document(audited: list[Audited]) -> dict[str, Any]:
    """The document of `--json`, as docs/formats.md describes it."""
    return {"schema": SCHEMA, "images": [_image_object(one) for one in audited]}


def _path(target: str) -> Path:
    path = Path(target)
    try:
        there = path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL: reading it says so
        there = True
    return path if there else bundled_image(target) or path


def _image_object(one: Audited) -> dict[str, Any]:
    image = one.image
    return {
        "path": one_line(one.path),
        "sha256": one.digest,
        "type": image.type,
        "machine": image.machine,
        "bits": image.bits,
        "byte_order": image.order,
        "errors": one.count(Severity.ERROR),
        "notes": one.count(Severity.NOTE),
        "findings": [_finding_object(finding) for finding in one.findings],
    }


def _finding_object(finding: Finding) -> dict[str, Any]:
    place = {"start": finding.start, "end": finding.end}
    return {
        "rule": finding.rule,
        "severity": finding.severity,
        "what": finding.what,
        "why": finding.why,
        "program_headers": list(finding.headers),
        **{key: value for key, value in place.items() if value is not None},
        "count": finding.count,
        "details": [_detail_object(detail) for detail in finding.details],
    }


def _detail_object(detail: Detail) -> dict[str, Any]:
    return {"address": detail.address, "text": detail.text}


def _show(audited: list[Audited], screen: Screen) -> None:
    painter = screen.painter
    for one in audited:
        errors, notes = one.count(Severity.ERROR), one.count(Severity.NOTE)
        style = Style.BAD if errors else Style.GOOD
        painter.line(f"{one_line(one.target)}: {_verdict(errors, notes)}", style)
        for finding in one.findings:
            _show_finding(finding, painter)


def _show_finding(finding: Finding, painter: Painter) -> None:
    style = Style.BAD if finding.severity is Severity.ERROR else Style.STRONG
    painter.line(f"  {finding.severity:<5}  {finding.rule}", style)
    painter.line(f"{_INDENT}{finding.what}{_range(finding)}")
    for detail in finding.details:
        painter.line(f"{_INDENT}  {detail.address:#x}  {detail.text}")
    if finding.details and finding.count > len(finding.details):
        painter.line(f"{_INDENT}  ... {finding.count - len(finding.details):,} more")
    for line in textwrap.wrap(finding.why, _WIDTH - len(_INDENT), break_long_words=False, break_on_hyphens=False):
        painter.line(f"{_INDENT}{line}", Style.QUIET)


def _range(finding: Finding) -> str:
    if finding.start is None:
        return ""
    return f": {finding.start:#x}" + ("" if finding.end is None else f" to {finding.end:#x}")


def _verdict(errors: int, notes: int) -> str:
    verdict = _counted(errors, "error") if errors else "clean"
    return f"{verdict}, {_counted(notes, 'note')}" if notes else verdict


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
