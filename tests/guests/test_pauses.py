"""At whatever moment a bundled guest is looked at, or cut off, its code is what the journal says, to the byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow import Shadow, at_pauses
from test_run_guests import GUESTS, machine_for

from vmm.machine import RunOptions

#: Exits after which an instruction at a time is looked at, and how many.
SLOW_FROM, SLOW_FOR = st.integers(1, 200), st.integers(0, 200)
LONGEST = 3000


@pytest.mark.parametrize("name", GUESTS)
@settings(max_examples=4, deadline=None)
@given(
    writes=st.sampled_from(["window", "adaptive", "step"]),
    journaled=st.integers(1, 4),
    slow_from=SLOW_FROM,
    slow_for=SLOW_FOR,
    last=st.integers(1, LONGEST),
)
def test_the_journal_accounts_for_every_byte_of_code_at_every_pause(
    name, writes, journaled, slow_from, slow_for, last
):
    machine = machine_for(GUESTS[name], RunOptions(), {"writes": writes})
    shadow = Shadow(machine)

    def look(pause):
        assert shadow.differences() == [], f"at pause {pause}"
        if pause % journaled == 0:
            machine.journal_windows()
            assert shadow.differences_anywhere() == [], f"with windows journaled at pause {pause}"
        if pause in (slow_from, slow_from + slow_for):
            machine.monitor_trap_flag(on=pause == slow_from and slow_for > 0)
        if pause == last:
            machine.stop()

    at_pauses(machine, look)
    machine.run()
    assert shadow.surprises == []
    assert shadow.differences_anywhere() == []
