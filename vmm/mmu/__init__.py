"""Two-stage address translation for one vCPU: the guest's page tables, then the EPT.

``translation.py`` answers the fills of the free-running engine; ``step.py`` those of the stepping engine, and keeps
track of what a step writes; ``structures.py`` is how walks reach the guest's page tables; ``instruction.py`` looks at
the instruction that a refusal belongs to; ``refusals.py`` has the reasons for refusing.
"""

from vmm.mmu.instruction import CurrentInstruction
from vmm.mmu.refusals import (
    ForbiddenStructure,
    GuestFault,
    LogFull,
    LogIsFull,
    Misconfiguration,
    NonCanonical,
    Refusal,
    StaleUse,
    Stepwise,
    Unflushed,
    Unjudged,
    UnmappedStructure,
    Violation,
    Watched,
)
from vmm.mmu.step import StepMemory
from vmm.mmu.translation import FetchSide, Mmu

__all__ = [
    "CurrentInstruction",
    "FetchSide",
    "ForbiddenStructure",
    "GuestFault",
    "LogFull",
    "LogIsFull",
    "Misconfiguration",
    "Mmu",
    "NonCanonical",
    "Refusal",
    "StaleUse",
    "StepMemory",
    "Stepwise",
    "Unflushed",
    "Unjudged",
    "UnmappedStructure",
    "Violation",
    "Watched",
]
