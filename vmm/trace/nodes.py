"""Several traces of what should be the same run: which of them agree, and where each other one parts from them."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final

from attrs import frozen

from vmm.guest.files import one_line
from vmm.trace.comparison import Comparison, Difference, line_words
from vmm.trace.reading import TraceReader
from vmm.trace.whole import WholeTrace, comparable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from vmm.records import Json

#: Header keys whose difference is a cause, in the words of a report.
_CAUSES: Final = {
    "image": "ran another image: SHA-256 {one}, {others} {other}",
    "manifest": "ran by another manifest: SHA-256 {one}, {others} {other}",
    "modules": "was given other files: SHA-256 {one}, {others} {other}",
}
_ANY_CAUSE: Final = "ran with another {key}: {one}, {others} {other}"


@frozen(slots=True)
class Group:
    """Nodes whose traces are of one and the same run."""

    nodes: tuple[WholeTrace, ...]

    @property
    def first(self) -> WholeTrace:
        """The one that stands for all."""
        return self.nodes[0]

    @property
    def names(self) -> str:
        """The files of its traces."""
        return " ".join(one_line(node.path) for node in self.nodes)


@frozen(slots=True)
class Parting:
    """Why and where a group parts from the one that it is compared with: causes in words, then the first event.

    ``difference`` is None where only the headers differ.
    """

    group: Group
    causes: tuple[str, ...]
    difference: Difference | None


@frozen(slots=True)
class Agreement:
    """All nodes in groups, the largest first. ``has_majority``: the first is more than half of them."""

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, paths: Iterable[Path | str]) -> Agreement:
        """Read the traces, one after the other; raises ``InputError`` for what is no whole trace."""
        found: dict[bytes, list[WholeTrace]] = {}
        for path in paths:
            node = WholeTrace.read(path)
            found.setdefault(node.digest, []).append(node)
        groups = [Group(tuple(nodes)) for nodes in found.values()]
        return cls(tuple(sorted(groups, key=lambda group: -len(group.nodes))))

    @property
    def count(self) -> int:
        """How many nodes there are."""
        return sum(len(group.nodes) for group in self.groups)

    @property
    def has_majority(self) -> bool:
        """Whether more than half of the nodes agree."""
        return 2 * len(self.groups[0].nodes) > self.count

    def partings(self) -> Iterator[Parting]:
        """Each other group against the first, in turn."""
        reference = self.groups[0]
        others = "the others" if self.has_majority else one_line(reference.first.path)
        for group in self.groups[1:]:
            headers = _header_causes(group.first.header, reference.first.header, others)
            difference = _first_difference(reference.first, group.first)
            event = None if difference is None else _event_cause(difference, others)
            causes = tuple(headers) if event is None else (*headers, event)
            yield Parting(group, causes, difference)


def _first_difference(one: WholeTrace, other: WholeTrace) -> Difference | None:
    comparison = Comparison()
    with TraceReader(one.path) as left, TraceReader(other.path) as right:
        for pair in zip_longest(left.lines(), right.lines()):
            comparison.take(*pair)
            if comparison.complete:
                break
    return comparison.difference()


def _header_causes(one: Json, other: Json, others: str) -> Iterator[str]:
    mine, theirs = dict(_flat(comparable(one))), dict(_flat(comparable(other)))
    for key in dict.fromkeys([*mine, *theirs]):
        if mine.get(key) != theirs.get(key):
            words = _CAUSES.get(key, _ANY_CAUSE)
            yield words.format(key=key, one=_shown(mine.get(key)), other=_shown(theirs.get(key)), others=others)


def _flat(header: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for key, value in header.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def _shown(value: object) -> str:
    words = ", ".join(map(str, value)) if isinstance(value, list) else value
    return "none" if words is None else one_line(str(words)[:80])


def _event_cause(difference: Difference, others: str) -> str | None:
    """The input that makes the difference, if one does; ``one`` of it is theirs, ``other`` the node's."""
    theirs, mine = difference.one, difference.other
    there, here = _port_read(theirs), _port_read(mine)
    if there is not None and here is not None and there[1] == here[1]:
        return f"read {here[0]} from port {here[1]} where {others} read {there[0]}"
    if mine is not None and mine.get("kind") == "input":
        return f"was given an input that {others} were not given there: {line_words(mine)}"
    if theirs is not None and theirs.get("kind") == "input":
        return f"was not given an input that {others} were given there: {line_words(theirs)}"
    return None


def _port_read(line: Json | None) -> tuple[str, str] | None:
    """(value, port) of an input that was read from a port, in words."""
    if line is None or (line.get("kind"), line.get("input")) != ("input", "port"):
        return None
    value, port = line.get("value"), line.get("port")
    return (f"{value:#x}", f"{port:#x}") if type(value) is int and type(port) is int else None
