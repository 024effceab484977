"""Holds a run against a script, record by record, while the run goes on or afterwards.

What matches what is defined in ``docs/scripts.md``. Memory is bounded by the script, not by the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.trace.actions import ActionError, Actions
from vmm.trace.console_check import ConsoleState
from vmm.trace.fields import FieldType
from vmm.trace.near import NearMiss, NearMisses
from vmm.trace.report import Divergence, History, explain_near, explain_other, script_lines
from vmm.trace.states import ExpectState, SectionState, SequenceState
from vmm.trace.syntax import ConsoleCheck, Expect, Section, Watch
from vmm.trace.wording import quoted, value_words

if TYPE_CHECKING:
    from vmm.trace.script import Script
    from vmm.trace.syntax import Captures, Json, Pattern

_CONSOLE_SHOWN: Final = 400

#: What a run can contradict.
Statement = Expect | Watch | ConsoleCheck | Section


@frozen
class Verdict:
    """Whether the script holds; ``divergence`` says why not."""

    ok: bool
    divergence: Divergence | None = None


@frozen
class _Failure:
    statement: Statement
    what: str
    record: int | None
    near: list[NearMiss]
    notes: list[str]


class _WatchState:
    """One watch in one passage of its section."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.count = 0
        self.over = False
        self.near = NearMisses()

    def sees(self, record: Json, matcher: Matcher) -> bool:
        """Whether the record is one that the watch counts."""
        if self.watch.least:
            return self.near.match(self.watch.pattern, record, matcher.number, matcher.captures)
        return self.watch.pattern.matches(record, matcher.captures)


