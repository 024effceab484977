"""The parser of record lines: kind, label, conditions, captures and actions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from vmm.exits import ExitReason
from vmm.trace.actions import (
    MAX_32,
    MAX_64,
    MAX_VECTOR,
    Action,
    Answer,
    Approve,
    Argument,
    Inject,
    Protect,
    Stop,
    Write,
)
from vmm.trace.cursor import WORD, Cursor, did_you_mean, printable
from vmm.trace.fields import LABELS, OPEN_KINDS, FieldType, Schema
from vmm.trace.syntax import Condition, Expr, Literal, Pattern, Several
from vmm.trace.values import FIELD_AHEAD, OPERATOR, QUOTE, Values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_NUMBER: Final = re.compile(r"\d+(?!\w)", re.ASCII)
_ACCESS: Final = re.compile(r"[r-][w-][x-](?![\w-])", re.ASCII)
_DOUBLE: Final = re.compile("==")
_NO_FIELD: Final = re.compile(r"->|\{|,")
_CAPTURE: Final = re.compile(r"\$[A-Za-z_]\w*", re.ASCII)
_OPERATORS: Final = "=, !=, <, <=, >, >=, has, lacks, in, starts or `as $name`"
_EXPECTED_ACTION: Final = "inject, write, protect, approve, answer or stop"

#: Words that cannot be a bare label because something else begins with them.
RESERVED: Final = frozenset({"and", "until", "because", "has", "lacks", "in", "starts", "as"})

#: Which operators go with which type; None: all of them.
_ALLOWED: Final[dict[FieldType, tuple[str, ...]]] = {
    FieldType.NUMBER: ("=", "!=", "<", "<=", ">", ">=", "has", "lacks", "in"),
    FieldType.TEXT: ("=", "!=", "starts"),
    FieldType.BYTES: ("=", "!=", "starts"),
    FieldType.LIST: ("=", "!=", "has", "lacks"),
}

Captured = tuple[tuple[str, str], ...]


class Lines:
    """Parses what one record line is made of."""

    def __init__(self, cursor: Cursor, symbols: Mapping[str, int]) -> None:
        self.cursor = cursor
        self.schema = Schema.of_records()
        self.values = Values(cursor, symbols)
        self._actions: dict[str, Callable[[], Action]] = {
            "inject": self._inject,
            "write": self._write,
            "protect": self._protect,
            "approve": self._approve,
            "answer": lambda: Answer(self._argument("answer", MAX_32)),
            "stop": Stop,
        }

    def kind(self) -> str:
        """A kind of record, singular or plural."""
        word = self.cursor.sees(WORD) or ""
        kind = word if word in self.schema.kinds else word.removesuffix("s")
        if kind not in self.schema.kinds:
            fix = did_you_mean(
                word, self.schema.kinds, otherwise=f"write one of {', '.join(self.schema.kinds)}"
            )
            raise self.cursor.expected("a kind of record", fix=fix)
        self.cursor.take(WORD)
        return kind

    def pattern(self, *, capturing: bool) -> tuple[Pattern, Captured]:
        """Kind, label, conditions; with captures where ``capturing`` allows them."""
        line = self.cursor.line
        kind = self.kind()
        label = self._label(kind)
        fields = self.values.fields = self.schema.fields(kind, label)
        conditions: list[Condition] = []
        captures: list[tuple[str, str]] = []
        while self.cursor.take_word("and") or self._more():
            name, type_ = self._field(kind, label, fields)
            if self.cursor.take_word("as"):
                captures.append((name, self._capture_name(capturing=capturing)))
            else:
                conditions.append(self._condition(name, type_))
        self._remember(captures, fields)
        return Pattern(kind, LABELS.get(kind, ""), label, tuple(conditions), line), tuple(captures)

    def _more(self) -> bool:
        cursor = self.cursor
        ends = cursor.at_statement_end() or cursor.sees(_NO_FIELD) or cursor.sees_word("until", "because")
        return not ends

    def _label(self, kind: str) -> str | None:
        cursor = self.cursor
        if kind not in LABELS:
            return None
        if cursor.sees(QUOTE):
            return self.values.string()
        if kind == "exit" and cursor.sees(_NUMBER):
            return self._reason_by_number()
        word = cursor.sees(WORD)
        if word is None or word in RESERVED or self._is_field(kind, word):
            return None
        if kind == "exit" and word not in self.schema.exits and word not in ExitReason.__members__:
            fix = did_you_mean(
                word, self.schema.exits, otherwise=f"write one of {', '.join(self.schema.exits)}"
            )
            raise cursor.expected("an exit reason or a field", fix=fix)
        cursor.take(WORD)
        return word

    def _reason_by_number(self) -> str:
        digits = self.cursor.sees(_NUMBER) or ""
        if len(digits) > 5 or int(digits) not in {int(reason) for reason in ExitReason}:
            fix = "write one of " + ", ".join(f"{int(reason)} {reason.name}" for reason in ExitReason)
            raise self.cursor.expected("the number of an exit reason", fix=fix)
        self.cursor.take(_NUMBER)
        return ExitReason(int(digits)).name

    def _is_field(self, kind: str, word: str) -> bool:
        named = kind not in OPEN_KINDS and word in self.schema.kinds[kind]
        return named or self.cursor.sees(FIELD_AHEAD) is not None

    def _field(self, kind: str, label: str | None, fields: Mapping[str, FieldType]) -> tuple[str, FieldType]:
        cursor = self.cursor
        name = cursor.sees(WORD)
        known = f"{kind} {label}" if kind == "exit" and label else kind
        otherwise = f"the fields of {known} are {', '.join(fields)}"
        if name is None:
            raise cursor.expected("a field", fix=otherwise)
        if name not in fields and kind not in OPEN_KINDS:
            likely = fields if cursor.sees(FIELD_AHEAD) else [*fields, "because"]
            fix = did_you_mean(name, likely, otherwise=otherwise)
            raise cursor.expected(f"a field of {known}", fix=fix)
        cursor.take(WORD)
        return name, fields.get(name, FieldType.ANY)

    def _condition(self, name: str, type_: FieldType) -> Condition:
        cursor = self.cursor
        operator = cursor.sees(OPERATOR)
        if operator is None or cursor.sees(_DOUBLE):
            raise cursor.expected(f"an operator after `{name}`", fix=f"write {_OPERATORS}")
        allowed = _ALLOWED.get(type_)
        if allowed is not None and operator not in allowed:
            raise cursor.wrong(
                f"`{operator}` does not go with `{name}`, which holds {type_.value}",
                fix=f"use {', '.join(allowed)}",
            )
        cursor.take(OPERATOR)
        cursor.skip()
        start = cursor.position
        value = self._range() if operator == "in" else self._operand(operator, type_)
        return Condition(name, operator, value, printable(cursor.since(start)), type_)

    def _operand(self, operator: str, type_: FieldType) -> Expr:
        plain = operator in {"=", "!="}
        if type_ is FieldType.LIST and not plain:
            return self.values.numbers()
        value = self.values.of_type(type_)
        if not plain and value == Literal(None):
            raise self.cursor.wrong(f"`{operator} none` means nothing", fix="use = none or != none")
        return value

    def _range(self) -> Several:
        low = self.values.number()
        if not self.cursor.take_text(".."):
            raise self.cursor.expected("`..`", fix="write a range with both ends in it: in 0x1000..0x1fff")
        return Several((low, self.values.number()))

    def _capture_name(self, *, capturing: bool) -> str:
        if not capturing:
            raise self.cursor.wrong(
                "`as` cannot capture here",
                fix="capture in a line that expects one record, not in a watch or `until`",
            )
        name = self.cursor.take(_CAPTURE)
        if name is None:
            raise self.cursor.expected("a name with `$`", fix="write gpa as $page")
        return name[1:]

    def _remember(self, captures: list[tuple[str, str]], fields: Mapping[str, FieldType]) -> None:
        for field, name in captures:
            type_ = fields.get(field, FieldType.ANY)
            before = self.values.captures.setdefault(name, type_)
            if before != type_:
                raise self.cursor.wrong(
                    f"`${name}` held {before.value} before and would now hold {type_.value}",
                    fix="capture it under another name",
                )

    # Actions

    def actions(self, pattern: Pattern) -> tuple[Action, ...]:
        """All ``-> action`` that follow."""
        actions: list[Action] = []
        self.values.fields = self.schema.fields(pattern.kind, pattern.label)
        while self.cursor.take_text("->"):
            word = self.cursor.sees(WORD) or ""
            if word not in self._actions:
                fix = did_you_mean(word, self._actions, otherwise=f"write {_EXPECTED_ACTION}")
                raise self.cursor.expected("an action", fix=fix)
            self._check_place(word, pattern)
            self.cursor.take(WORD)
            actions.append(self._actions[word]())
        return tuple(actions)

    def _check_place(self, action: str, pattern: Pattern) -> None:
        if pattern.kind != "exit" and action != "stop":
            raise self.cursor.wrong(
                f"`{action}` acts at a VM exit, and this line expects {pattern.title()}",
                fix="write it at a line that begins with `exit`",
            )
        if action == "answer" and pattern.label != ExitReason.IO_INSTRUCTION.name:
            raise self.cursor.wrong(
                "`answer` needs a port that is being read", fix="write it at a line `exit IO_INSTRUCTION …`"
            )

    def _inject(self) -> Inject:
        given = self._arguments({"vector": MAX_VECTOR, "error": MAX_32}, required=("vector",))
        return Inject(given["vector"], given.get("error"))

    def _protect(self) -> Protect:
        given = self._arguments({"gpa": MAX_64, "length": MAX_64}, required=("gpa", "length"))
        self._argument_name("access")
        access = self.cursor.take(_ACCESS)
        if access is None:
            raise self.cursor.expected("an access", fix="write three characters, like r-x, rw- or --x")
        return Protect(given["gpa"], given["length"], access)

    def _approve(self) -> Approve:
        given = self._arguments({"gpa": MAX_64, "length": MAX_64}, required=("gpa", "length"))
        return Approve(given["gpa"], given["length"])

    def _write(self) -> Write:
        given = self._arguments({"gpa": MAX_64}, required=("gpa",))
        self._argument_name("bytes")
        self.cursor.skip()
        start = self.cursor.position
        data = self.values.hex_bytes()
        return Write(given["gpa"], data, self.cursor.since(start))

    def _arguments(self, limits: Mapping[str, int], *, required: tuple[str, ...]) -> dict[str, Argument]:
        given: dict[str, Argument] = {}
        while (name := self.cursor.sees(WORD) or "") in limits and name not in given:
            self._argument_name(name)
            given[name] = self._argument(name, limits[name])
        for name in required:
            if name not in given:
                raise self.cursor.expected(f"`{name}=`", fix=f"this action needs {name}=")
        return given

    def _argument_name(self, name: str) -> None:
        if not self.cursor.take_word(name):
            raise self.cursor.expected(f"`{name}=`", fix=f"this action needs {name}=")
        if not self.cursor.take_text("="):
            raise self.cursor.expected(f"`=` after `{name}`", fix=f"write {name}=…")

    def _argument(self, name: str, limit: int) -> Argument:
        self.cursor.skip()
        start = self.cursor.position
        value = self.values.number()
        if isinstance(value, Literal) and not 0 <= value.value <= limit:
            raise self.cursor.wrong(
                f"`{self.cursor.since(start)}` is out of range for {name}", fix=f"use 0..{limit:#x}"
            )
        return Argument(name, value, printable(self.cursor.since(start)), limit)
