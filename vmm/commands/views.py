"""``vmm run --views``: where the views of the EPT differ at the end of a run, and what each allows there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmm.memory import PAGE
from vmm.trace.names import Names
from vmm.trace.painter import Painter, Style

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.ept.views import View
    from vmm.machine import Machine

_PLACE: Final = 24
_COLUMN: Final = 16


def show_views(machine: Machine, painter: Painter) -> None:
    """A line for each run of pages that are alike, and a column for each view: its permissions, and where it leads."""
    views = machine.views.all.all
    rows = list(_runs(views))
    if not rows:
        painter.line(f"views     {len(views)}{', which do not differ' if len(views) > 1 else ''}")
        return
    names = Names(machine.guest)
    heads = [f"view {view.number}" for view in views]
    painter.line(f"{'views differ in':<{_PLACE}}{_columns(heads)}", Style.STRONG)
    for first, last, cells in rows:
        place = f"{first:#x}" if first == last else f"{first:#x}-{last + PAGE - 1:#x}"
        symbol = names.memory(first, None)
        name = "" if symbol == f"{first:#x}" else f"  {symbol}"
        painter.line(f"{place:<{_PLACE}}{_columns(cells)}{name}")


def _columns(cells: list[str]) -> str:
    return "".join(f"{cell:<{_COLUMN}}" for cell in cells).rstrip()


def _runs(views: list[View]) -> Iterator[tuple[int, int, list[str]]]:
    """(first page, last page, what each view says) where views differ, by ascending GPA."""
    pages = sorted({page for view in views for page in (*view.limits, *view.hosts)})
    run: tuple[int, int, list[str]] | None = None
    for page in pages:
        cells = [_cell(view, page) for view in views]
        if len(set(cells)) == 1:
            continue
        if run is not None and run[1] + PAGE == page and run[2] == cells and "->" not in "".join(cells):
            run = run[0], page, cells
            continue
        if run is not None:
            yield run
        run = page, page, cells
    if run is not None:
        yield run


def _cell(view: View, page: int) -> str:
    entry = view.ept.entry(page)
    allows = str(entry.permissions)
    if view.ept.profile.mode_based_execute:
        allows += "u" if entry.user_execute else "-"
    return f"{allows} -> {view.hosts[page]:#x}" if page in view.hosts else allows