class Matcher:
    """Feed it every record of a run, in order; it acts, and decides as early as it can.

    Without ``actions`` the script's actions are left out, as is right for the trace of a finished run.
    """

    def __init__(self, script: Script, actions: Actions | None = None) -> None:
        self.captures: Captures = {}
        self.gapped = False
        self.number = 0
        self._script = script
        self._program = script.program
        self._actions = actions
        self._history = History()
        self._failure: _Failure | None = None
        self._verdict: Verdict | None = None
        #: The watches in force: those of the whole script (None) and of every open section.
        self._scopes: dict[SectionState | None, list[_WatchState]] = {}
        self._open: list[SectionState] = []
        self._console = [ConsoleState(check) for check in self._program.console]
        self._console_tail = ""
        self._watches: dict[str, list[_WatchState]] = {}
        self._enders: dict[str, list[SectionState]] = {}
        self._kinds: frozenset[str] = frozenset()
        self._root = SequenceState(self._program.root.body, self)
        self._scopes[None] = list(map(_WatchState, self._program.root.watches))
        self._root.arrive()
        self._root.settle()
        self._index_scopes()
        self._index_awaited()

    @property
    def failed(self) -> bool:
        """Whether the divergence is certain: no record that may still come can mend it."""
        return self._failure is not None

    def feed(self, record: Json) -> None:
        """Take the next record, the object of its trace line."""
        kind = record.get("kind")
        if kind == "console":
            self.console(str(record.get("text", "")))
            return
        self.number += 1
        if self._failure is not None:
            self._history.add_after(self.number, record)
            return
        self._history.add(self.number, record)
        if kind in self._enders:
            self._end_sections(record, self._enders[kind])
        if kind in self._watches:
            self._watch(record, self._watches[kind])
        if self.failed:
            return
        if kind in self._kinds and self._root.offer(record):
            self._root.settle()
            self._index_awaited()
        elif not self.gapped and (self._program.selected is None or kind in self._program.selected):
            self._pass_over(record)

    def console(self, text: str) -> None:
        """Take the next piece of the guest's console output."""
        self._console_tail = (self._console_tail + text)[-_CONSOLE_SHOWN:]
        for state in self._console:
            if self._failure is None and state.breaks(text):
                self._fail(state.check, state.complaint(), notes=self._console_notes())

    def finish(self) -> Verdict:
        """Say how the run compares, now that it is over. Further calls give the same verdict."""
        if self._verdict is None:
            self._conclude()
            divergence = None if self._failure is None else self._report(self._failure)
            self._verdict = Verdict(divergence is None, divergence)
        return self._verdict

    # What the states tell (states.Run)

    def took(self, line: Expect, record: Json) -> None:
        """A line has taken the record: capture, then act."""
        self.gapped = False
        for field, name in line.captures:
            self.captures[name] = record.get(field)
        self._history.took(line.line)
        self._perform(line, record)

    def opened(self, section: SectionState) -> None:
        """A section begins: its watches see the records from the next one on."""
        self._open.append(section)
        self._scopes[section] = list(map(_WatchState, section.node.watches))
        self._index_scopes()

    def closed(self, section: SectionState) -> None:
        """A section ends: its counts must be reached."""
        self._open.remove(section)
        self._check_counts(
            self._scopes.pop(section), f"by the end of the section of line {section.node.line}"
        )
        self._index_scopes()

    # Steps of a record

    def _end_sections(self, record: Json, sections: list[SectionState]) -> None:
        for section in reversed(sections):
            until = section.node.until
            if section.done or until is None or not until.matches(record, self.captures):
                continue
            missing = section.body.missing()
            if missing is not None:
                what = f"#{self.number} ended the section of line {section.node.line} before"
                self._fail_missing(missing, what, record)
                return
            self.gapped = False
            section.end()
            self._root.settle()
            self._index_awaited()

    def _watch(self, record: Json, states: list[_WatchState]) -> None:
        for state in states:
            watch = state.watch
            if state.over or self._failure is not None:
                continue
            if watch.until is not None and watch.until.matches(record, self.captures):
                state.over = True
                self._check_counts([state], f"before #{self.number}, which ends the count")
            elif state.sees(record, self):
                state.count += 1
                self._perform(watch, record)
                if watch.most is not None and state.count > watch.most:
                    self._fail(watch, _too_many(watch, state.count, self.number), record=self.number)

    def _pass_over(self, record: Json) -> None:
        self.gapped = True
        if self._root.skippable or any(not state.node.strict for state in self._root.awaited()):
            return
        if any(section.node.until is not None and section.body.skippable for section in self._open):
            return
        awaited = list(self._root.awaited())
        notes = [explain_other(state.node.pattern, self.number, record, self.captures) for state in awaited]
        wanted = max((state.node for state in awaited), key=lambda node: self._closeness(node.pattern, record))
        what = f"`next` wants {wanted.pattern.title()} here, but #{self.number} came"
        self._fail(wanted, what, record=self.number, notes=notes)

    def _closeness(self, pattern: Pattern, record: Json) -> int:
        """How many conditions hold of a record of the right sort; -1 for another sort."""
        return pattern.held(record, self.captures) if pattern.concerns(record) else -1

    def _perform(self, statement: Expect | Watch, record: Json) -> None:
        if self._actions is None:
            return
        try:
            for action in statement.actions:
                action.perform(self._actions, record, self.captures)
        except ActionError as error:
            self._fail(statement, f"the action cannot be done at #{self.number}: {error}", record=self.number)

    # The end

    def _conclude(self) -> None:
        if self._failure is None and (missing := self._root.missing()) is not None:
            self._fail_missing(missing, "the run ended before", None)
        for states in self._scopes.values():
            self._check_counts(states, "by the end of the run")
        for state in self._console:
            if self._failure is None and not state.satisfied:
                self._fail(state.check, state.complaint(), notes=self._console_notes())

    def _check_counts(self, states: list[_WatchState], when: str) -> None:
        for state in states:
            if self._failure is None and state.count < state.watch.least:
                self._fail_count(state, when)

    def _fail_count(self, state: _WatchState, when: str) -> None:
        pattern, near = state.watch.pattern, state.near.kept
        words, least = state.watch.words, state.watch.least
        what = f"`{words} {pattern.title()}` wanted {least} {when}, but {state.count} came"
        self._fail(state.watch, what, near=near, notes=explain_near(pattern, near))

    def _fail_missing(self, missing: ExpectState | SectionState, what: str, record: Json | None) -> None:
        at = None if record is None else self.number
        if isinstance(missing, SectionState):
            self._fail(
                missing.node, f"{what} this section was over", record=at, notes=[_until_note(missing)]
            )
            return
        pattern, near = missing.node.pattern, missing.near.kept
        notes = explain_near(pattern, near) or [f"no {pattern.title()} came since the line before was met"]
        others = sorted({s.node.line for s in self._root.awaited()} - {missing.node.line})
        if others:
            notes.append(f"also possible here: line {', '.join(map(str, others))}")
        if missing.node.strict and self.gapped:
            notes.append("`next` lets no record pass, and one did")
        self._fail(missing.node, f"{what} this {pattern.title()} came", record=at, near=near, notes=notes)

    def _fail(
        self,
        statement: Statement,
        what: str,
        *,
        record: int | None = None,
        near: list[NearMiss] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        if self._failure is None:
            notes = [*(notes or []), *self._captured_notes()]
            self._failure = _Failure(statement, what, record, near or [], notes)

    def _captured_notes(self) -> list[str]:
        return [f"${name} = {value_words(value, FieldType.TEXT)}" for name, value in self.captures.items()]

    def _console_notes(self) -> list[str]:
        return [
            f"the console shows {quoted(self._console_tail)}"
            if self._console_tail
            else "the console is empty"
        ]

    def _report(self, failure: _Failure) -> Divergence:
        statement = failure.statement
        return Divergence(
            file=self._script.file,
            line=statement.line,
            what=failure.what,
            because="" if isinstance(statement, Section) else statement.because,
            record=failure.record,
            script=script_lines(self._script.text, statement.line),
            run=self._history.lines(failure.record, failure.near),
            notes=tuple(failure.notes),
        )

    # Which kinds of records anything waits for

    def _index_awaited(self) -> None:
        self._kinds = frozenset(state.node.pattern.kind for state in self._root.awaited())

    def _index_scopes(self) -> None:
        self._watches, self._enders = {}, {}
        for states in self._scopes.values():
            for state in states:
                for kind in _kinds_of(state.watch.pattern, state.watch.until):
                    self._watches.setdefault(kind, []).append(state)
        for section in self._open:
            if section.node.until is not None:
                self._enders.setdefault(section.node.until.kind, []).append(section)


def _kinds_of(pattern: Pattern, until: Pattern | None) -> set[str]:
    return {pattern.kind} | ({until.kind} if until is not None else set())


def _too_many(watch: Watch, count: int, at: int) -> str:
    title = watch.pattern.title()
    if watch.most == 0:
        return f"`never {title}`, but #{at} is one"
    return f"`{watch.words} {title}` allows {watch.most}, and #{at} is one more ({count})"


def _until_note(section: SectionState) -> str:
    until = section.node.until
    return f"it lasts until {until.title()}" if until is not None else "its last line was not met"
