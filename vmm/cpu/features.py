"""What CPUID says on this engine, and what a platform can make of it."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from vmm.cpu import binding as b
from vmm.cpu.layout import Probe

#: EAX, EBX, ECX, EDX.
CpuidAnswer = tuple[int, int, int, int]

CR4_OSXSAVE: Final = 1 << 18

_EBX, _ECX, _EDX = 1, 2, 3
_OSXSAVE: Final = 1 << 27
_RDRAND: Final = 1 << 30
_RDSEED: Final = 1 << 18
_APIC: Final = 1 << 9
_X2APIC: Final = 1 << 21
_INVARIANT_TSC: Final = 1 << 8
#: (leaf, register): (bits that are set, bits that are cleared).
_PC: Final = {
    (1, _ECX): (0, _RDRAND | _X2APIC),
    (1, _EDX): (0, _APIC),
    (7, _EBX): (0, _RDSEED),
    (0x8000_0001, _EDX): (0, _APIC),
    (0x8000_0007, _EDX): (_INVARIANT_TSC, 0),
}
_PC_LEAVES: Final = frozenset(leaf for leaf, _ in _PC)
_PROBE_CODE: Final = 0x1100
_MASK: Final = 0xFFFF_FFFF


def pc_cpuid(leaf: int, subleaf: int, cr4: int) -> CpuidAnswer | None:
    """What CPUID says on a PC; None where the engine's own answer is right.

    There is no local APIC, the time-stamp counter is invariant, and there is no RDRAND and no RDSEED: they would give
    every run other numbers. ``cr4`` is what leaf 1 depends on.
    """
    if leaf not in _PC_LEAVES:
        return None
    answer = list(_native(leaf, subleaf))
    for (of, register), (added, removed) in _PC.items():
        if of == leaf:
            answer[register] = answer[register] & ~removed | added
    if leaf == 1 and cr4 & CR4_OSXSAVE:
        answer[_ECX] |= _OSXSAVE
    return answer[0], answer[1], answer[2], answer[3]


@lru_cache(maxsize=64)
def _native(leaf: int, subleaf: int) -> CpuidAnswer:
    """What the engine answers, with CR4 as at its start."""
    probe = Probe()
    try:
        for register, value in ((b.REG_RAX, leaf), (b.REG_RCX, subleaf), (b.REG_RBX, 0), (b.REG_RDX, 0)):
            probe.write(register, value)
        probe.run(b"\x0f\xa2\xf4", _PROBE_CODE)  # cpuid; hlt
        found = [probe.read(register) & _MASK for register in (b.REG_RAX, b.REG_RBX, b.REG_RCX, b.REG_RDX)]
    finally:
        probe.close()
    return found[0], found[1], found[2], found[3]
