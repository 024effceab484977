"""The parser of expectation scripts: recursive descent, one method a construct (see ``docs/scripts.md``)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from vmm.trace.cursor import WORD, Cursor, did_you_mean
from vmm.trace.lines import Lines
from vmm.trace.syntax import (
    AnyOrder,
    ConsoleCheck,
    Either,
    Expect,
    Node,
    Pattern,
    Program,
    Repeat,
    Section,
    Watch,
    is_open_ended,
    may_take_nothing,
)
from vmm.trace.values import QUOTE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.errors import ScriptError
    from vmm.trace.actions import Action

HEADER: Final = "vmm-script/1"

_COUNT: Final = re.compile(r"\d\w*", re.ASCII)
_WATCHES: Final = frozenset({"never", "exactly", "at", "whenever"})
_GROUPS: Final = frozenset({"repeat", "any", "either", "section"})
_CONSOLE: Final = ("contains", "lacks", "is")
_MAX_DEPTH = 16

Bound = tuple[int, int | None, str]


def parse(text: str, file: str, symbols: Mapping[str, int]) -> Program:
    """Parse a whole script; ``ScriptError`` says what is wrong and where."""
    return _Parser(Cursor(text.removeprefix("\ufeff"), file), symbols).program()


class _Parser:
    def __init__(self, cursor: Cursor, symbols: Mapping[str, int]) -> None:
        self.cursor = cursor
        self.lines = Lines(cursor, symbols)
        self._depth = 0
        self._console: list[ConsoleCheck] = []

    def program(self) -> Program:
        cursor = self.cursor
        first = cursor.text.split("\n", 1)[0]
        if first.split("#")[0].strip() != HEADER:
            raise cursor.wrong(
                f"expected `{HEADER}`, found `{first[:40]!a}`", fix="make that the first line", line=1
            )
        cursor.position = len(first)
        cursor.skip_separators()
        selected = self._selection() if cursor.take_word("only") else None
        body, watches = self._statements(top=True, watched=True)
        if cursor.take_text("}"):
            raise cursor.wrong("this `}` closes nothing", fix="remove it")
        self.lines.values.check_postponed()
        root = Section(None, None, body, watches, 1)
        self._check_arrivals(body, certain=True)
        return Program(root, tuple(self._console), selected)

    def _selection(self) -> frozenset[str]:
        kinds = {self.lines.kind()}
        while self.cursor.take_text(","):
            kinds.add(self.lines.kind())
        self._end_statement("`,` or the end of the line", "name kinds of records: only exits, modifications")
        return frozenset(kinds)

    def _statements(self, *, top: bool, watched: bool) -> tuple[tuple[Node, ...], tuple[Watch, ...]]:
        nodes: list[Node] = []
        watches: list[Watch] = []
        cursor = self.cursor
        cursor.skip_separators()
        while cursor.position < len(cursor.text) and cursor.text[cursor.position] != "}":
            if cursor.sees_word("console"):
                self._console_check(top=top)
            elif cursor.sees_word(*_WATCHES) or cursor.sees(_COUNT):
                watches.append(self._watch(watched=watched))
            else:
                nodes.append(self._node())
            self._end_statement("the end of the line", "remove it, or begin the next statement on a new line")
            cursor.skip_separators()
        return tuple(nodes), tuple(watches)

    def _end_statement(self, what: str, fix: str) -> None:
        if self.cursor.sees_word("because"):
            raise self._reason_of_nothing()
        if not self.cursor.at_statement_end():
            word = self.cursor.sees(WORD) or ""
            raise self.cursor.expected(what, fix=did_you_mean(word, ["because"], otherwise=fix))

    def _node(self) -> Node:
        word = self.cursor.sees(WORD)
        match word:
            case "repeat":
                return self._repeat()
            case "any":
                return self._any_order()
            case "either":
                return self._either()
            case "section":
                return self._section()
            case "only":
                raise self.cursor.wrong("`only` comes too late", fix="write it right below the first line")
            case "because":
                raise self._reason_of_nothing()
            case _:
                return self._expect(word)

    def _expect(self, word: str | None) -> Expect:
        kinds = self.lines.schema.kinds
        if word != "next" and word not in kinds and (word or "").removesuffix("s") not in kinds:
            known = [*kinds, *_GROUPS, *_WATCHES, "next", "console", "because"]
            otherwise = (
                f"begin a line with a kind of record ({', '.join(kinds)}), next, repeat, any order, either, "
                "section, never, exactly, at least, at most, whenever or console"
            )
            fix = did_you_mean(word or "", known, otherwise=otherwise)
            raise self.cursor.expected("a statement", fix=fix)
        line = self.cursor.line
        strict = self.cursor.take_word("next")
        pattern, captures = self.lines.pattern(capturing=True)
        return Expect(pattern, strict, captures, self.lines.actions(pattern), self._because(), line)

    def _console_check(self, *, top: bool) -> None:
        line = self.cursor.line
        if not top:
            raise self.cursor.wrong(
                "`console` stands inside of a block", fix="it is about the whole run: move it out"
            )
        self.cursor.take_word("console")
        if not self.cursor.sees_word(*_CONSOLE):
            raise self.cursor.expected("`contains`, `lacks` or `is`", fix='write console contains "ok"')
        operator = self.cursor.take(WORD) or ""
        self._console.append(ConsoleCheck(operator, self.lines.values.string(), self._because(), line))

    # Reasons

    def _because(self) -> str:
        """The reason that a statement ends with; empty if it gives none."""
        cursor = self.cursor
        if not cursor.take_word("because"):
            return ""
        text = self.lines.values.string()
        if not text.strip():
            raise cursor.wrong("the reason is empty", fix="say why the statement is there, or remove `because`")
        if not cursor.at_statement_end():
            fix = "write `because` last, behind conditions, `until` and actions"
            raise cursor.expected("the end of the line behind the reason", fix=fix)
        return text

    def _reason_of_nothing(self) -> ScriptError:
        return self.cursor.wrong(
            "this `because` is the reason of nothing",
            fix="write it at the end of a record line, a watch or a console check",
        )

    # Watches

    def _watch(self, *, watched: bool) -> Watch:
        cursor, line = self.cursor, self.cursor.line
        if not watched:
            raise cursor.wrong(
                f"{cursor.found()} stands directly inside of a repeat, any order or either",
                fix="put `section { … }` around what it is about",
            )
        least, most, words = self._watch_bound()
        values = self.lines.values
        values.may_postpone = True
        pattern, _ = self.lines.pattern(capturing=False)
        until = self._until()
        values.may_postpone = False
        actions = self._whenever_actions(pattern) if words == "whenever" else ()
        if words != "whenever" and cursor.take_text("->"):
            raise cursor.wrong(
                f"`{words}` cannot act", fix="write the action with `whenever …` or an expected record"
            )
        return Watch(pattern, least, most, until, actions, words, self._because(), line)

    def _whenever_actions(self, pattern: Pattern) -> tuple[Action, ...]:
        actions = self.lines.actions(pattern)
        if self.cursor.sees_word("because"):
            raise self.cursor.wrong(
                "`whenever` demands nothing and takes no `because`", fix="make the reason a comment: # …"
            )
        if not actions:
            raise self.cursor.expected("`->` and an action", fix="say what to do: -> answer 0x41")
        return actions

    def _watch_bound(self) -> Bound:
        if self.cursor.take_word("never"):
            return 0, 0, "never"
        if self.cursor.take_word("whenever"):
            return 0, None, "whenever"
        bound = self._bound()
        if bound[2].isalnum():
            raise self.cursor.wrong(
                f"a bare `{bound[2]}` does not count records",
                fix=f"write `exactly {bound[2]}`, or `repeat {bound[2]} {{`",
            )
        return bound

    def _until(self) -> Pattern | None:
        if not self.cursor.take_word("until"):
            return None
        return self.lines.pattern(capturing=False)[0]

    def _bound(self) -> Bound:
        """``N``, ``N..M``, ``exactly N``, ``at least N``, ``at most N``."""
        cursor = self.cursor
        cursor.skip()
        start = cursor.position
        if cursor.take_word("at"):
            least, most = self._at_bound()
        else:
            exact = cursor.take_word("exactly")
            least = self._count()
            most = self._count() if not exact and cursor.take_text("..") else least
        if most is not None and most < least:
            raise cursor.wrong(
                f"`{cursor.since(start)}` ends before it begins", fix="put the smaller number first"
            )
        return least, most, cursor.since(start)

    def _at_bound(self) -> tuple[int, int | None]:
        if self.cursor.take_word("least"):
            return self._count(), None
        if self.cursor.take_word("most"):
            return 0, self._count()
        raise self.cursor.expected("`least` or `most`", fix="write `at least 3` or `at most 3`")

    def _count(self) -> int:
        digits = self.cursor.sees(_COUNT)
        if digits is None or not digits.isdecimal() or len(digits) > 18:
            raise self.cursor.expected("a count", fix="write a decimal number")
        self.cursor.take(_COUNT)
        return int(digits)

    # Blocks

    def _repeat(self) -> Repeat:
        cursor, line = self.cursor, self.cursor.line
        cursor.take_word("repeat")
        least, most, words = self._bound()
        if most == 0:
            raise cursor.wrong(
                f"`repeat {words}` never does anything", fix="remove it, or write `never` in a section"
            )
        body = self._plain_block("repeat")
        if all(map(may_take_nothing, body)):
            raise cursor.wrong(
                "the body of this repeat could go round without any record",
                fix="put a record line into it that must come",
                line=line,
            )
        return Repeat(body, least, most, line)

    def _any_order(self) -> AnyOrder:
        line = self.cursor.line
        self.cursor.take_word("any")
        if not self.cursor.take_word("order"):
            raise self.cursor.expected("`order`", fix="write `any order { … }`")
        return AnyOrder(self._plain_block("any order"), line)

    def _either(self) -> Either:
        cursor, line = self.cursor, self.cursor.line
        cursor.take_word("either")
        branches = [self._plain_block("either")]
        while self._or_follows():
            branches.append(self._plain_block("or"))
        if len(branches) == 1:
            raise cursor.expected("`or {`", fix="an `either { … }` needs at least one `or { … }`")
        if any(all(map(may_take_nothing, branch)) for branch in branches):
            raise cursor.wrong(
                "a branch of this either could be taken without any record",
                fix="put a record line into it that must come",
                line=line,
            )
        return Either(tuple(branches), line)

    def _or_follows(self) -> bool:
        here = self.cursor.position
        self.cursor.skip_separators()
        if self.cursor.take_word("or"):
            return True
        self.cursor.position = here
        return False

    def _section(self) -> Section:
        cursor, line = self.cursor, self.cursor.line
        cursor.take_word("section")
        name = self.lines.values.string() if cursor.sees(QUOTE) else None
        until = self._until()
        body, watches = self._block("section", watched=True)
        if until is None and (not body or is_open_ended(body[-1]) or all(map(may_take_nothing, body))):
            raise cursor.wrong(
                "nothing says where this section ends",
                fix="write `section until RECORD {`, or make its last line a record that must come",
                line=line,
            )
        return Section(name, until, body, watches, line)

    def _plain_block(self, owner: str) -> tuple[Node, ...]:
        line = self.cursor.line
        body, _ = self._block(owner, watched=False)
        if not body:
            raise self.cursor.wrong(
                f"this `{owner}` block is empty", fix="put a record line into it", line=line
            )
        return body

    def _block(self, owner: str, *, watched: bool) -> tuple[tuple[Node, ...], tuple[Watch, ...]]:
        cursor, line = self.cursor, self.cursor.line
        if not cursor.take_text("{"):
            raise cursor.expected("`{`", fix=f"write the block of `{owner}` between {{ and }}")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise cursor.wrong("blocks are nested too deeply", fix=f"use at most {_MAX_DEPTH} levels")
        inside = self._statements(top=False, watched=watched)
        if not cursor.take_text("}"):
            raise cursor.expected("`}`", fix=f"close the block that line {line} opens")
        self._depth -= 1
        return inside

    # A section has to begin at one certain record.

    def _check_arrivals(self, nodes: tuple[Node, ...], *, certain: bool) -> None:
        for node in nodes:
            self._check_arrival(node, certain=certain)
            certain = not is_open_ended(node)

    def _check_arrival(self, node: Node, *, certain: bool) -> None:
        match node:
            case Section():
                if not certain:
                    raise self.cursor.wrong(
                        "nothing says where this section begins: what stands before it is open-ended",
                        fix="put a record line before it",
                        line=node.line,
                    )
                self._check_arrivals(node.body, certain=True)
            case Repeat():
                fixed = node.least == node.most and not is_open_ended(node.body[-1])
                self._check_arrivals(node.body, certain=certain and fixed)
            case AnyOrder():
                for member in node.members:
                    self._check_arrival(member, certain=certain)
            case Either():
                for branch in node.branches:
                    self._check_arrivals(branch, certain=False)
            case Expect():
                pass
