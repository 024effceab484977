"""What Unicorn's processor does to flags that a real one does not, and where its branches fault."""

from __future__ import annotations

import pytest

from .bare_unicorn import CODE, DATA, HLT, OK, Bare, R, W, asm

ARITHMETIC = 0x8D5


def refused(store: str, *, loads: bool) -> int:
    """The arithmetic flags after NEG of 7 and a store that was refused (after its load, if it was allowed to)."""
    b = Bare()
    b.put(CODE, asm(f"neg ebx; {store}", CODE) + HLT)
    b["rbx"], b["rdi"] = 7, DATA
    b.ram[DATA] = 1
    b.refuse(DATA & -0x1000, R if loads else 0)
    assert b.run() != OK
    assert b.ram[DATA] == 1
    return b["rflags"] & ARITHMETIC


AFTER_NEG = 0x95  # CF, PF, AF, SF


@pytest.mark.parametrize("store", ["setz byte ptr [rdi]", "setc byte ptr [rdi]", "rol byte ptr [rdi], 1"])
def test_q67_most_refused_stores_leave_the_flags(store: str) -> None:
    assert refused(store, loads=True) == AFTER_NEG


@pytest.mark.parametrize("store", ["seto byte ptr [rdi]", "setp byte ptr [rdi]"])
def test_q67_a_refused_setcc_may_compute_flags_from_flags(store: str) -> None:
    assert refused(store, loads=True) != AFTER_NEG


@pytest.mark.parametrize("store", ["rcl byte ptr [rdi], 1", "rcr byte ptr [rdi], 1"])
@pytest.mark.parametrize("loads", [False, True])
def test_q67_so_does_a_refused_rotate_through_carry(store: str, loads: bool) -> None:
    assert refused(store, loads=loads) != AFTER_NEG


def test_q68_lock_neg_sets_the_flags_of_the_old_value() -> None:
    flags = []
    for code in (b"\xf7\x1f", b"\xf0\xf7\x1f"):
        b = Bare()
        b.put(CODE, code + HLT)
        b["rdi"] = DATA
        b.ram[DATA : DATA + 4] = b"\x90\x90\x90\x90"
        assert b.run() == OK
        flags.append(b["rflags"] & 0xC1)
    assert flags == [0x01, 0x81]


def test_q69_inexact_results_are_not_noted() -> None:
    b = Bare()
    b.put(CODE, "divss xmm0, xmm1; fld1; fldpi; fdivp st(1), st; hlt")
    b["xmm0"], b["xmm1"], b["mxcsr"], b["fpcw"] = 0x3F800000, 0x40400000, 0x1F80, 0x37F
    b.pages = {}
    assert b.run() == OK
    assert (b["mxcsr"] & 0x3F, b["fpsw"] & 0x3F) == (0, 0)  # a processor: 0x20 in both


def test_q70_a_branch_to_a_non_canonical_address_is_done() -> None:
    b = Bare()
    b.put(CODE, "call rax; hlt")
    b["rax"] = 1 << 63
    b.pages[1 << 63] = (0, W)
    stack = b["rsp"]
    b.run()
    assert (b.pc, b["rsp"]) == (1 << 63, stack - 8)  # a processor: #GP with RIP at the CALL and RSP as it was
