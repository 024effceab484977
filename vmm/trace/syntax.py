"""The parts of a parsed script, as frozen records that know how to judge a record but not the state of a run.

Nothing here parses (see :mod:`vmm.trace.grammar`) and nothing here remembers (see :mod:`vmm.trace.states`).
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final, Protocol, Union

from attrs import field, frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.trace.actions import Action
    from vmm.trace.fields import FieldType

Json = dict[str, Any]
#: What a capture or an expression may hold: int, str, list or None, as JSON gives them.
Value = Any
Captures = dict[str, Value]


class _Unknown:
    """The value of an expression that has none: a capture not made yet, or a sum of what is no number."""

    def __repr__(self) -> str:
        return "nothing yet"


UNKNOWN: Final = _Unknown()


class Expr(Protocol):
    """Something that has a value, given the record at hand and the captures made so far."""

    def evaluate(self, record: Json, captures: Captures) -> Value:
        """The value; ``UNKNOWN`` if it has none."""


@frozen
class Literal:
    """A value that the script spells out, a symbol of the image included."""

    value: Value

    def evaluate(self, record: Json, captures: Captures) -> Value:
        """The value itself."""
        del record, captures
        return self.value


@frozen
class Captured:
    """``$name``."""

    name: str

    def evaluate(self, record: Json, captures: Captures) -> Value:
        """What the last line that captured this name saw."""
        del record
        return captures.get(self.name, UNKNOWN)


@frozen
class OwnField:
    """``.name``: another field of the record that is being judged."""

    name: str

    def evaluate(self, record: Json, captures: Captures) -> Value:
        """The field's value, None where the record does not have it."""
        del captures
        return record.get(self.name)


ARITHMETIC: Final[dict[str, Callable[[int, int], int]]] = {
    "+": operator.add,
    "-": operator.sub,
    "&": operator.and_,
    "|": operator.or_,
}


@frozen
class Sum:
    """Terms joined by ``+ - & |``, from left to right."""

    first: Expr
    rest: tuple[tuple[str, Expr], ...]

    def evaluate(self, record: Json, captures: Captures) -> Value:
        """The integer result, unbounded and signed; ``UNKNOWN`` unless every term is a number."""
        total = self.first.evaluate(record, captures)
        if type(total) is not int:
            return UNKNOWN
        for sign, term in self.rest:
            value = term.evaluate(record, captures)
            if type(value) is not int:
                return UNKNOWN
            total = ARITHMETIC[sign](total, value)
        return total


@frozen
class Several:
    """The two ends of a range, or the elements of a list."""

    parts: tuple[Expr, ...]

    def evaluate(self, record: Json, captures: Captures) -> Value:
        """The list of the parts' values; ``UNKNOWN`` if one of them is."""
        values = [part.evaluate(record, captures) for part in self.parts]
        return UNKNOWN if UNKNOWN in values else values


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Value, Value], bool]:
    return lambda actual, wanted: type(actual) is int and type(wanted) is int and compare(actual, wanted)


def _has(actual: Value, wanted: Value) -> bool:
    if isinstance(actual, list):
        return all(one in actual for one in (wanted if isinstance(wanted, list) else [wanted]))
    return type(actual) is int and type(wanted) is int and actual & wanted == wanted


def _lacks(actual: Value, wanted: Value) -> bool:
    if isinstance(actual, list):
        return not any(one in actual for one in (wanted if isinstance(wanted, list) else [wanted]))
    return type(actual) is int and type(wanted) is int and not actual & wanted


def _within(actual: Value, wanted: Value) -> bool:
    return (
        type(actual) is int and all(type(end) is int for end in wanted) and wanted[0] <= actual <= wanted[1]
    )


def _starts(actual: Value, wanted: Value) -> bool:
    return isinstance(actual, str) and isinstance(wanted, str) and actual.startswith(wanted)


