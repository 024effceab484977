"""The journal accounts for every byte of code: each change once, with the bytes that were there before."""

from __future__ import annotations

import pytest
import random_guests
import tiny
from shadow import Shadow
from tiny import CODE, PAGE, map_page

from vmm.guest.manifest import Policy
from vmm.machine import RunOptions
from vmm.trap.policy import HOT_FRAME

FIRST = 0x20000
EDGE = FIRST + PAGE
RET = b"\xc3"
#: Makes the first of two adjacent frames a window.
OPEN = f"mov ecx, {HOT_FRAME + 1}; mov ebx, {FIRST + 0x100}; again: mov byte ptr [rbx], cl; dec ecx; jnz again\n"


def run(code: str, policy: Policy) -> tuple[tiny.Tiny, Shadow]:
    made = tiny.build(
        {CODE: f"{code}\nmov ebx, {FIRST}; call rbx; xor eax, eax\n{tiny.END}", FIRST: RET * 2 * PAGE},
        maps=[map_page(FIRST, FIRST, pages=2)],
        code=(CODE, FIRST),
        policy=policy,
        options=RunOptions(check=True),
    )
    shadow = Shadow(made.machine)
    assert made.run().reason == "port"
    return made, shadow


@pytest.mark.parametrize(
    "code",
    [
        f"mov dword ptr [{EDGE - 2}], 0x04030201",
        f"mov byte ptr [{EDGE - 1}], 7; mov dword ptr [{EDGE - 2}], 0x04030201",
        f"mov dword ptr [{EDGE - 2}], 0x04030201; mov byte ptr [{EDGE - 1}], 9; mov dword ptr [{EDGE - 3}], 0x14131211",
        f"mov dword ptr [{EDGE - 2}], 0xc3c3c3c3",
    ],
)
def test_a_store_over_the_end_of_a_window_is_journaled_once(code):
    """What it changes in the window is in the window's difference; the record of the store has the rest."""
    made, shadow = run(OPEN + code, Policy(writes="adaptive", code="load"))
    assert any(record.after == "window" for record in made.frame_events)
    assert shadow.surprises == []
    assert shadow.differences() == []
    stores = [record for record in made.modifications if record.cause == "store" and record.gpa >= FIRST + 0x200]
    assert all(record.gpa == EDGE for record in stores)
    assert stores


@pytest.mark.parametrize("writes", ["step", "window", "adaptive"])
def test_a_store_over_two_code_frames_is_journaled_once(writes):
    _, shadow = run(f"mov dword ptr [{EDGE - 2}], 0x04030201", Policy(writes=writes, code="load"))
    assert (shadow.surprises, shadow.differences()) == ([], [])


@pytest.mark.parametrize("writes", ["step", "window", "adaptive"])
@pytest.mark.parametrize("code", ["load", "fetch"])
@pytest.mark.parametrize("seed", range(4))
def test_random_guests_are_accounted_for(seed, code, writes):
    guest = random_guests.RandomGuest(seed)
    policy = Policy(reads="adaptive", writes=writes, code=code)
    made = guest.build(guest.segments(), options=RunOptions(check=True), policy=policy)
    shadow = Shadow(made.machine)
    assert made.run().detail.get("value") == 0
    assert (shadow.surprises, shadow.differences()) == ([], [])
    assert made.modifications
