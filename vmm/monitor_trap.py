"""The monitor trap flag of a vCPU (SDM vol. 3, 26.5.2).

==================================================  ==========================================================
with the control on, the guest next …               an MTF exit is pending at the boundary
==================================================  ==========================================================
executes an instruction                             after it, of a REP after one iteration
is delivered an event, injected or its own          after the delivery, before the handler's first instruction
faults                                              after the delivery of the fault
comes out by another VM exit                        never: the earlier exit cancels it
==================================================  ==========================================================

An exception is a VM exit here, and the delivery that follows it an injection, so that both rows hold for it. At its
boundary an MTF exit comes before a debug trap (#DB by TF) and before interrupts. Injecting an event of type 7 makes
one pending whatever the control says.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from attrs import define

from vmm.exits import ExitReason

#: Exits of an instruction itself, which cancel a pending MTF exit; and MTF, when the trap has had it already.
_CANCELLING: Final = (
    *(ExitReason.CPUID, ExitReason.RDTSC, ExitReason.RDTSCP, ExitReason.IO_INSTRUCTION, ExitReason.VMCALL),
    *(ExitReason.HLT, ExitReason.MTF),
)


@define(slots=True, eq=False)
class MonitorTrapFlag:
    """``control`` is the VM-execution control; ``pending`` whether an MTF exit is, at the next boundary."""

    control: bool = False
    pending: bool = False

    def watches(self) -> bool:
        """Whether the guest must not run on freely."""
        return self.control or self.pending


def cancelling(counts: Counter[ExitReason]) -> int:
    """How many exits there were that would have cancelled one; the same number before and after: none did."""
    return sum(counts[reason] for reason in _CANCELLING)
