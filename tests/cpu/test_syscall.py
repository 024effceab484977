"""SYSCALL on an Intel processor (SDM vol. 2, "SYSCALL")."""

import pytest
from delivery_fakes import CODE32, CODE64, DATA32, DPL3, IF, LMA, RF, TF, FakeState

from vmm.cpu.events import Event, EventType, Vector
from vmm.cpu.state import Segment
from vmm.cpu.syscall import syscall

SCE = 1
ENTRY = 0xFFFF_8000_0000_1000


def user_state(cs: int = CODE64, efer: int = LMA | SCE) -> FakeState:
    state = FakeState(efer=efer, rcx=1, r11=2, rflags=IF | TF | RF | 0xC7)
    state.segments["cs"] = Segment(0x33, 0, 0xFFFF_FFFF, cs | DPL3)
    state.segments["ss"] = Segment(0x2B, 0, 0xFFFF_FFFF, DATA32 | DPL3)
    return state


def enter(state: FakeState, *, star: int = 0x0023_0010_0000_0000, fmask: int = IF | TF) -> Event | None:
    return syscall(state, star=star, lstar=ENTRY, fmask=fmask)


def test_it_saves_rip_and_rflags_and_goes_to_lstar():
    state = user_state()
    assert enter(state) is None
    assert (state.rcx, state.r11) == (0x40_1002, IF | TF | 0xC7)
    assert (state.rip, state.rsp) == (ENTRY, 0x8000)


@pytest.mark.parametrize(("fmask", "after"), [(0, IF | TF | 0xC7), (IF, TF | 0xC7), (0xFFFF_FFFD, 2)])
def test_fmask_says_which_flags_are_cleared_and_rf_always_is(fmask, after):
    state = user_state()
    enter(state, fmask=fmask)
    assert state.rflags == after


@pytest.mark.parametrize(("star", "cs", "ss"), [(0x10, 0x10, 0x18), (0x13, 0x10, 0x1B), (0xFFF8, 0xFFF8, 0)])
def test_selectors_come_from_star_and_the_hidden_parts_are_fixed(star, cs, ss):
    state = user_state()
    enter(state, star=0x0023_0000_0000_0000 | star << 32 | 0xDEAD)
    assert state.segment("cs") == Segment(cs, 0, 0xFFFF_FFFF, CODE64)
    assert state.segment("ss") == Segment(ss, 0, 0xFFFF_FFFF, DATA32)
    assert state.cpl == 0


@pytest.mark.parametrize(("cs", "efer"), [(CODE64, LMA), (CODE32, LMA | SCE), (CODE32, SCE), (CODE64, SCE)])
def test_it_is_ud_outside_of_64_bit_mode_or_with_sce_clear(cs, efer):
    state = user_state(cs, efer)
    before = state.snapshot()
    assert enter(state) == Event(Vector.UD, EventType.HARDWARE_EXCEPTION)
    assert state.snapshot() == before
