"""Mode-based execute control as a host uses it (SDM vol. 3, 29.3.3.2)."""

from __future__ import annotations

import pytest
import tiny
from attrs import evolve
from tiny import CODE, DATA, END, PAGE, map_page

from vmm.ept import PROFILES, EptProfile, Permission
from vmm.errors import OptionError
from vmm.exits import ExitReason
from vmm.guest.ept import EptMap
from vmm.machine import Machine, RunOptions

MODES = RunOptions(ept=PROFILES["mode-based-execute"], check=True, audit=True)
FUNCTION = 0x20000
#: A supervisor-mode address of the function; its own is a user-mode one.
SUPERVISOR = 0x8000000
MAPS = (*tiny.BASICS, map_page(FUNCTION, FUNCTION), map_page(SUPERVISOR, FUNCTION, user=False))
FETCH, R, X, XU, LINEAR = 1 << 2, 1 << 3, 1 << 5, 1 << 6, 3 << 7


def build(address, options=MODES):
    return tiny.build({CODE: f"mov eax, {address:#x}\ncall rax\n{END}", FUNCTION: "ret"}, maps=MAPS, options=options)


@pytest.mark.parametrize("address", [FUNCTION, SUPERVISOR])
@pytest.mark.parametrize("access", [Permission.NONE, Permission.R, Permission.X, Permission.R | Permission.X], ids=str)
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("single_step", [False, True])
def test_x_is_for_supervisor_mode_addresses_xu_for_user_mode_ones(address, access, user, single_step):
    made = build(address, evolve(MODES, single_step=single_step))
    made.machine.protect(FUNCTION, PAGE, access, user_execute=user)
    assert made.run().reason == "port"
    allowed = user if address == FUNCTION else bool(access & Permission.X)
    bits = R * bool(access & Permission.R) | X * bool(access & Permission.X) | XU * user
    wanted = [] if allowed else [(address, FETCH | LINEAR | bits)]
    assert [(v.gva, v.qualification) for v in made.violations] == wanted


def test_without_a_word_about_user_mode_x_is_for_both():
    for address in (FUNCTION, SUPERVISOR):
        made = build(address)
        made.machine.protect(FUNCTION, PAGE, Permission.X)
        made.run()
        assert made.violations == []


def test_a_page_for_user_mode_fetches_only_is_code_and_never_writable():
    made = build(FUNCTION)
    with pytest.raises(OptionError, match="never both"):
        made.machine.protect(DATA, PAGE, Permission.R | Permission.W, user_execute=True)
    made.machine.protect(DATA, PAGE, Permission.R, user_execute=True)
    assert made.machine.frames.at(DATA).state.value == "code"
    made.machine.verify()


def test_without_the_control_the_two_cannot_be_told_apart():
    made = build(FUNCTION, RunOptions())
    with pytest.raises(OptionError, match="user-mode"):
        made.machine.protect(FUNCTION, PAGE, Permission.X, user_execute=False)
    ept = made.machine.ept
    ept.write_entry(FUNCTION, 1, ept.read_entry(FUNCTION, 1) & ~(1 << 10))  # ignored
    made.run()
    assert made.count(ExitReason.EPT_VIOLATION) == 0


def test_a_manifest_says_it_for_the_start():
    made = build(FUNCTION)
    manifest = evolve(
        made.machine.guest.manifest,
        ept=EptProfile(mode_based_execute=True),
        ept_maps=(EptMap(FUNCTION, PAGE, Permission.X, user_execute=False),),
    )
    with Machine(evolve(made.machine.guest, manifest=manifest)) as machine:
        machine.run()
        assert machine.reporter.counts[ExitReason.EPT_VIOLATION] == 1
