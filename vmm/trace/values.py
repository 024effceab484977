"""The values of a script: numbers, symbols, captures, sums of them, words, bytes and lists."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Final

from attrs import define, field

from vmm.trace.cursor import Cursor, did_you_mean, printable
from vmm.trace.fields import FieldType
from vmm.trace.syntax import ARITHMETIC, Captured, Expr, Literal, OwnField, Several, Sum

if TYPE_CHECKING:
    from collections.abc import Mapping

_NUMBER: Final = re.compile(r"\d\w*", re.ASCII)
_LITERAL: Final = re.compile(r"0[xX][0-9a-fA-F_]+|0[bB][01_]+|[0-9][0-9_]*")
_SYMBOL: Final = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)
_CAPTURE: Final = re.compile(r"\$[A-Za-z_]\w*", re.ASCII)
_OWN_FIELD: Final = re.compile(r"\.[A-Za-z_]\w*", re.ASCII)
_SIGN: Final = re.compile(r"[+&|]|-(?!>)")
_BARE_TEXT: Final = re.compile(r"[\w.]+(?:-\w+)*", re.ASCII)
_STRING: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"')
QUOTE: Final = re.compile('"')
_BRACKET: Final = re.compile(r"\[")
_ESCAPE: Final = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)")
_HEX_GROUP: Final = re.compile(r"[0-9a-fA-F]+(?!\w)", re.ASCII)
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}

#: What stands after a field's name.
OPERATOR: Final = re.compile(r"!=|<=|>=|=|<|>|(?:has|lacks|in|starts|as)\b", re.ASCII)
#: A field with its operator.
FIELD_AHEAD: Final = re.compile(rf"\w+[ \t]*(?:{OPERATOR.pattern})", re.ASCII)

MAX_NUMBER: Final = 0xFFFF_FFFF_FFFF_FFFF
_MAX_DEPTH = 16
_MAX_TERMS = 64

_NUMBER_FIX = "write a number (12, 0xc), a symbol of the image, a capture ($name) or a sum of those"


@define
class Values:
    """Parses values at a cursor. ``captures`` has the type of every name captured so far."""

    cursor: Cursor
    symbols: Mapping[str, int]
    captures: dict[str, FieldType] = field(factory=dict)
    #: Names that a watch uses; it may use names that a later line captures.
    postponed: dict[str, tuple[FieldType, int]] = field(factory=dict)
    may_postpone: bool = False
    #: The fields of the record that the line at hand describes.
    fields: Mapping[str, FieldType] = field(factory=dict)
    _depth: int = 0

    def of_type(self, kind: FieldType) -> Expr:
        """The value that a field of this type is compared with."""
        if self.cursor.take_word("none"):
            return Literal(None)
        match kind:
            case FieldType.NUMBER:
                return self.number()
            case FieldType.TEXT:
                return self.text()
            case FieldType.BYTES:
                return self.hex_bytes()
            case FieldType.LIST:
                return self._list()
            case FieldType.ANY:
                return self._anything()

    def number(self) -> Expr:
        """A number or a sum: ``0x10``, ``patch_site+1``, ``($page & 0xfff) | 8``."""
        first, rest = self._term(), []
        while sign := self.cursor.take(_SIGN):
            rest.append((sign, self._term()))
            if len(rest) > _MAX_TERMS:
                raise self.cursor.wrong("this sum is too long", fix=f"use at most {_MAX_TERMS} terms")
        if not rest:
            return first
        if len({sign in "+-" for sign, _ in rest}) > 1 or len({sign for sign, _ in rest} & {"&", "|"}) > 1:
            mixed = " and ".join(f"`{sign}`" for sign in ARITHMETIC if any(sign == used for used, _ in rest))
            raise self.cursor.wrong(
                f"{mixed} are mixed in one sum", fix="put parentheses around the part that comes first"
            )
        total = Sum(first, tuple(rest))
        constant = all(isinstance(term, Literal) for term in (first, *(term for _, term in rest)))
        return Literal(total.evaluate({}, {})) if constant else total

    def text(self) -> Expr:
        """A word or a string in quotes."""
        if self.cursor.sees(_CAPTURE):
            return self._capture(FieldType.TEXT)
        if self.cursor.sees(_OWN_FIELD):
            return self._own_field(FieldType.TEXT)
        word = self.string() if self.cursor.sees(QUOTE) else self.cursor.take(_BARE_TEXT)
        if word is None:
            raise self.cursor.expected("a word", fix='write a word, or any text in quotes: "two words"')
        return Literal(word)

    def hex_bytes(self) -> Expr:
        """Bytes as hexadecimal digits: ``b802``, ``b8 02``, ``"b8 02"``."""
        if self.cursor.sees(_CAPTURE):
            return self._capture(FieldType.BYTES)
        if self.cursor.sees(_OWN_FIELD):
            return self._own_field(FieldType.BYTES)
        if self.cursor.sees(QUOTE):
            return Literal(self._whole_bytes("".join(self.string().split())))
        digits = ""
        while (group := self.cursor.sees(_HEX_GROUP)) and not (digits and self.cursor.sees(FIELD_AHEAD)):
            digits += self._whole_bytes(group)
            self.cursor.take(_HEX_GROUP)
        if not digits:
            raise self.cursor.expected("bytes", fix="write hexadecimal digits, two for each byte: b8 02")
        return Literal(digits)

    def numbers(self) -> Expr:
        """What a list is searched for: one number or a list of them."""
        if self.cursor.sees(_CAPTURE):
            return self._capture(FieldType.NUMBER, FieldType.LIST)
        return self._list() if self.cursor.sees(_BRACKET) else self.number()

    def _list(self) -> Expr:
        if self.cursor.sees(_CAPTURE):
            return self._capture(FieldType.LIST)
        if self.cursor.sees(_OWN_FIELD):
            return self._own_field(FieldType.LIST)
        if not self.cursor.take_text("["):
            raise self.cursor.expected("`[`", fix="write a list as [1, 2], an empty one as []")
        parts: list[Expr] = []
        while not self.cursor.take_text("]"):
            if parts and not self.cursor.take_text(","):
                raise self.cursor.expected("`,` or `]`", fix="write a list as [1, 2], an empty one as []")
            parts.append(self.number())
        return Several(tuple(parts))

    def string(self) -> str:
        r"""A string in double quotes, with \n, \t, \r, \", \\, \xNN, \uNNNN and \UNNNNNNNN."""
        quoted = self.cursor.take(_STRING)
        if quoted is None:
            fix = 'write the text between two double quotes on one line: "ok\\n"'
            raise self.cursor.expected("a text in double quotes", fix=fix)
        return _ESCAPE.sub(self._unescaped, quoted[1:-1])

    def _unescaped(self, found: re.Match[str]) -> str:
        code = found.group(1)
        if code in _ESCAPES:
            return _ESCAPES[code]
        if len(code) > 1 and int(code[1:], 16) <= sys.maxunicode:
            return chr(int(code[1:], 16))
        raise self.cursor.wrong(
            f"a text has the unknown escape `{printable(found.group())}`",
            fix='use \\n, \\t, \\r, \\", \\\\, \\xNN or \\uNNNN',
        )

    def _anything(self) -> Expr:
        if self.cursor.sees(QUOTE):
            return Literal(self.string())
        if self.cursor.sees(_CAPTURE):
            return self._capture(FieldType.ANY)
        return self.numbers()

    def _whole_bytes(self, digits: str) -> str:
        if len(digits) % 2 or not re.fullmatch("[0-9a-fA-F]*", digits):
            raise self.cursor.wrong(
                f"`{printable(digits[:40])}` is not a row of whole bytes",
                fix="write two hexadecimal digits for each byte: 0f, not f",
            )
        return digits.lower()

    def _term(self) -> Expr:
        if self.cursor.sees(_NUMBER):
            return Literal(self._plain_number())
        if self.cursor.sees(_CAPTURE):
            return self._capture(FieldType.NUMBER)
        if self.cursor.sees(_OWN_FIELD):
            return self._own_field(FieldType.NUMBER)
        if self.cursor.take_text("("):
            return self._in_parentheses()
        name = self.string() if self.cursor.sees(QUOTE) else self.cursor.sees(_SYMBOL)
        if name is None:
            raise self.cursor.expected("a number", fix=_NUMBER_FIX)
        if name not in self.symbols:
            fix = did_you_mean(name, self.symbols, otherwise=_NUMBER_FIX)
            raise self.cursor.wrong(f"the image has no symbol `{printable(name[:80])}`", fix=fix)
        self.cursor.take(_SYMBOL)
        return Literal(self.symbols[name])

    def _in_parentheses(self) -> Expr:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self.cursor.wrong(
                "parentheses are nested too deeply", fix=f"use at most {_MAX_DEPTH} levels"
            )
        inner = self.number()
        if not self.cursor.take_text(")"):
            raise self.cursor.expected("`)`", fix="close the parenthesis")
        self._depth -= 1
        return inner

    def _plain_number(self) -> int:
        digits = self.cursor.sees(_NUMBER) or ""
        if not _LITERAL.fullmatch(digits):
            raise self.cursor.expected("a number", fix="write it as 12, 0xc or 0b1100")
        digits = digits.replace("_", "")
        value = int(digits, 0 if digits[1:2] in {*"xXbB"} else 10) if len(digits) <= 66 else MAX_NUMBER + 1
        if value > MAX_NUMBER:
            raise self.cursor.wrong(f"`{digits[:40]}` is too large", fix="numbers have at most 64 bits")
        self.cursor.take(_NUMBER)
        return value

    def _capture(self, *wanted: FieldType) -> Expr:
        start = self.cursor.line
        name = (self.cursor.take(_CAPTURE) or "")[1:]
        if name in self.captures:
            self._check_capture(name, wanted, start)
        elif self.may_postpone:
            self.postponed[name] = (wanted[0], start)
        else:
            otherwise = "capture it in an earlier line: `gpa as $page`"
            fix = did_you_mean(name, self.captures, otherwise=otherwise)
            raise self.cursor.wrong(f"nothing before this line captures `${name}`", fix=fix, line=start)
        return Captured(name)

    def _check_capture(self, name: str, wanted: tuple[FieldType, ...], line: int) -> None:
        held = self.captures[name]
        if FieldType.ANY not in {held, *wanted} and held not in wanted:
            raise self.cursor.wrong(
                f"`${name}` holds {held.value}, and {wanted[0].value} is needed here",
                fix="use a capture of a field of the same type",
                line=line,
            )

    def check_postponed(self) -> None:
        """Refuse names that watches use and no line captures."""
        for name, (wanted, line) in self.postponed.items():
            if name not in self.captures:
                fix = did_you_mean(name, self.captures, otherwise="capture it in a line: `gpa as $page`")
                raise self.cursor.wrong(f"nothing in this script captures `${name}`", fix=fix, line=line)
            self._check_capture(name, (wanted,), line)

    def _own_field(self, wanted: FieldType) -> Expr:
        name = (self.cursor.sees(_OWN_FIELD) or "")[1:]
        if name not in self.fields:
            fix = did_you_mean(name, self.fields, otherwise=f"the fields here are {', '.join(self.fields)}")
            raise self.cursor.wrong(f"this record has no field `.{name}`", fix=fix)
        if FieldType.ANY not in {wanted, self.fields[name]} and self.fields[name] != wanted:
            raise self.cursor.wrong(
                f"`.{name}` holds {self.fields[name].value}, and {wanted.value} is needed here",
                fix="use a field of the same type",
            )
        self.cursor.take(_OWN_FIELD)
        return OwnField(name)
