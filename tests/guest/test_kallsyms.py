"""The kernel's symbol table in memory: built as the kernel's own tool builds it, found wherever it lies."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.guest.kallsyms import find_kallsyms, to_text
from vmm.guest.symbols import Rank, read_symbols_file

BASE = 0xFFFFFFFF8D000000
#: Tokens are single characters, and for the bytes that no name has, pairs.
TOKENS = [bytes([code]) if chr(code).isalnum() or code == ord("_") else b"x%02x" % code for code in range(256)]


def aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def table(symbols: list[tuple[bytes, int]], *, sequence: bytes = b"", tokens: list[bytes] = TOKENS) -> bytes:
    """A table of (type letter and name, address); addresses below 2^31 are absolute values."""
    offsets = [value if value < 1 << 31 else BASE - 1 - value for _, value in symbols]
    names, marks = bytearray(), []
    for number, (name, _) in enumerate(symbols):
        if number % 256 == 0:
            marks.append(len(names))
        names += bytes([len(name)]) if len(name) < 0x80 else bytes([0x80 | len(name) & 0x7F, len(name) >> 7])
        names += name
    places = [sum(len(token) + 1 for token in tokens[:number]) for number in range(256)]
    return b"".join(
        aligned(part)
        for part in (
            struct.pack(f"<{len(offsets)}i", *offsets),
            struct.pack("<Q", BASE),
            struct.pack("<I", len(symbols)),
            bytes(names),
            struct.pack(f"<{len(marks)}I", *marks),
            sequence,
            b"".join(token + b"\0" for token in tokens),
            struct.pack("<256H", *places),
        )
    )


def some(count: int) -> list[tuple[bytes, int]]:
    return [(b"%cf%d" % (b"tTdA"[n % 4], n), n if n % 4 == 3 else BASE + 16 * n) for n in range(count)]


def found(memory: bytes) -> dict[str, int]:
    return {symbol.name: symbol.address for symbol in find_kallsyms(memory)}


@pytest.mark.parametrize("count", [1, 255, 256, 257, 2000])
@pytest.mark.parametrize("sequence", [b"", b"\x39\x8d\x01" * 300], ids=["without", "with"])
def test_all_symbols_are_found(count, sequence):
    symbols = some(count)
    memory = bytes(4096) + table(symbols, sequence=sequence) + bytes(4096)
    assert found(memory) == {name[1:].decode(): address for name, address in symbols}


def test_long_names_have_two_bytes_of_length():
    long = b"t" + b"n" * 200
    assert found(bytes(64) + table([*some(5), (long, BASE)]) + bytes(64))["n" * 200] == BASE


def test_types_become_ranks():
    ranks = {symbol.name: symbol.rank for symbol in find_kallsyms(bytes(64) + table(some(4)) + bytes(64))}
    assert ranks == {"f0": Rank.LOCAL, "f1": Rank.GLOBAL, "f2": Rank.LOCAL, "f3": Rank.CONSTANT}


def test_the_text_is_read_back(tmp_path):
    symbols = find_kallsyms(bytes(64) + table(some(20)) + bytes(64))
    (tmp_path / "kallsyms").write_text(to_text(symbols))
    read = read_symbols_file(tmp_path / "kallsyms", [])
    assert all(read.address(symbol.name) == symbol.address for symbol in symbols)


def test_a_table_that_does_not_fit_together_is_none():
    whole = bytes(64) + table(some(600)) + bytes(64)
    good = found(whole)
    for place in range(64, len(whole) - 64, 97):
        damaged = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
        assert len(found(damaged)) in (0, len(good)), hex(place)


def test_there_may_be_no_table():
    assert find_kallsyms(bytes(1 << 16)) == []
    assert find_kallsyms(b"".join(b"%d\0" % digit for digit in range(10)) * 100) == []


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 12000), st.binary(min_size=1, max_size=16)), max_size=20), st.integers(0, 9000)
)
def test_whatever_a_guest_writes_there_is_no_trouble(patches, cut):
    memory = bytearray(bytes(64) + table(some(300)) + bytes(64))
    for place, data in patches:
        memory[place : place + len(data)] = data[: max(0, len(memory) - place)]
    find_kallsyms(bytes(memory[cut:]))
