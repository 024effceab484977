"""Every store instruction, into code, against the processor."""

from __future__ import annotations

import contextlib

import pytest

from .generator import assemble
from .judging import BY_NAME, disagreements
from .processor import Unjudgeable
from .program import BASE, Alias, Program
from .stores import ALIGNED, UNALIGNED, X87_VARIES

FIRST, SECOND, DATA = 0x11000, 0x12000, 0x20000
SWAPPED, TWICE, INTO_DATA, FROM_DATA, ALIAS = 0x8000000, 0x9000000, 0xA000000, 0xB000000, 0xC000000
MAPS = (
    Alias(BASE, BASE, 0x70000),
    Alias(SWAPPED, SECOND),
    Alias(SWAPPED + 0x1000, FIRST),
    Alias(TWICE, FIRST),
    Alias(TWICE + 0x1000, FIRST),
    Alias(INTO_DATA, FIRST),
    Alias(INTO_DATA + 0x1000, DATA),
    Alias(FROM_DATA, DATA),
    Alias(FROM_DATA + 0x1000, FIRST),
    Alias(ALIAS, BASE),
)
#: What runs at the place afterwards: whatever the store made of these, up to the next RET or exception.
FUNCTIONS = b"\x41\xff\xc0\xc3" * 0x400
PLACES = {
    "own frame": BASE + 0x800,
    "own frame by an alias": ALIAS + 0x800,
    "over two frames": FIRST + 0xFFD,
    "over two frames out of order": SWAPPED + 0xFFC,
    "over the end of a frame into its start": TWICE + 0xFFA,
    "from code into data": INTO_DATA + 0xFFE,
    "from data into code": FROM_DATA + 0xFFD,
}
REGISTERS = {
    "rax": 0xC390_90C0_FF41_9090,
    "rbx": 0xF8F8_F8F8_C3C3_F8F8,
    "rdx": 0xC3C3_C3C3_9090_9090,
    "rbp": DATA + 0x700,
    "xmm1": 0xC390_9090_9090_F8F8_C3C0_FF41_9090_9090,
    "xmm2": 0x80FF_0080_7F80_FF00_FF80_00FF_00FF_0080,
}
# Left out, because the engine is known to differ: what FNSTENV and FNSAVE store in their reserved bits and of the last
# instruction, the flags of LOCK NEG, and the exception flags of the x87 status word.
STORES = {text: before for text, before in UNALIGNED.items() if text not in X87_VARIES}


def program(store: str, before: str, place: int) -> Program:
    """Run functions of both frames, store over some, run what is there now."""
    calls = "".join(f"mov rcx, {at}; call rcx;" for at in (place & -4, FIRST + 0x40, SWAPPED + 0xFFC, SWAPPED + 0x1000))
    setup = f"mov rdi, {place}; mov r10, {DATA + 0x100}; mov r11, {DATA + 0x800}; mov ecx, 0x90909003;"
    settle = "cmp eax, eax;" if store == "lock neg qword ptr [rdi]" else ""
    code = assemble(
        f"mov rcx, {FIRST}; call rcx; mov rcx, {SECOND}; call rcx; mov rcx, {SWAPPED + 0x1040}; call rcx; mov r15, rsp;"
        f"{setup} {before or 'nop'}; cmp eax, 0x12345678; {store}; after: mov rsp, r15; cld; {settle} {calls}"
        "mov al, 7; out 0xf4, al"
    )
    return Program(
        store.replace('"', ""),
        {BASE: code.ljust(0x800, b"\xcc") + FUNCTIONS[:0x800], FIRST: FUNCTIONS, SECOND: FUNCTIONS, DATA: FUNCTIONS},
        MAPS,
        identity=None,
        registers=REGISTERS,
        flags=_defined_flags(store),
        fsw_mask=0xFF00 if store.startswith("f") else 0xFFFF,
    )


def _defined_flags(store: str) -> int:
    """The flags to compare: DF, and those that the store does not leave undefined."""
    if store.startswith(("bt", "lock bt")):
        return 0x441
    return 0x4C5 if store.startswith(("sh", "sa", "ro", "rc")) else 0xCC5


@pytest.mark.parametrize("store", STORES)
def test_a_store_leaves_what_the_processor_leaves(store: str) -> None:
    number = list(STORES).index(store)
    names = list(PLACES)
    for place in (names[number % len(names)], names[(number // 2 + 3) % len(names)]):
        with contextlib.suppress(Unjudgeable):  # the store has made port I/O of the code
            assert disagreements(program(store, STORES[store], PLACES[place]), [BY_NAME["checked"]]) == {}, place


@pytest.mark.parametrize("store", [text for text in ALIGNED if not text.startswith("fxsave")])
def test_an_aligned_store_too(store: str) -> None:
    assert disagreements(program(store, ALIGNED[store], BASE + 0x800), [BY_NAME["checked"], BY_NAME["stepped"]]) == {}
