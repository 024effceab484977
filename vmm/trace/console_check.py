"""Console output held against one ``console`` line, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.trace.wording import quoted

if TYPE_CHECKING:
    from vmm.trace.syntax import ConsoleCheck


class ConsoleState:
    """Keeps of the output only what a match that spans two pieces needs."""

    def __init__(self, check: ConsoleCheck) -> None:
        self.check = check
        self._found = check.operator == "contains" and not check.text
        self._tail = ""
        self._length = 0
        self._differs = False

    def breaks(self, text: str) -> bool:
        """Take a piece; whether the line can certainly not hold any more."""
        if self.check.operator == "is":
            expected = self.check.text[self._length : self._length + len(text)]
            self._differs = self._differs or text != expected
            self._length += len(text)
            return self._differs
        if not self._found:
            seen = self._tail + text
            self._found = self.check.text in seen
            self._tail = seen[max(0, len(seen) - len(self.check.text) + 1) :]
        return self._found and self.check.operator == "lacks"

    @property
    def satisfied(self) -> bool:
        """Whether the line holds if no more output comes."""
        if self.check.operator == "is":
            return not self._differs and self._length == len(self.check.text)
        return self._found == (self.check.operator == "contains")

    def complaint(self) -> str:
        """What is wrong when it does not hold."""
        wanted = quoted(self.check.text)
        if self.check.operator == "contains":
            return f"the console output does not contain {wanted}"
        if self.check.operator == "lacks":
            return f"the console output contains {wanted}"
        return f"the console output is not {wanted}"
