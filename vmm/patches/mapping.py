"""Through which mapping code was written, by the layout of a Linux kernel's address space.

The layout is that of Documentation/arch/x86/x86_64/mm.rst: bit 63 is clear in the user half, the kernel's image and its
modules lie in the last two GiB, and somewhere below them all memory is mapped once more, at an address that is a
multiple of 1 GiB even where it is randomised.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from vmm.memory import PAGE

if TYPE_CHECKING:
    from vmm.patches.stores import Store

#: Where the kernel's image and its modules are.
KERNEL_IMAGE: Final = 0xFFFF_FFFF_8000_0000
_GIB: Final = 1 << 30


class Mapping(enum.Enum):
    """Which address a store used; the value is what people read."""

    OWN = "the address that is executed"
    POKE = "text_poke's temporary mapping"
    DIRECT = "the kernel's direct map"
    IDENTITY = "an identity mapping"
    USER_OWN = "a user address that is executed"
    USER = "another user address"
    OTHER = "another kernel address"
    UNKNOWN = "not known"


def is_kernel(address: int) -> bool:
    """Whether a linear address lies in the kernel's half."""
    return bool(address >> 63)


def classify(store: Store) -> Mapping:
    """Which mapping a store used.

    A store of the kernel through the user half, to code that is executed in the kernel's half, is text_poke's: it maps
    the page there for a moment, in an address space of its own.
    """
    gva, rip = store.gva, store.rip
    if gva is None or rip is None:
        return Mapping.UNKNOWN
    if is_kernel(gva):
        return _in_kernel_half(store, gva)
    if is_kernel(rip):
        executed = store.executed_at
        return Mapping.POKE if executed is not None and is_kernel(executed) else Mapping.USER
    if gva == store.gpa and store.is_early:
        return Mapping.IDENTITY
    return Mapping.USER_OWN if _is_executed(store, gva) else Mapping.USER


def _in_kernel_half(store: Store, gva: int) -> Mapping:
    if gva >= KERNEL_IMAGE or _is_executed(store, gva):
        return Mapping.OWN
    return Mapping.OTHER if (gva - store.gpa) % _GIB else Mapping.DIRECT


def _is_executed(store: Store, gva: int) -> bool:
    executed = store.executed_at
    return executed is not None and gva & -PAGE == executed & -PAGE
