"""Tiny guests with page tables of their own: 32-bit paging, one directory, one page table, linear = guest-physical."""

from __future__ import annotations

import struct

import tiny
from attrs import evolve
from tiny import CODE, DATA, PAGE

from vmm.machine import RunOptions
from vmm.records import StaleTranslation

DIRECTORY, TABLE = 0x20000, 0x21000
#: A page to play with: it maps PLACE, and then something else.
PAGE_UNDER_TEST, PLACE, OTHER_PLACE = 0x60000, 0x61000, 0x62000
PRESENT, WRITABLE, USER, GLOBAL = 1, 2, 4, 1 << 8

WAYS = {
    "audited": evolve(tiny.STRICT, tlb="strict"),
    "stepped": RunOptions(single_step=True, check=True, tlb="strict"),
    "one block": RunOptions(capacity=1, tlb="strict"),
    "no traps": RunOptions(traps=False, tlb="strict"),
}

#: Turns paging on.
PAGING = f"mov eax, {DIRECTORY:#x}; mov cr3, eax; mov eax, cr0; or eax, 0x80010000; mov cr0, eax\n"


def entry(linear: int) -> int:
    """The GPA of the page-table entry of a linear page."""
    return TABLE + (linear >> 12) * 4


def build(
    source: str, *, options: RunOptions = WAYS["audited"], flags: int = WRITABLE, extra=None, tables=None, **rest
) -> tiny.Tiny:
    """``source`` runs with paging on, and ends the run; the page under test has these flags.

    ``extra`` is more code, ``tables`` more data, by GPA.
    """
    table = [page * PAGE | PRESENT | WRITABLE for page in range(256)]
    table += [0] * 256 + [page * PAGE | PRESENT | WRITABLE for page in range(512, 528)]  # the GDT and its like
    table[PAGE_UNDER_TEST >> 12] = PLACE | PRESENT | flags
    parts = {
        CODE: PAGING + source + "\nmov al, 0\n" + tiny.END,
        DIRECTORY: struct.pack("<I", TABLE | PRESENT | WRITABLE | USER),
        TABLE: struct.pack("<528I", *table),
        PLACE: struct.pack("<I", 0x11111111),
        OTHER_PLACE: struct.pack("<I", 0x22222222),
    }
    code = [CODE, *(extra or {})]
    parts |= {**(extra or {}), **(tables or {})}
    return tiny.build(parts, mode="protected", paging=False, code=code, options=options, **rest)


def run(source: str, **rest) -> tiny.Tiny:
    made = build(source, **rest)
    assert made.run().reason == "port"
    return made


def stale(made: tiny.Tiny) -> list[StaleTranslation]:
    return made.of(StaleTranslation)


__all__ = ["DATA", "build", "entry", "run", "stale"]
