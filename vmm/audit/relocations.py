"""Rules about relocations: the loader writes to data only.

PT_GNU_RELRO takes the write permission away after relocation, so what it covers is writable here. A type of 0 is
R_*_NONE on every machine: nothing is written.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

from attrs import define, field

from vmm.audit.finding import Detail, Finding, Rule, Severity
from vmm.audit.model import Image, Relocation, Segment
from vmm.audit.names import relocation_type

_SHOWN: Final = 8
_NONE: Final = 0
_DECLARED: Final = (
    "the loader makes the segments without write permission writable while it relocates them, code included; "
    "compile everything with -fPIC (or -fPIE) and link with -z text, which names what is not"
)
_FAULTS: Final = "; the file does not declare text relocations (DT_TEXTREL), so that glibc's loader faults there"
_PATCHED: Final = (
    "the loader changes this memory at start-up, for which it has to make it writable; compile what holds these "
    "places with -fPIC (or -fPIE)"
)
_OUTSIDE: Final = (
    "the loader writes to memory that this file does not describe, which may be anybody's code; the table is damaged "
    "or made to mislead: build the file again"
)


@define(slots=True)
class _Group:
    """Relocations with the same fate: how many, and the first few with the names of their tables."""

    count: int = 0
    first: list[tuple[str, Relocation]] = field(factory=list)

    def add(self, table: str, relocation: Relocation) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append((table, relocation))


def declared(image: Image) -> Iterator[Finding]:
    """DT_TEXTREL, or DF_TEXTREL in DT_FLAGS."""
    dynamic = image.dynamic
    if dynamic is not None and dynamic.text_relocations:
        what = f"the dynamic table asks for text relocations ({', '.join(dynamic.text_relocations)})"
        rule = Rule.TEXT_RELOCATIONS_DECLARED
        yield Finding(rule, Severity.ERROR, what, _DECLARED, headers=(dynamic.number,), start=dynamic.start)


def into_text(image: Image) -> Iterator[Finding]:
    """Relocations of memory without write permission, a finding a segment, and those of no memory at all."""
    memory = _Memory(image.segments)
    outside, inside = _Group(), {segment.number: _Group() for segment in image.segments}
    for table in image.relocations:
        for relocation in table.entries:
            if relocation.type != _NONE:
                segment = memory.at(relocation.address)
                if segment is None:
                    outside.add(table.name, relocation)
                elif not segment.writable:
                    inside[segment.number].add(table.name, relocation)
    yield from (_text_finding(image, s, inside[s.number]) for s in image.segments if inside[s.number].count)
    if outside.count:
        yield _outside_finding(image, outside)


class _Memory:
    """What lies where, for millions of questions. Where segments overlap, a writable one goes before the others."""

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        by_preference = sorted(segments, key=lambda segment: not segment.writable)
        self._starts = sorted({0, *(address for s in segments for address in (s.start, s.end))})
        self._owners = [next((s for s in by_preference if s.holds(start)), None) for start in self._starts]

    def at(self, address: int) -> Segment | None:
        return self._owners[bisect_right(self._starts, address) - 1]


def _text_finding(image: Image, segment: Segment, group: _Group) -> Finding:
    silent = image.dynamic is not None and not image.dynamic.text_relocations
    kind = "code" if segment.executable else "read-only data"
    return Finding(
        Rule.TEXT_RELOCATIONS,
        Severity.ERROR,
        f"{_counted(group.count)} into segment {segment.number}, {kind} without write permission ({segment.access})",
        _PATCHED + (_FAULTS if silent else ""),
        headers=(segment.number,),
        start=segment.start,
        end=segment.end,
        count=group.count,
        details=_details(image, group),
    )


def _outside_finding(image: Image, group: _Group) -> Finding:
    return Finding(
        Rule.RELOCATIONS_OUTSIDE,
        Severity.ERROR,
        f"{_counted(group.count)} into memory that belongs to no segment",
        _OUTSIDE,
        count=group.count,
        details=_details(image, group),
    )


def _counted(count: int) -> str:
    return f"{count:,} relocation{'' if count == 1 else 's'}"


def _details(image: Image, group: _Group) -> tuple[Detail, ...]:
    return tuple(Detail(entry.address, _described(image, table, entry)) for table, entry in group.first)


def _described(image: Image, table: str, relocation: Relocation) -> str:
    kind = "" if relocation.type is None else f" {relocation_type(image.machine, relocation.type)}"
    section = image.section_at(relocation.address)
    symbol = image.symbol(relocation.symbol) if relocation.symbol else None
    return f"{table}{kind}" + (f" in {section}" if section else "") + (f" against {symbol}" if symbol else "")
