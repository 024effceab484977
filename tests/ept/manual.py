"""SDM vol. 3, 29.3 and table 28-7, written down a second time: in the manual's order, and with nothing of ``vmm.ept``.

Entries are plain 64-bit integers, by level: 4 (PML4E) to 1 (PTE).
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

#: What an instruction does to memory.
READ, WRITE, MODIFY, FETCH = "read", "write", "read-modify-write", "fetch"


@frozen
class Processor:
    """What a processor has, and what is switched on."""

    execute_only: bool = True
    pages_2m: bool = True
    pages_1g: bool = True
    width: int = 40
    accessed_dirty: bool = False
    mode_based: bool = False
    advanced: bool = False


def bits(high: int, low: int) -> int:
    return (1 << high + 1) - (1 << low)


def is_present(processor: Processor, entry: int) -> bool:
    """29.3.2: an entry is present if any of bits 2:0 is 1, or bit 10 under mode-based execute control."""
    return entry & 7 != 0 or (processor.mode_based and entry >> 10 & 1 == 1)


def maps_a_page(processor: Processor, entry: int, level: int) -> bool:
    """29.3.2: bit 7 of a PDPTE or PDE, where it is not reserved; a PTE always."""
    if level == 1:
        return True
    has_size = {2: processor.pages_2m, 3: processor.pages_1g, 4: False}[level]
    return has_size and entry >> 7 & 1 == 1


def reserved_bits(processor: Processor, entry: int, level: int) -> int:
    """29.3.2, the formats: which bits must be 0."""
    beyond_the_width = bits(51, processor.width)
    match level, maps_a_page(processor, entry, level):
        case 4, _:
            return beyond_the_width | bits(7, 3)
        case 3, True:
            return beyond_the_width | bits(29, 12)
        case 2, True:
            return beyond_the_width | bits(20, 12)
        case (3 | 2), False:
            return beyond_the_width | bits(7, 3)
        case _:
            return beyond_the_width


def is_misconfigured(processor: Processor, entry: int, level: int) -> bool:
    """29.3.3.1."""
    if not is_present(processor, entry):
        return False
    readable, writable, executable, user = (entry >> bit & 1 == 1 for bit in (0, 1, 2, 10))
    if not readable:
        if writable:
            return True
        if not processor.execute_only and (executable or (processor.mode_based and user)):
            return True
    if entry & reserved_bits(processor, entry, level):
        return True
    return maps_a_page(processor, entry, level) and entry >> 3 & 7 in (2, 3, 7)


@frozen
class Walk:
    """What 29.3.3.3 comes to, step 1: ``end`` is "not present", "misconfigured" or "page"."""

    end: str
    #: The entries that were read.
    used: tuple[tuple[int, int], ...]

    @property
    def level(self) -> int:
        return self.used[-1][0]

    def every(self, bit: int) -> bool:
        """The AND of a bit in all entries used; 0 if one is not present (table 28-7, note 2)."""
        return self.end == "page" and all(entry >> bit & 1 for _, entry in self.used)

    def host_page(self, gpa: int) -> int:
        """The address that the last entry gives to a GPA, without its offset in 4 KiB."""
        offset = bits({1: 11, 2: 20, 3: 29}[self.level], 0)
        return self.used[-1][1] & bits(51, 12) & ~offset | gpa & offset & ~0xFFF


def walk(processor: Processor, read_entry: Callable[[int], int]) -> Walk:
    """29.3.3.3: entries from the PML4E down, by level; the first that ends the walk decides."""
    used = []
    for level in (4, 3, 2, 1):
        entry = read_entry(level)
        used.append((level, entry))
        if not is_present(processor, entry):
            return Walk("not present", tuple(used))
        if is_misconfigured(processor, entry, level):
            return Walk("misconfigured", tuple(used))
        if maps_a_page(processor, entry, level):
            break
    return Walk("page", tuple(used))


@frozen
class Linear:
    """What the guest's paging makes of the linear address (table 28-7, bits 9 to 11)."""

    user: bool
    read_write: bool = True
    execute_disable: bool = False


def final_access(processor: Processor, walk: Walk, access: str, linear: Linear) -> str | int:
    """The outcome of an access to a linear address: "fine", "misconfiguration", or a qualification."""
    if walk.end == "misconfigured":
        return "misconfiguration"
    executable = 10 if processor.mode_based and linear.user else 2
    needs = {READ: [0], WRITE: [1], MODIFY: [0, 1], FETCH: [executable]}[access]
    if all(walk.every(bit) for bit in needs):
        return "fine"
    said = qualification(processor, walk)
    said |= {READ: 0b001, WRITE: 0b010, MODIFY: 0b011, FETCH: 0b100}[access]
    said |= 1 << 8
    if processor.advanced:
        said |= linear.user << 9 | linear.read_write << 10 | linear.execute_disable << 11
    return said


def structure_access(processor: Processor, walk: Walk, *, sets_flags: bool) -> str | int:
    """The outcome of the processor's own access to a guest paging-structure entry.

    ``sets_flags`` is whether the guest's accessed or dirty flag has to be set there.
    """
    if walk.end == "misconfigured":
        return "misconfiguration"
    said = qualification(processor, walk)
    if processor.accessed_dirty:  # note 1: treated as writes, and reported as both
        return "fine" if walk.every(1) else said | 0b11
    if not walk.every(0):
        return said | 0b01
    if sets_flags and not walk.every(1):
        return said | 0b11  # a locked read-modify-write
    return "fine"


def qualification(processor: Processor, walk: Walk) -> int:
    """Bits 3 to 7."""
    said = walk.every(0) << 3 | walk.every(1) << 4 | walk.every(2) << 5 | 1 << 7
    if processor.mode_based:
        said |= walk.every(10) << 6
    return said
