# ruff: noqa: D102 - the State protocol says what the methods of all states do
"""Where a run stands in a script: one mutable state for each statement that is awaited or under way.

::

    awaited ──takes its first record──> started ──takes its last──> done
       └── may be passed over if the statement needs no record ──────┘

A record is offered from the root downwards; the first statement in the order of the text that can take it
does. Nothing is ever taken back. A state does not outlive its statement: memory is bounded by the script.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from attrs import define, field

from vmm.trace.near import NearMisses
from vmm.trace.syntax import AnyOrder, Either, Expect, Node, Repeat, Section

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vmm.trace.syntax import Captures, Json


class Run(Protocol):
    """What the states know of the matcher."""

    captures: Captures
    #: A record that counts as a gap has passed since the last one that was taken.
    gapped: bool
    number: int

    def took(self, line: Expect, record: Json) -> None:
        """A line has taken the record at hand."""

    def opened(self, section: SectionState) -> None:
        """A section begins with the next record."""

    def closed(self, section: SectionState) -> None:
        """A section has ended."""


class State(Protocol):
    """One statement under way."""

    @property
    def done(self) -> bool:
        """It takes no more records."""

    @property
    def skippable(self) -> bool:
        """It needs no more records."""

    @property
    def started(self) -> bool:
        """It has taken a record."""

    def arrive(self) -> None:
        """All before it is complete: it is what the run must show next."""

    def offer(self, record: Json) -> bool:
        """Take the record if it fits."""

    def settle(self) -> None:
        """Go on to what follows a part that is done."""

    def awaited(self) -> Iterator[ExpectState]:
        """The record lines that could take the next record, in the order in which they are asked."""

    def missing(self) -> ExpectState | SectionState | None:
        """The first part that still has to come; None if the statement is skippable."""


@define(eq=False)
class ExpectState:
    """A record line that is awaited."""

    node: Expect
    run: Run
    done: bool = False
    near: NearMisses = field(factory=NearMisses)

    @property
    def skippable(self) -> bool:
        return self.done

    @property
    def started(self) -> bool:
        return self.done

    def arrive(self) -> None:
        """Nothing begins here."""

    def offer(self, record: Json) -> bool:
        if self.node.strict and self.run.gapped:
            return False
        if not self.near.match(self.node.pattern, record, self.run.number, self.run.captures):
            return False
        self.done = True
        self.run.took(self.node, record)
        return True

    def settle(self) -> None:
        """Nothing follows inside of a line."""

    def awaited(self) -> Iterator[ExpectState]:
        if not self.done:
            yield self

    def missing(self) -> ExpectState | SectionState | None:
        return None if self.done else self


class SequenceState:
    """Statements one after the other."""

    def __init__(self, nodes: tuple[Node, ...], run: Run) -> None:
        self._nodes = nodes
        self._run = run
        self._at = 0
        self._children: dict[int, State] = {}
        self.started = False

    @property
    def done(self) -> bool:
        return self._at == len(self._nodes)

    @property
    def skippable(self) -> bool:
        return all(self._child(at).skippable for at in range(self._at, len(self._nodes)))

    def arrive(self) -> None:
        if not self.done:
            self._child(self._at).arrive()

    def offer(self, record: Json) -> bool:
        for at, child in self._reachable():
            if child.offer(record):
                self._at = at
                self.started = True
                return True
        return False

    def settle(self) -> None:
        while not self.done:
            child = self._child(self._at)
            child.settle()
            if not child.done:
                return
            self._children.clear()
            self._at += 1
            self.arrive()

    def awaited(self) -> Iterator[ExpectState]:
        for _, child in self._reachable():
            yield from child.awaited()

    def missing(self) -> ExpectState | SectionState | None:
        return _first_missing(child for _, child in self._reachable())

    def _reachable(self) -> Iterator[tuple[int, State]]:
        for at in range(self._at, len(self._nodes)):
            child = self._child(at)
            yield at, child
            if not child.skippable:
                return

    def _child(self, at: int) -> State:
        child = self._children.get(at)
        if child is None:
            child = self._children[at] = state_of(self._nodes[at], self._run)
        return child


class RepeatState:
    """A body that comes again. Between two rounds the body is asked before what follows."""

    def __init__(self, node: Repeat, run: Run) -> None:
        self._node = node
        self._run = run
        self._rounds = 0
        self._body = SequenceState(node.body, run)

    @property
    def done(self) -> bool:
        return self._rounds == self._node.most

    @property
    def skippable(self) -> bool:
        if self._rounds >= self._node.least and not self._body.started:
            return True
        return self._rounds + 1 >= self._node.least and self._body.started and self._body.skippable

    @property
    def started(self) -> bool:
        return self._rounds > 0 or self._body.started

    def arrive(self) -> None:
        self._body.arrive()

    def offer(self, record: Json) -> bool:
        if self.done:
            return False
        if self._body.offer(record):
            return True
        if not (self._body.started and self._body.skippable) or self._rounds + 1 == self._node.most:
            return False
        return self._offer_next_round(record)

    def _offer_next_round(self, record: Json) -> bool:
        body = SequenceState(self._node.body, self._run)
        if not body.offer(record):
            return False
        self._rounds += 1
        self._body = body
        return True

    def settle(self) -> None:
        if self.done:
            return
        self._body.settle()
        while self._body.done:
            self._rounds += 1
            if self._rounds == self._node.most:
                return
            self._body = SequenceState(self._node.body, self._run)
            self._body.arrive()
            self._body.settle()

    def awaited(self) -> Iterator[ExpectState]:
        if self.done:
            return
        yield from self._body.awaited()
        if self._body.started and self._body.skippable and self._rounds + 1 != self._node.most:
            yield from SequenceState(self._node.body, self._run).awaited()

    def missing(self) -> ExpectState | SectionState | None:
        if self.skippable:
            return None
        unfinished = self._body.missing()
        return unfinished or SequenceState(self._node.body, self._run).missing()


class AnyOrderState:
    """Statements that are all awaited; each keeps its own order."""

    def __init__(self, node: AnyOrder, run: Run) -> None:
        self._members = [state_of(member, run) for member in node.members]

    @property
    def done(self) -> bool:
        return all(member.done for member in self._members)

    @property
    def skippable(self) -> bool:
        return all(member.skippable for member in self._members)

    @property
    def started(self) -> bool:
        return any(member.started for member in self._members)

    def arrive(self) -> None:
        for member in self._members:
            member.arrive()

    def offer(self, record: Json) -> bool:
        return any(member.offer(record) for member in self._members if not member.done)

    def settle(self) -> None:
        for member in self._members:
            member.settle()

    def awaited(self) -> Iterator[ExpectState]:
        for member in self._members:
            if not member.done:
                yield from member.awaited()

    def missing(self) -> ExpectState | SectionState | None:
        return _first_missing(self._members)


class EitherState:
    """Branches, until one of them has taken a record; then that one."""

    def __init__(self, node: Either, run: Run) -> None:
        self._branches = [SequenceState(branch, run) for branch in node.branches]

    @property
    def done(self) -> bool:
        return self.started and self._branches[0].done

    @property
    def skippable(self) -> bool:
        return self.started and self._branches[0].skippable

    @property
    def started(self) -> bool:
        return len(self._branches) == 1

    def arrive(self) -> None:
        """No branch begins before it has taken a record."""

    def offer(self, record: Json) -> bool:
        for branch in self._branches:
            if branch.offer(record):
                self._branches = [branch]
                return True
        return False

    def settle(self) -> None:
        if self.started:
            self._branches[0].settle()

    def awaited(self) -> Iterator[ExpectState]:
        for branch in self._branches:
            yield from branch.awaited()

    def missing(self) -> ExpectState | SectionState | None:
        return _first_missing(self._branches)


class SectionState:
    """A body whose beginning and end the matcher is told, for the watches between them."""

    def __init__(self, node: Section, run: Run) -> None:
        self.node = node
        self._run = run
        self.body = SequenceState(node.body, run)
        self.done = False

    @property
    def skippable(self) -> bool:
        return self.done

    @property
    def started(self) -> bool:
        return self.done or self.body.started

    def arrive(self) -> None:
        self._run.opened(self)
        self.body.arrive()

    def offer(self, record: Json) -> bool:
        return self.body.offer(record)

    def settle(self) -> None:
        self.body.settle()
        if self.node.until is None and self.body.done:
            self.end()

    def end(self) -> None:
        """The section is over."""
        if not self.done:
            self.done = True
            self._run.closed(self)

    def awaited(self) -> Iterator[ExpectState]:
        if not self.done:
            yield from self.body.awaited()

    def missing(self) -> ExpectState | SectionState | None:
        return None if self.done else self.body.missing() or self


def _first_missing(states: Iterable[State]) -> ExpectState | SectionState | None:
    return next((part for state in states if (part := state.missing()) is not None), None)


def state_of(node: Node, run: Run) -> State:
    """A fresh state for a statement."""
    match node:
        case Expect():
            return ExpectState(node, run)
        case Repeat():
            return RepeatState(node, run)
        case AnyOrder():
            return AnyOrderState(node, run)
        case Either():
            return EitherState(node, run)
        case Section():
            return SectionState(node, run)
