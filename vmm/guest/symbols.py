"""Names for addresses, and addresses for names."""

from __future__ import annotations

import enum
from bisect import bisect_right
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.errors import ImageError
from vmm.guest.fields import U64_MAX
from vmm.guest.files import one_line, read_file, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

#: How many symbols an image may have, and how much of a name is kept.
SYMBOLS_LIMIT: Final = 1 << 18
NAME_LIMIT: Final = 255
_FILE_LIMIT: Final = 32 << 20
#: The letters by which nm says that a symbol lies in a section of data.
_DATA: Final = frozenset("bBdDrR")
_FIX: Final = "write lines as nm does: an address in hexadecimal, a type letter, a name"


class Rank(enum.IntEnum):
    """Which of several symbols at one address, or of one name, is meant: the lowest."""

    GLOBAL = 0
    LOCAL = 1
    #: What linkers define by themselves (``_end``, ``__bss_start``).
    MARK = 2
    #: A number with a name, not a place: found by name only.
    CONSTANT = 3


@frozen(slots=True)
class Symbol:
    """A name of a linear address; ``is_data`` if the image says that no code is there."""

    name: str
    address: int
    rank: Rank = Rank.GLOBAL
    is_data: bool = False


class Symbols:
    """The symbols of one image. ``extents`` are the linear (start, end) ranges that the image occupies.

    An address belongs to the nearest symbol at or below it inside the same extent; a symbol outside of all
    extents names its own address only.
    """

    def __init__(self, symbols: Iterable[Symbol] = (), extents: Sequence[tuple[int, int]] = ()) -> None:
        ranked = sorted(symbols, key=lambda symbol: symbol.rank)
        self._addresses: dict[str, int] = {}
        at: dict[int, Symbol] = {}
        for symbol in ranked:
            self._addresses.setdefault(symbol.name, symbol.address)
            if symbol.rank is not Rank.CONSTANT:
                at.setdefault(symbol.address, symbol)
        self._places = sorted(at)
        self._at = at
        self._extents = sorted(extents)
        self._starts = [start for start, _ in self._extents]

    def __len__(self) -> int:
        return len(self._addresses)

    def __iter__(self) -> Iterator[str]:
        return iter(self._addresses)

    def address(self, name: str) -> int | None:
        """The linear address (or the constant) that ``name`` stands for."""
        return self._addresses.get(name)

    def lookup(self, address: int) -> tuple[str, int] | None:
        """The symbol that ``address`` belongs to, and how many bytes past it the address is."""
        symbol = self._owner(address)
        return None if symbol is None else (symbol.name, address - symbol.address)

    def is_data(self, address: int) -> bool:
        """Whether the symbol that ``address`` belongs to names data."""
        symbol = self._owner(address)
        return symbol is not None and symbol.is_data

    def _owner(self, address: int) -> Symbol | None:
        index = bisect_right(self._places, address) - 1
        if index < 0:
            return None
        place = self._places[index]
        if address != place and address >= self._end_of_extent(place):
            return None
        return self._at[place]

    def label(self, address: int) -> str | None:
        """``lookup`` as text: ``name`` or ``name+0x1c``."""
        found = self.lookup(address)
        if found is None:
            return None
        name, offset = found
        return f"{name}+{offset:#x}" if offset else name

    def _end_of_extent(self, address: int) -> int:
        index = bisect_right(self._starts, address) - 1
        end = self._extents[index][1] if index >= 0 else 0
        return end if end > address else address + 1


def clean_name(raw: bytes) -> str:
    """A symbol's name as text that is safe to print."""
    return one_line(raw[:NAME_LIMIT].decode(errors="replace"))


def read_symbols_file(path: Path, extents: Sequence[tuple[int, int]]) -> Symbols:
    """The symbols of a flat image, from the output of ``nm`` or lines ``address name``; raises ImageError.

    Undefined symbols, empty lines and ``#`` comments are passed over.
    """
    data = read_file(path, _FILE_LIMIT, error=ImageError, fix="correct [image].symbols in the manifest")
    return Symbols(parse_symbols(data, one_line(path)), extents)


def parse_symbols(data: bytes, name: str, *, fix: str = _FIX) -> list[Symbol]:
    """The symbols of a file's lines, in their order; raises ImageError, which names the file and advises ``fix``.

    Lines are those of ``nm``, System.map or /proc/kallsyms, or have an address and a name.
    """
    found: list[Symbol] = []
    for number, line in enumerate(data.splitlines(), start=1):
        words = line.split(b"#")[0].split()
        if not words or (len(words) == 2 and words[0] in (b"U", b"w", b"v")):
            continue
        if len(words) == 4 and words[3].startswith(b"["):  # /proc/kallsyms names the module
            words.pop()
        if len(found) == SYMBOLS_LIMIT:
            raise ImageError(f"more than {SYMBOLS_LIMIT} symbols", where=f"{name}:{number}", fix="give fewer")
        found.append(_symbol(words, name, number, fix))
    return found


def _symbol(words: list[bytes], name: str, number: int, fix: str) -> Symbol:
    where = f"{name}:{number}"
    kind = words[1].decode(errors="replace") if len(words) == 3 else "T"
    if len(words) not in (2, 3) or len(kind) != 1:
        raise ImageError("not a symbol", where=where, fix=fix)
    try:
        address = int(words[0], 16)
    except ValueError:
        shown_address = shown(words[0].decode(errors="replace"))
        raise ImageError(f"{shown_address} is not an address", where=where, fix=fix) from None
    if not 0 <= address <= U64_MAX:
        raise ImageError("the address has more than 64 bits", where=where, fix=fix)
    rank = Rank.CONSTANT if kind in "aA" else Rank.LOCAL if kind.islower() else Rank.GLOBAL
    return Symbol(clean_name(words[-1]), address, rank, is_data=kind in _DATA)
