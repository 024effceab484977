"""What is executed in place of a guest's own code from the start: ``[[hidden]]`` of a manifest."""

from __future__ import annotations

import struct
from typing import Final

from attrs import frozen

from vmm.errors import ManifestError
from vmm.guest.fields import U64_MAX, Table
from vmm.guest.files import shown
from vmm.guest.symbols import Symbols

_TABLES_LIMIT: Final = 64
_BYTES_LIMIT: Final = 4096
#: E9 rel32, a near jump.
_JUMP: Final = struct.Struct("<Bi")


@frozen(slots=True)
class HiddenSpec:
    """``data`` is executed at ``at``, a linear address or a symbol; if it is empty, a jump to ``jump``, likewise.

    ``where`` is how messages call the table.
    """

    at: int | str
    data: bytes
    jump: int | str
    where: str

    def resolve(self, symbols: Symbols) -> tuple[int, bytes]:
        """The linear address, and what is executed there; raises ``ManifestError``."""
        at = self._address("at", self.at, symbols)
        if self.data:
            return at, self.data
        distance = self._address("jump", self.jump, symbols) - (at + _JUMP.size)
        if not -(1 << 31) <= distance < 1 << 31:
            what = f"{shown(self.jump)} is more than 2 GiB away"
            raise ManifestError(what, where=f"{self.where}.jump", fix="jump to a nearer place")
        return at, _JUMP.pack(0xE9, distance)

    def _address(self, key: str, place: int | str, symbols: Symbols) -> int:
        if isinstance(place, int):
            return place
        address = symbols.address(place)
        if address is None:
            fix = "name a symbol of the image, or give a number"
            raise ManifestError(f"the image has no symbol {shown(place)}", where=f"{self.where}.{key}", fix=fix)
        return address


def hidden_of(top: Table, *, mode: str, coherence: str) -> tuple[HiddenSpec, ...]:
    """The manifest's ``[[hidden]]`` tables, in order."""
    return tuple(
        _hidden(table, f"{top.origin}: [hidden][{number}]", mode, coherence)
        for number, table in enumerate(top.tables("hidden", "[hidden]", ("at", "bytes", "jump"), _TABLES_LIMIT))
    )


def _hidden(table: Table, where: str, mode: str, coherence: str) -> HiddenSpec:
    if coherence != "coherent":
        fix = 'remove it, or set coherence = "coherent"'
        raise table.error("", "a weaker coherence model has the fetch side for itself", fix)
    if ("bytes" in table) == ("jump" in table):
        raise table.error("", "needs one of bytes and jump", "give what is to be executed")
    if "jump" in table and mode == "real":
        raise table.error("jump", "real mode has no near jump of 5 bytes", "give bytes")
    return HiddenSpec(_place(table, "at"), _bytes(table), _place(table, "jump") if "jump" in table else 0, where)


def _place(table: Table, key: str) -> int | str:
    return table.string(key, longest=256) if table.is_string(key) else table.integer(key, 0, U64_MAX)


def _bytes(table: Table) -> bytes:
    if "bytes" not in table:
        return b""
    text = table.string("bytes", longest=3 * _BYTES_LIMIT)
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if not 0 < len(data) <= _BYTES_LIMIT:
        fix = f'give 1 to {_BYTES_LIMIT} bytes as hexadecimal digits, such as "b8 2a 00 00 00"'
        raise table.error("bytes", f"{shown(text)} is not usable", fix)
    return data
