"""The symbol table that a Linux kernel carries in its own data, found in guest memory.

Kernels come without symbols (Debian's System.map is empty), and address-space randomisation moves them; but a kernel
with CONFIG_KALLSYMS knows its own names and, once it runs, where they are. Layout as scripts/kallsyms.c writes it up to
Linux 6.3, each part aligned to 8 bytes::

    kallsyms_offsets        int32 a symbol: >= 0 an absolute value, < 0 the address is relative_base - 1 - offset
    kallsyms_relative_base  uint64
    kallsyms_num_syms       uint32
    kallsyms_names          a symbol: length (one byte, or two: 7 bits each, low ones first), then that many tokens
    kallsyms_markers        uint32 each 256 symbols: where in the names the next one begins
    (kallsyms_seqs_of_names of some releases)
    kallsyms_token_table    256 strings, of which the digits stand for themselves
    kallsyms_token_index    uint16 a token: where in the table it begins

The guest may have written anything there: what does not fit together is not found.
"""

from __future__ import annotations

import mmap
import struct
from typing import Final

from attrs import frozen

from vmm.guest.symbols import SYMBOLS_LIMIT, Rank, Symbol, clean_name

_DIGITS: Final = b"".join(b"%d\0" % digit for digit in range(10))
_FIRST_DIGIT: Final = ord("0")
_TOKENS: Final = 256
_LONGEST_TOKEN: Final = 64
_GROUP: Final = 256
#: How far before the tokens the names may begin, in bytes.
_LONGEST_NAMES: Final = 16 << 20
#: The upper half of the base, which is an address of the kernel's image.
_UPPER_HALF: Final = b"\xff\xff\xff\xff"
_MASK: Final = (1 << 64) - 1


def find_kallsyms(memory: mmap.mmap | bytes) -> list[Symbol]:
    """The symbols of the kernel in ``memory``, by address; none if there is no table of the layout that is known."""
    place = memory.find(_DIGITS)
    while place >= 0:
        table = _Table.around(memory, place)
        if table is not None:
            return sorted(table.symbols(memory), key=lambda symbol: symbol.address)
        place = memory.find(_DIGITS, place + 1)
    return []


def to_text(symbols: list[Symbol]) -> str:
    """As ``nm`` writes symbols."""
    letters = {Rank.GLOBAL: "T", Rank.LOCAL: "t", Rank.CONSTANT: "A", Rank.MARK: "T"}
    return "".join(f"{symbol.address:016x} {letters[symbol.rank]} {symbol.name}\n" for symbol in symbols)


@frozen(slots=True)
class _Table:
    """Where the parts are, and what they say of each other."""

    tokens: tuple[bytes, ...]
    names: int
    count: int
    offsets: int
    base: int

    @classmethod
    def around(cls, memory: mmap.mmap | bytes, digits: int) -> _Table | None:
        """The table whose token of the digit 0 is at an offset; None if what is there is none."""
        start = digits
        for _ in range(_FIRST_DIGIT):
            previous = memory.rfind(b"\0", max(0, start - 1 - _LONGEST_TOKEN), start - 1)
            if previous < 0:
                return None
            start = previous + 1
        tokens = _tokens(memory, start)
        return None if tokens is None else cls._by_names(memory, tokens, start)

    @classmethod
    def _by_names(cls, memory: mmap.mmap | bytes, tokens: tuple[bytes, ...], end: int) -> _Table | None:
        """The names begin behind the base and their number, and the markers behind them know their way."""
        place = end
        while (place := memory.rfind(_UPPER_HALF, max(12, end - _LONGEST_NAMES), place + 3)) >= 0:
            if place % 8 != 4:
                continue
            names = place + 12
            count, padding = struct.unpack_from("<II", memory, names - 8)
            offsets = place - 4 - (4 * count + 7 & -8)
            if padding or not 0 < count <= SYMBOLS_LIMIT or offsets < 0:
                continue
            if _markers_agree(memory, names, count, end):
                (base,) = struct.unpack_from("<Q", memory, place - 4)
                return cls(tokens, names, count, offsets, base)
        return None

    def symbols(self, memory: mmap.mmap | bytes) -> list[Symbol]:
        """All of them, in the order of the table."""
        found = []
        place = self.names
        for offset in struct.unpack_from(f"<{self.count}i", memory, self.offsets):
            length, place = _length(memory, place)
            text = b"".join([self.tokens[token] for token in memory[place : place + length]])
            place += length
            address = offset if offset >= 0 else self.base - 1 - offset & _MASK
            rank = Rank.CONSTANT if offset >= 0 else Rank.LOCAL if text[:1].islower() else Rank.GLOBAL
            found.append(Symbol(clean_name(text[1:]), address, rank))
        return found


def _tokens(memory: mmap.mmap | bytes, start: int) -> tuple[bytes, ...] | None:
    """The 256 tokens from an offset on, if the index behind them agrees."""
    tokens, places, place = [], [], start
    for _ in range(_TOKENS):
        end = memory.find(b"\0", place, place + _LONGEST_TOKEN)
        if end <= place:
            return None
        tokens.append(bytes(memory[place:end]))
        places.append(place - start)
        place = end + 1
    index = place + 7 & -8
    if index + 2 * _TOKENS > len(memory):
        return None
    return tuple(tokens) if list(struct.unpack_from(f"<{_TOKENS}H", memory, index)) == places else None


def _markers_agree(memory: mmap.mmap | bytes, names: int, count: int, end: int) -> bool:
    """Whether so many names from an offset on end before ``end``, and what follows them are their markers."""
    places, place = [], names
    for number in range(count):
        if place >= end:
            return False
        if number % _GROUP == 0:
            places.append(place - names)
        length, place = _length(memory, place)
        place += length
    markers = place + 7 & -8
    if markers + 4 * len(places) > end:
        return False
    return list(struct.unpack_from(f"<{len(places)}I", memory, markers)) == places


def _length(memory: mmap.mmap | bytes, place: int) -> tuple[int, int]:
    """The length of the name at an offset, and where its tokens begin."""
    length = memory[place]
    if length & 0x80:
        return length & 0x7F | memory[place + 1] << 7, place + 2
    return length, place + 1
