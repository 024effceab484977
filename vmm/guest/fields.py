"""Taking typed values out of one TOML table, with an error that names the key."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Any, Final, TypeVar

from vmm.errors import ManifestError
from vmm.guest.files import one_line, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

T = TypeVar("T", bound=str)

U16_MAX: Final = 0xFFFF
U32_MAX: Final = 0xFFFF_FFFF
U64_MAX: Final = 0xFFFF_FFFF_FFFF_FFFF
PAGE: Final = 4096

_NO_HINTS: Final[Mapping[str, str]] = {}


def is_canonical(address: int) -> bool:
    """Whether bits 63:47 of a 64-bit linear address are all equal (SDM vol. 1, 3.3.7.1)."""
    return address >> 47 in (0, 0x1FFFF)


class Table:
    """One table of a manifest: ``label`` is how messages call it, ``[cpu]`` or ``[paging.map][1]``.

    Every method raises ``ManifestError`` for a value that does not fit. Making a Table of values with a key
    that is not among ``keys`` does so too; ``hints`` gives advice for keys that people try in vain.
    """

    def __init__(
        self,
        values: dict[str, Any],
        label: str,
        origin: str,
        keys: Iterable[str],
        hints: Mapping[str, str] = _NO_HINTS,
    ) -> None:
        self._values = values
        self._label = label
        self.origin = origin
        known = tuple(keys)
        for key in values:
            if key not in known:
                raise self.error(key, "unknown key", hints.get(key) or _suggestion(key, known))

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def is_string(self, key: str) -> bool:
        """Whether ``key`` is there and holds a string."""
        return isinstance(self._values.get(key), str)

    def error(self, key: str, what: str, fix: str) -> ManifestError:
        """The error to raise about ``key`` of this table (about the table itself if ``key`` is empty)."""
        place = ".".join(part for part in (self._label, _key(key)) if part)
        return ManifestError(what, where=f"{self.origin}: {place}", fix=fix)

    def integer(self, key: str, low: int, high: int, *, default: int | None = None, multiple: int = 1) -> int:
        """An integer of ``low`` to ``high``, a multiple of ``multiple``; required without a default."""
        if default is not None and key not in self:
            return default
        value = self._required(key, f"an integer from {low:#x} to {high:#x}")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"{shown(value)} is not an integer", "write a number such as 0x1000")
        if not low <= value <= high:
            fix = f"give a value from {low:#x} to {high:#x}"
            raise self.error(key, f"{shown(value)} is out of range", fix)
        if value % multiple:
            fix = f"give a multiple of {multiple:#x}, such as {value - value % multiple:#x}"
            raise self.error(key, f"{shown(value)} is not aligned", fix)
        return value

    def maybe_integer(self, key: str, low: int, high: int, *, multiple: int = 1) -> int | None:
        """As ``integer``; None if the key is absent."""
        return self.integer(key, low, high, multiple=multiple) if key in self else None

    def integers(self, key: str, high: int, most: int) -> tuple[int, ...]:
        """An array of integers from 0 to ``high``, at most ``most`` of them; none if the key is absent."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= high for item in value):
            raise self.error(key, f"{shown(value)} is not an array of integers from 0 to {high:#x}", "give such as [0]")
        if len(value) > most:
            raise self.error(key, f"{len(value)} entries are too many", f"give at most {most}")
        return tuple(value)

    def seconds(self, key: str, high: float, *, default: float) -> float:
        """A number, whole or not, above zero and at most ``high``."""
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"{shown(value)} is not a number", "write seconds, such as 30 or 0.5")
        if math.isnan(value) or not 0 < value <= high:
            fix = f"give more than 0 and at most {high:g} seconds"
            raise self.error(key, f"{shown(value)} is out of range", fix)
        return float(value)

    def string(self, key: str, *, longest: int, default: str | None = None) -> str:
        """A string of one printable line, 1 to ``longest`` characters; required without a default."""
        if default is not None and key not in self:
            return default
        value = self._required(key, "a string")
        if not isinstance(value, str):
            raise self.error(key, f"{shown(value)} is not a string", "put it in quotes")
        if not 0 < len(value) <= longest or not value.isprintable():
            fix = f"give 1 to {longest} printable characters on one line"
            raise self.error(key, f"{shown(value)} is not usable text", fix)
        return value

    def choice(self, key: str, options: tuple[T, ...], *, default: T | None = None) -> T:
        """One of ``options``; required without a default."""
        if default is not None and key not in self:
            return default
        fix = "give " + " or ".join(f'"{option}"' for option in options)
        value = self._required(key, " or ".join(f'"{option}"' for option in options))
        for option in options:
            if option == value:
                return option
        raise self.error(key, f"{shown(value)} is not one of its values", fix)

    def boolean(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"{shown(value)} is not a boolean", "write true or false")
        return value

    def pairs(self, key: str, high: int, most: int) -> tuple[tuple[int, int], ...]:
        """An array of pairs of integers from 0 to ``high``, at most ``most`` of them; required."""
        fix = "give pairs of integers, such as [[20, 57], [45, 100]]"
        value = self._required(key, f"pairs of integers from 0 to {high:#x}")
        if not isinstance(value, list) or not all(_is_pair(item, high) for item in value):
            raise self.error(key, f"{shown(value)} is not an array of pairs from 0 to {high:#x}", fix)
        if len(value) > most:
            raise self.error(key, f"{len(value)} entries are too many", f"give at most {most}")
        return tuple((first, second) for first, second in value)

    def table(self, key: str, keys: Iterable[str], hints: Mapping[str, str] = _NO_HINTS) -> Table:
        """The table under ``key``; an empty one if it is absent."""
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"{shown(value)} is not a table", f"write [{key}] and its keys below")
        label = f"{self._label}.{key}" if self._label else f"[{key}]"
        return Table(value, label, self.origin, keys, hints)

    def tables(self, key: str, label: str, keys: tuple[str, ...], most: int) -> list[Table]:
        """The array of tables under ``key``, in order; each is called ``label[i]``, from 0."""
        value = self._values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            what = f"{shown(value)} is not an array of tables"
            raise self.error(key, what, f"write [{label}] with double brackets above each entry")
        if len(value) > most:
            raise self.error(key, f"{len(value)} entries are too many", f"give at most {most}")
        return [Table(item, f"{label}[{i}]", self.origin, keys) for i, item in enumerate(value)]

    def _required(self, key: str, wanted: str) -> Any:  # noqa: ANN401 - whatever TOML can hold
        if key not in self._values:
            raise self.error(key, "missing", f"give {wanted}")
        return self._values[key]


def _is_pair(value: object, high: int) -> bool:
    return isinstance(value, list) and [type(x) for x in value] == [int, int] and all(0 <= x <= high for x in value)


def _key(key: str) -> str:
    return key if len(key) <= 64 and key.isprintable() else one_line(key[:64])


def _suggestion(key: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(key[:64].lower(), known, n=1)
    if close:
        return f'did you mean "{close[0]}"?'
    return "known here: " + ", ".join(known)
