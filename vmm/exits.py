"""VM exits, as frozen records (see ``vmm.records``).

Names and numbers are those of the Intel SDM: basic exit reasons from vol. 3, appendix C ("VMX basic exit
reasons"), exit qualifications from section 28.2.1 and table 28-7.
"""

from __future__ import annotations

import enum
from typing import ClassVar

from attrs import frozen

from vmm.records import Json, Record


class ExitReason(enum.IntEnum):
    """Basic exit reasons, SDM vol. 3, appendix C."""

    EXCEPTION_OR_NMI = 0
    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    CPUID = 10
    HLT = 12
    RDTSC = 16
    VMCALL = 18
    IO_INSTRUCTION = 30
    MTF = 37
    EPT_VIOLATION = 48
    EPT_MISCONFIGURATION = 49
    RDTSCP = 51
    VMFUNC = 59
    PAGE_MODIFICATION_LOG_FULL = 62
    SPP_RELATED_EVENT = 66


@frozen(slots=True)
class Exit(Record):
    """A VM exit. ``rip`` is the linear address of the instruction that caused it (guest RIP field)."""

    kind: ClassVar[str] = "exit"
    reason: ClassVar[ExitReason]

    rip: int

    def _fields(self) -> Json:
        """Kind, reason, number, then the fields that this reason defines."""
        out: Json = {"kind": "exit", "reason": self.reason.name, "number": int(self.reason)}
        for attribute in self.__attrs_attrs__:
            value = getattr(self, attribute.name)
            if value is not None and attribute.name != "vcpu":
                out[attribute.name] = value
        return out


@frozen(slots=True)
class ExceptionExit(Exit):
    """An exception of the guest, before it is delivered through the guest's IDT (reason 0)."""

    reason: ClassVar[ExitReason] = ExitReason.EXCEPTION_OR_NMI

    vector: int
    error_code: int | None = None
    #: CR2 for a page fault, otherwise None.
    address: int | None = None


@frozen(slots=True)
class TripleFault(Exit):
    """No exception could be delivered any more; the guest is dead (reason 2)."""

    reason: ClassVar[ExitReason] = ExitReason.TRIPLE_FAULT


@frozen(slots=True)
class ExternalInterrupt(Exit):
    """An external interrupt is taken at this boundary and delivered through the IDT (reason 1)."""

    reason: ClassVar[ExitReason] = ExitReason.EXTERNAL_INTERRUPT

    vector: int


@frozen(slots=True)
class Cpuid(Exit):
    """CPUID with its inputs (reason 10)."""

    reason: ClassVar[ExitReason] = ExitReason.CPUID

    leaf: int
    subleaf: int
    length: int = 2


@frozen(slots=True)
class Hlt(Exit):
    """HLT (reason 12)."""

    reason: ClassVar[ExitReason] = ExitReason.HLT

    length: int = 1


@frozen(slots=True)
class Rdtsc(Exit):
    """RDTSC; ``value`` is the virtual time that it returned (reason 16)."""

    reason: ClassVar[ExitReason] = ExitReason.RDTSC

    value: int
    length: int = 2


@frozen(slots=True)
class Rdtscp(Exit):
    """RDTSCP; ``value`` is the virtual time that it returned (reason 51)."""

    reason: ClassVar[ExitReason] = ExitReason.RDTSCP

    value: int
    length: int = 3


@frozen(slots=True)
class Vmcall(Exit):
    """VMCALL (reason 18). ``number`` of the call by convention in RAX."""

    reason: ClassVar[ExitReason] = ExitReason.VMCALL

    rax: int
    length: int = 3


@frozen(slots=True)
class Vmfunc(Exit):
    """VMFUNC that does not do its function: EAX is its number, ECX what it is given (reason 59)."""

    reason: ClassVar[ExitReason] = ExitReason.VMFUNC

    eax: int
    ecx: int
    length: int = 3


@frozen(slots=True)
class IoInstruction(Exit):
    """IN, INS, OUT or OUTS (reason 30). ``size`` is 1, 2 or 4 bytes; ``direction`` is "in" or "out"."""

    reason: ClassVar[ExitReason] = ExitReason.IO_INSTRUCTION

    port: int
    size: int
    direction: str
    value: int
    qualification: int


@frozen(slots=True)
class Mtf(Exit):
    """Monitor trap flag: the one instruction that the guest was let through with is complete (reason 37).

    ``rip`` is where the guest goes on.
    """

    reason: ClassVar[ExitReason] = ExitReason.MTF


@frozen(slots=True)
class EptViolation(Exit):
    """A guest-physical access that the EPT does not allow; nothing of it has happened (reason 48).

    ``qualification`` has the bits of SDM table 28-7. ``gva`` is None when bit 7 is clear. ``view`` is the number of the
    EPT view in use, None on a machine that has only one.
    """

    reason: ClassVar[ExitReason] = ExitReason.EPT_VIOLATION

    qualification: int
    gpa: int
    gva: int | None
    view: int | None = None


@frozen(slots=True)
class EptMisconfiguration(Exit):
    """An EPT entry with a setting that the processor does not support (reason 49)."""

    reason: ClassVar[ExitReason] = ExitReason.EPT_MISCONFIGURATION

    gpa: int


@frozen(slots=True)
class PageModificationLogFull(Exit):
    """An access would set an accessed or dirty flag of the EPT, and the page-modification log is full (reason 62).

    The access has not happened. Of ``qualification`` only bit 12 is defined (NMI unblocking due to IRET).
    """

    reason: ClassVar[ExitReason] = ExitReason.PAGE_MODIFICATION_LOG_FULL

    qualification: int = 0


@frozen(slots=True)
class SppEvent(Exit):
    """The sub-page permission table does not say whether a store may happen; it has not (reason 66).

    Bit 11 of ``qualification`` is set for a miss (an entry is not valid), clear for a misconfiguration.
    """

    reason: ClassVar[ExitReason] = ExitReason.SPP_RELATED_EVENT

    qualification: int
    gpa: int
    gva: int
