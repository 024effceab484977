"""A place in a script's text: skips what means nothing, takes what is asked for, and words the errors."""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from itertools import islice
from typing import TYPE_CHECKING, Final

from vmm.errors import ScriptError

if TYPE_CHECKING:
    from collections.abc import Iterable

_BLANK: Final = re.compile(r"[ \t\r]*(?:#[^\n]*)?")
_CONTINUED: Final = re.compile(r"(?:\n[ \t\r]*(?:#[^\n]*)?)++(?=->|(?:and|because)\b)", re.ASCII)
_SEPARATORS: Final = re.compile(r"(?:[ \t\r\n;]|#[^\n]*)*")
_TOKEN: Final = re.compile(r'"[^"\n]*"?|\$?\w[\w.]*|[!<>=]=|->|\.\.|.', re.ASCII)

WORD: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)

_SHOWN_TOKEN = 40
_CANDIDATES = 20_000


class Cursor:
    """Reads ``text`` from the left. A line that begins with ``->``, ``and`` or ``because`` continues the one before."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self.position = 0
        self._starts = [0, *(found.end() for found in re.finditer("\n", text))]

    @property
    def line(self) -> int:
        """The line of the next token, counted from 1."""
        self.skip()
        return bisect_right(self._starts, self.position)

    def skip(self) -> None:
        """Go to the next token of this statement, or to its end."""
        while blank := _BLANK.match(self.text, self.position):
            self.position = blank.end()
            more = _CONTINUED.match(self.text, self.position)
            if more is None:
                return
            self.position = more.end()

    def skip_separators(self) -> None:
        """Go to the next statement: over line ends, semicolons and comments."""
        found = _SEPARATORS.match(self.text, self.position)
        self.position = found.end() if found else self.position

    def sees(self, pattern: re.Pattern[str]) -> str | None:
        """The text that ``pattern`` matches here, if it does; the cursor stays."""
        self.skip()
        found = pattern.match(self.text, self.position)
        return found.group() if found else None

    def take(self, pattern: re.Pattern[str]) -> str | None:
        """Like :meth:`sees`, and go past it."""
        found = self.sees(pattern)
        if found is not None:
            self.position += len(found)
        return found

    def sees_word(self, *words: str) -> bool:
        """Whether the next token is one of these words."""
        return self.sees(WORD) in words

    def take_word(self, word: str) -> bool:
        """Go past ``word`` if it is next."""
        if self.sees(WORD) != word:
            return False
        self.position += len(word)
        return True

    def take_text(self, text: str) -> bool:
        """Go past this punctuation if it is next."""
        self.skip()
        if not self.text.startswith(text, self.position):
            return False
        self.position += len(text)
        return True

    def at_statement_end(self) -> bool:
        """Whether nothing of this statement is left."""
        self.skip()
        return self.position >= len(self.text) or self.text[self.position] in "\n;}"

    def since(self, start: int) -> str:
        """The text read since ``start``, in one line."""
        return " ".join(self.text[start : self.position].split())

    def found(self) -> str:
        """The next token, worded for a message."""
        self.skip()
        if self.position >= len(self.text):
            return "the end of the script"
        if self.text[self.position] == "\n":
            return "the end of the line"
        token = _TOKEN.match(self.text, self.position)
        shown = token.group() if token else self.text[self.position]
        return f"`{printable(shown[:_SHOWN_TOKEN])}`"

    def expected(self, what: str, *, fix: str) -> ScriptError:
        """The error that the next token is not ``what``."""
        return self.wrong(f"expected {what}, found {self.found()}", fix=fix)

    def wrong(self, what: str, *, fix: str, line: int | None = None) -> ScriptError:
        """An error here, or at ``line``."""
        return ScriptError(what, where=f"{self.file}:{line or self.line}", fix=fix)


def printable(text: str) -> str:
    """The text with everything that could upset a terminal written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str) -> str:
    """A fix that names the known words close to ``word``, or else says ``otherwise``."""
    alike = (name for name in known if abs(len(name) - len(word)) <= max(2, len(word) // 3))
    by_lower = {name.lower(): name for name in islice(alike, _CANDIDATES)}
    close = difflib.get_close_matches(word.lower(), by_lower, n=3)
    if not close:
        return otherwise
    return "did you mean " + " or ".join(f"`{printable(by_lower[name])}`" for name in close) + "?"