OPERATORS: Final[dict[str, Callable[[Value, Value], bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": _ordered(operator.lt),
    "<=": _ordered(operator.le),
    ">": _ordered(operator.gt),
    ">=": _ordered(operator.ge),
    "has": _has,
    "lacks": _lacks,
    "in": _within,
    "starts": _starts,
}


@frozen
class Condition:
    """One field, one comparison, one value. ``wanted`` is the value as the script writes it."""

    field: str
    operator: str
    value: Expr
    wanted: str
    type: FieldType

    def holds(self, record: Json, captures: Captures) -> bool:
        """Whether the record meets the condition; never when the wanted value is unknown."""
        value = self.value.evaluate(record, captures)
        return value is not UNKNOWN and OPERATORS[self.operator](record.get(self.field), value)


@frozen
class Pattern:
    """A kind of record, its label (an exit's reason, a block's event …) and conditions on its fields."""

    kind: str
    label_field: str
    label: str | None
    conditions: tuple[Condition, ...]
    line: int

    def concerns(self, record: Json) -> bool:
        """Whether kind and label fit, whatever the conditions say."""
        return record.get("kind") == self.kind and (
            self.label is None or record.get(self.label_field) == self.label
        )

    def held(self, record: Json, captures: Captures) -> int:
        """How many of the conditions hold."""
        return sum(condition.holds(record, captures) for condition in self.conditions)

    def matches(self, record: Json, captures: Captures) -> bool:
        """Whether the record is one that the pattern describes."""
        return self.concerns(record) and all(
            condition.holds(record, captures) for condition in self.conditions
        )

    def title(self) -> str:
        """Kind and label, for messages."""
        return f"{self.kind} {self.label}" if self.label is not None else self.kind


@frozen
class Expect:
    """One record that must come. ``captures`` are pairs of field and name; ``because`` is empty without a reason."""

    pattern: Pattern
    strict: bool
    captures: tuple[tuple[str, str], ...]
    actions: tuple[Action, ...]
    because: str
    line: int


@frozen
class Repeat:
    """A body that must come ``least`` to ``most`` times (None: any number)."""

    body: tuple[Node, ...]
    least: int
    most: int | None
    line: int


@frozen
class AnyOrder:
    """Statements that are all awaited at once."""

    members: tuple[Node, ...]
    line: int


@frozen
class Either:
    """Branches of which the first to take a record is the one that counts."""

    branches: tuple[tuple[Node, ...], ...]
    line: int


@frozen
class Watch:
    """A number of records that a section may or must hold. ``words`` is the bound as the script writes it."""

    pattern: Pattern
    least: int
    most: int | None
    until: Pattern | None
    actions: tuple[Action, ...]
    words: str
    because: str
    line: int


@frozen
class Section:
    """A stretch of the run with watches of its own; the whole script is one."""

    name: str | None
    until: Pattern | None
    body: tuple[Node, ...]
    watches: tuple[Watch, ...]
    line: int


Node = Union[Expect, Repeat, AnyOrder, Either, Section]  # noqa: UP007 - the names are defined above as strings


@frozen
class ConsoleCheck:
    """What the whole console output must contain, lack or be."""

    operator: str
    text: str
    because: str
    line: int


@frozen
class Program:
    """A whole script. ``selected`` are the kinds that count as gaps; None: all of them."""

    root: Section
    console: tuple[ConsoleCheck, ...] = ()
    selected: frozenset[str] | None = field(default=None)


def may_take_nothing(node: Node) -> bool:
    """Whether the statement can be complete without a single record."""
    match node:
        case Repeat():
            return node.least == 0 or all(map(may_take_nothing, node.body))
        case AnyOrder():
            return all(map(may_take_nothing, node.members))
        case Either():
            return any(all(map(may_take_nothing, branch)) for branch in node.branches)
        case _:
            return False


def is_open_ended(node: Node) -> bool:
    """Whether the statement, once complete, could still take a record: then nobody knows when it ends."""
    match node:
        case Repeat():
            return node.least != node.most or is_open_ended(node.body[-1])
        case AnyOrder():
            return any(map(is_open_ended, node.members))
        case Either():
            return any(is_open_ended(branch[-1]) for branch in node.branches)
        case _:
            return False
