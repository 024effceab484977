"""How many patches there were: by mechanism, by function, by mapping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import define, field

from vmm.patches.mechanism import Attribution, Mechanism
from vmm.trace.painter import Painter, Style

if TYPE_CHECKING:
    from collections.abc import Mapping as Mappings

    from vmm.patches.joined import Patch
    from vmm.patches.mapping import Mapping

#: Functions that are shown by name.
_FUNCTIONS: Final = 20
_NAME: Final = 36
_UNKNOWN: Final = "not known"


@define(slots=True)
class Count:
    """How many patches, of how many modifications, which stored how many bytes."""

    patches: int = 0
    modifications: int = 0
    size: int = 0

    def add(self, patches: int, modifications: int, size: int) -> None:
        """Count more of them."""
        self.patches += patches
        self.modifications += modifications
        self.size += size


@define(slots=True)
class Summary:
    """Counts of patches. All three tables add up to ``total``."""

    total: Count = field(factory=Count)
    mechanisms: dict[Mechanism, Count] = field(factory=dict)
    functions: dict[str | None, Count] = field(factory=dict)
    mappings: dict[Mapping, Count] = field(factory=dict)
    #: Those that text_poke_bp made behind a breakpoint, and those that stored what was there.
    behind_int3: Count = field(factory=Count)
    same: Count = field(factory=Count)

    def add(self, patch: Patch, attribution: Attribution) -> None:
        """Count a patch."""
        counts = [
            self.total,
            self.mechanisms.setdefault(attribution.mechanism, Count()),
            self.functions.setdefault(attribution.function, Count()),
            self.mappings.setdefault(patch.mapping, Count()),
        ]
        counts += [self.behind_int3] * patch.behind_int3 + [self.same] * (patch.old == patch.new)
        for count in counts:
            count.add(1, patch.stores, patch.size)

    def show(self, painter: Painter, *, functions: bool) -> None:
        """Write the tables; that of functions only where there are symbols."""
        _table("by mechanism", {each.value: count for each, count in self.mechanisms.items()}, painter)
        if functions:
            painter.line()
            _table("by function", _most({name or _UNKNOWN: count for name, count in self.functions.items()}), painter)
        painter.line()
        _table("by mapping", {each.value: count for each, count in self.mappings.items()}, painter)


def _most(functions: dict[str, Count]) -> dict[str, Count]:
    """The most frequent, and one row for the rest."""
    ordered = sorted(functions.items(), key=_order)
    shown = dict(ordered[:_FUNCTIONS])
    rest = Count()
    for _, count in ordered[_FUNCTIONS:]:
        rest.add(count.patches, count.modifications, count.size)
    more = len(ordered) - len(shown)
    return {**shown, f"... {more} more": rest} if more else shown


def _order(row: tuple[str, Count]) -> tuple[int, str]:
    return -row[1].modifications, row[0]


def _table(title: str, rows: Mappings[str, Count], painter: Painter) -> None:
    painter.line(f"{title:<{_NAME}}{'patches':>10}{'modifications':>15}{'bytes':>12}", Style.STRONG)
    ordered = sorted(rows.items(), key=lambda row: (row[0].startswith("..."), *_order(row)))
    for name, count in ordered:
        shown = name if len(name) < _NAME else name[: _NAME - 2] + "…"
        painter.line(f"{shown:<{_NAME}}{count.patches:>10,}{count.modifications:>15,}{count.size:>12,}")
