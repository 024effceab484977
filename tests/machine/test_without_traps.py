"""A machine without traps: the guest alone, for comparison."""

import pytest
import tiny
from attrs import evolve
from tiny import CODE, END

from vmm.coherence import Coherence
from vmm.errors import OptionError
from vmm.exits import ExitReason
from vmm.guest.manifest import Policy
from vmm.machine import RunOptions

VIEW = 0x70000
UNTRAPPED = RunOptions(traps=False)
PATCHING = f"mov byte ptr [{VIEW + 8:#x}], 7; mov al, 1; {END}"
MAPS = (tiny.map_page(VIEW, CODE, "rw"),)


def test_nothing_is_refused_and_the_guest_sees_no_difference():
    with_traps = tiny.build(PATCHING, maps=MAPS)
    without = tiny.build(PATCHING, maps=MAPS, options=UNTRAPPED)
    assert with_traps.run() == without.run()
    assert without.end.detail["value"] == 7
    assert with_traps.state() == without.state()
    assert (with_traps.count(ExitReason.EPT_VIOLATION), without.count(ExitReason.EPT_VIOLATION)) == (1, 0)
    assert without.modifications == []
    assert without.machine.blocks.counters.created == 0
    without.machine.verify()


@pytest.mark.parametrize("model", [Coherence.SERIALISED, Coherence.EXPLICIT])
def test_the_weaker_models_need_traps(model):
    with pytest.raises(OptionError, match="rests on traps"):
        tiny.build("hlt", options=evolve(UNTRAPPED, coherence=model))


def test_policies_that_refuse_accesses_need_traps():
    with pytest.raises(OptionError, match="rest on traps"):
        tiny.build("hlt", options=evolve(UNTRAPPED, wx="stop"))
    with pytest.raises(OptionError, match="rest on traps"):
        tiny.build("hlt", options=UNTRAPPED, policy=Policy(code="seal"))
