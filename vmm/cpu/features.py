"""What CPUID says on this engine, and what a platform can make of it."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from vmm.cpu import binding as b
from vmm.cpu.layout import Probe

#: EAX, EBX, ECX, EDX.
CpuidAnswer = tuple[int, int, int, int]

CR4_OSXSAVE: Final = 1 << 18

_EAX, _EBX, _ECX, _EDX = range(4)
_OSXSAVE: Final = 1 << 27
_RDRAND: Final = 1 << 30
_RDSEED: Final = 1 << 18
_APIC: Final = 1 << 9
_X2APIC: Final = 1 << 21
_TSC_DEADLINE: Final = 1 << 24
_INVARIANT_TSC: Final = 1 << 8
#: (leaf, register): (bits that are set, bits that are cleared).
_PC: Final = {
    (1, _ECX): (0, _RDRAND | _X2APIC | _TSC_DEADLINE),
    (1, _EDX): (0, _APIC),
    (7, _EBX): (0, _RDSEED),
    (0x8000_0001, _EDX): (0, _APIC),
    (0x8000_0007, _EDX): (_INVARIANT_TSC, 0),
}
_PC_LEAVES: Final = frozenset({0, *(leaf for leaf, _ in _PC)})
#: The highest basic leaf that the engine knows; those from there to the leaves on clocks are empty.
_LAST_NATIVE_LEAF: Final = 0xD
_TSC_LEAF, _FREQUENCY_LEAF = 0x15, 0x16
_LAST_LEAF: Final = _FREQUENCY_LEAF
_PROBE_CODE: Final = 0x1100
_MASK: Final = 0xFFFF_FFFF


def pc_cpuid(leaf: int, subleaf: int, cr4: int, *, apic_clock: int = 0) -> CpuidAnswer | None:
    """What CPUID says on a PC; None where the engine's own answer is right.

    The time-stamp counter is invariant, and there is no RDRAND and no RDSEED: they would give every run other numbers.
    ``cr4`` is what leaf 1 depends on. With a local APIC ``apic_clock`` is the frequency of its timer and of the
    time-stamp counter in Hz, which leaves 0x15 and 0x16 tell, so that nobody need measure it; there is no x2APIC mode,
    and no TSC-deadline mode of the timer. Without one it is 0.
    """
    if apic_clock and _LAST_NATIVE_LEAF < leaf <= _LAST_LEAF:
        return _clock_leaf(leaf, apic_clock)
    if leaf not in _PC_LEAVES:
        return None
    answer = list(_native(leaf, subleaf))
    for (of, register), (added, removed) in _PC.items():
        if of == leaf:
            answer[register] = answer[register] & ~removed | added
    if leaf == 1 and cr4 & CR4_OSXSAVE:
        answer[_ECX] |= _OSXSAVE
    if apic_clock and leaf == 0:
        answer[_EAX] = _LAST_LEAF
    if apic_clock and leaf == 1:
        answer[_EDX] |= _APIC
    return answer[0], answer[1], answer[2], answer[3]


def _clock_leaf(leaf: int, hertz: int) -> CpuidAnswer:
    """Leaf 0x15: the time-stamp counter counts the core crystal clock 1 to 1. Leaf 0x16: frequencies in MHz."""
    if leaf == _TSC_LEAF:
        return 1, 1, hertz, 0
    if leaf == _FREQUENCY_LEAF:
        return hertz // 1_000_000, hertz // 1_000_000, hertz // 1_000_000, 0
    return 0, 0, 0, 0


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
