"""What is said at the end of a run: what the guest printed, how it ended, what was counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmm.guest.files import one_line
from vmm.outcome import Outcome, Status
from vmm.trace.painter import Painter, Style

if TYPE_CHECKING:
    from vmm.coherence import Sanitizer
    from vmm.machine import Machine

_TEXT_LINES: Final = 40
_TEXT_WIDTH: Final = 200
_LABEL: Final = 10


def introduce(machine: Machine, painter: Painter) -> None:
    """Say which guest runs."""
    manifest = machine.guest.manifest
    painter.line(one_line(manifest.name), Style.STRONG)
    if manifest.summary:
        painter.line(one_line(manifest.summary), Style.QUIET)
    painter.line()


def summarize(machine: Machine, outcome: Outcome, painter: Painter, *, printed: bool = True) -> None:
    """Say how the run went, and with ``printed`` also what the guest printed."""
    if printed:
        _printed(bytes(machine.console.output), painter)
    good = outcome.status is Status.OK
    wanted = _as_wanted(machine, outcome) if printed else ""
    _row("end", f"{outcome.what}{wanted}", painter, Style.GOOD if good else Style.BAD)
    if len(machine.vcpus) > 1:
        _row("vCPUs", _vcpus(machine), painter)
    _row("exits", _exits(machine), painter)
    _row("patches", _patches(machine), painter)
    _row("blocks", _blocks(machine), painter)
    if machine.sanitizer is not None:
        _row("stale", _stale(machine.sanitizer), painter, Style.BAD if machine.stale else Style.GOOD)
    if machine.tlb is not None:
        used = machine.tlb.found
        words = f"{used:,} use{'' if used == 1 else 's'} of stale translations"
        _row("TLB", words, painter, Style.BAD if used else Style.GOOD)


def _stale(sanitizer: Sanitizer) -> str:
    found, permitted = sanitizer.found, sanitizer.of_others
    words = f"{found:,} execution{'' if found == 1 else 's'} of stale code ({sanitizer.model.value})"
    if not permitted:
        return words
    which = "all" if permitted == found else f"{permitted:,}"
    return f"{words}; {which} of what another vCPU wrote, as the model permits"


def add_row(label: str, text: str, painter: Painter, *, good: bool = True) -> None:
    """One more line of the summary."""
    _row(label, text, painter, Style.PLAIN if good else Style.BAD)


def _row(label: str, text: str, painter: Painter, style: Style = Style.PLAIN) -> None:
    painter.line(f"{label:<{_LABEL}}{text}", style)


def _as_wanted(machine: Machine, outcome: Outcome) -> str:
    manifest = machine.guest.manifest
    told = manifest.is_file and (manifest.end.value is not None or manifest.end.halt)
    return ", as the manifest wants" if outcome.status is Status.OK and told else ""


def _printed(output: bytes, painter: Painter) -> None:
    painter.line()
    lines = output.decode("utf-8", "replace").split("\n")
    if not lines[-1]:
        lines.pop()
    if len(lines) > _TEXT_LINES:
        painter.line(f"... {len(lines) - _TEXT_LINES:,} lines before", Style.QUIET)
    for text in lines[-_TEXT_LINES:]:
        painter.line(f"| {one_line(text[:_TEXT_WIDTH])}")
    if lines:
        painter.line()


def _vcpus(machine: Machine) -> str:
    retired = " + ".join(f"{vcpu.pace.retired:,}" for vcpu in machine.vcpus)
    return f"{len(machine.vcpus)}, interleaved by seed {machine.seed}: {retired} instructions"


def _exits(machine: Machine) -> str:
    counts = machine.reporter.counts
    parts = ", ".join(f"{counts[reason]:,} {reason.name}" for reason in sorted(counts, key=lambda r: -counts[r]))
    return f"{machine.reporter.total:,}" + (f": {parts}" if parts else "")


def _patches(machine: Machine) -> str:
    count = machine.door.modifications
    return f"{count:,} modification{'' if count == 1 else 's'} of code"


def _blocks(machine: Machine) -> str:
    counters = machine.blocks.counters
    return (
        f"{counters.created:,} translated = {len(machine.blocks):,} live + {counters.invalidated:,} invalidated "
        f"+ {counters.evicted:,} evicted"
    )
