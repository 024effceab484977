"""A boot in which each block is compared with memory whenever it is entered: minutes, so it is in the long lane."""

from __future__ import annotations

import pytest
from boots import boot

from vmm.machine import RunOptions

pytestmark = pytest.mark.long


def test_no_block_is_entered_that_is_not_what_memory_holds(files):
    made = boot(*files, RunOptions(audit=True), commands=(b"dual", b"poweroff -f"))
    assert "\ndual 10000 ok\r\n" in made.console
    assert made.end.reason == "halt"
    assert made.machine.audited > 100_000_000
