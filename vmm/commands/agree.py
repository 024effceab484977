"""``vmm agree``: the traces of several nodes, and which of them went another way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmm.commands.screen import standard_output
from vmm.guest.files import one_line
from vmm.outcome import Status
from vmm.trace.nodes import Agreement, Group, Parting
from vmm.trace.painter import Painter, Style

if TYPE_CHECKING:
    from collections.abc import Sequence

_SAME_INPUTS: Final = "went another way with the same image and the same inputs up to there"


def agree(traces: Sequence[str], *, color: str) -> Status:
    """Say which traces agree, and of each group that does not where and why it parts."""
    found = Agreement.of(traces)
    screen = standard_output(color=color)
    painter = screen.painter
    if len(found.groups) == 1:
        painter.line(f"all {found.count} nodes agree: {_run(found.groups[0])}", Style.GOOD)
        screen.flush()
        return Status.OK
    _count(found, painter)
    for parting in found.partings():
        _part(found, parting, painter)
    screen.flush()
    return Status.WRONG


def _count(found: Agreement, painter: Painter) -> None:
    most = len(found.groups[0].nodes)
    if found.has_majority:
        others = found.count - most
        painter.line(f"{most} of {found.count} nodes agree, {others} do{'es' * (others == 1)} not", Style.STRONG)
    else:
        painter.line(f"{found.count} nodes do not agree, and no majority of them does", Style.STRONG)
    painter.line()
    for number, group in enumerate(found.groups):
        good = found.has_majority and not number
        painter.line(f"  {group.names}: {_run(group)}", Style.GOOD if good else Style.BAD)


def _run(group: Group) -> str:
    node = group.first
    state = "no state" if node.state is None else f"state {one_line(node.state[:16])}"
    return f"{node.records:,} records, {state}"


def _part(found: Agreement, parting: Parting, painter: Painter) -> None:
    others = "the others" if found.has_majority else one_line(found.groups[0].first.path)
    causes = parting.causes or (_SAME_INPUTS,)
    painter.line()
    for cause in causes:
        painter.line(f"{parting.group.names} {cause}", Style.BAD)
    if parting.difference is None:
        painter.line("  all records and inputs are the same", Style.QUIET)
        return
    painter.line(f"  the first difference is {parting.difference.place}", Style.QUIET)
    painter.line()
    parting.difference.show(painter, others, one_line(parting.group.first.path))
