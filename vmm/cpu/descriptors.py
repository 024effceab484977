"""The guest's descriptor tables and TSS, as the processor itself reads them (SDM vol. 3, 3.4.5 and 8.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from vmm.cpu.entry import AR_ACCESSED, AR_P, CR4_LA57, EFER_LMA, Write, split_at_wrap, wrapped_writes
from vmm.cpu.events import GuestFault, Vector
from vmm.cpu.state import Segment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.cpu.state import CpuState, LinearMemory

_TABLE_INDICATOR = 4


# Segment descriptor, 8 bytes:
#
#  63      56 55 54 53 52  51      48 47 46-45 44 43-40 39        16 15         0
# +----------+--+--+--+---+----------+--+-----+--+-----+------------+------------+
# | base     |G |D |L |AVL| limit    |P | DPL |S |type | base       | limit      |
# | 31:24    |  |  |  |   | 19:16    |  |     |  |     | 23:0       | 15:0       |
# +----------+--+--+--+---+----------+--+-----+--+-----+------------+------------+
@frozen(slots=True)
class Descriptor:
    """A code or data segment descriptor and the linear address where it lies."""

    address: int
    raw: int

    @property
    def access_rights(self) -> int:
        """In the format of ``Segment.access_rights``."""
        return self.raw >> 40 & 0xF0FF

    @property
    def base(self) -> int:
        """32 bits."""
        return self.raw >> 16 & 0xFF_FFFF | self.raw >> 32 & 0xFF00_0000

    @property
    def limit(self) -> int:
        """In bytes: the highest valid offset of a segment that expands up."""
        limit = self.raw & 0xFFFF | self.raw >> 32 & 0xF_0000
        return limit << 12 | 0xFFF if self.raw >> 55 & 1 else limit

    @property
    def dpl(self) -> int:
        """0 to 3."""
        return self.raw >> 45 & 3

    @property
    def present(self) -> bool:
        """P."""
        return bool(self.access_rights & AR_P)

    @property
    def is_code(self) -> bool:
        """S and the executable bit of the type."""
        return self.access_rights & 0x18 == 0x18

    @property
    def is_conforming_code(self) -> bool:
        """Code that runs at the CPL of its caller."""
        return self.access_rights & 0x1C == 0x1C

    @property
    def is_writable_data(self) -> bool:
        """What SS can be loaded with."""
        return self.access_rights & 0x1A == 0x12

    def segment(self, selector: int, rpl: int) -> Segment:
        """Make the segment register that a load through ``selector``, with this RPL, gives."""
        return Segment(selector & ~3 | rpl, self.base, self.limit, self.access_rights | AR_ACCESSED)


@frozen(slots=True)
class Tables:
    """The tables of one vCPU while one event is delivered; ``ext`` is the EXT bit of its faults.

    All accesses are supervisor accesses. Methods raise ``GuestFault`` and ``PageFault``.
    """

    state: CpuState
    memory: LinearMemory
    ext: int

    @property
    def long_mode(self) -> bool:
        """IA-32e mode (64-bit or compatibility)."""
        return bool(self.state.efer & EFER_LMA)

    def fault(self, vector: Vector, selector: int = 0) -> GuestFault:
        """Make the fault that names ``selector``'s descriptor (SDM vol. 3, 6.13: index, TI, EXT)."""
        return GuestFault(vector, selector & 0xFFFC | self.ext)

    def is_canonical(self, address: int) -> bool:
        """Whether all bits above the linear address width equal its top bit (SDM vol. 1, 3.3.7.1)."""
        bits = 57 if self.state.cr4 & CR4_LA57 else 48
        return (address >> (bits - 1)) + 1 & (1 << (65 - bits)) - 1 in (0, 1)

    def read(self, address: int, size: int) -> int:
        """Read a little-endian number of ``size`` bytes."""
        data = b""
        for start, length in split_at_wrap(address, size, 64 if self.long_mode else 32):
            if self.long_mode and not (self.is_canonical(start) and self.is_canonical(start + length - 1)):
                raise self.fault(Vector.GP)
            data += self.memory.read(start, length, user=False)
        return int.from_bytes(data, "little")

    def descriptor(self, selector: int, outside: Vector) -> Descriptor:
        """Read the descriptor of a selector that is not null; ``outside`` is the fault beyond the limit."""
        base, limit = self._table(selector)
        offset = selector & 0xFFF8
        if offset + 7 > limit:
            raise self.fault(outside, selector)
        return Descriptor(base + offset, self.read(base + offset, 8))

    def _table(self, selector: int) -> tuple[int, int]:
        if not selector & _TABLE_INDICATOR:
            return self.state.gdtr
        ldtr = self.state.segment("ldtr")
        return (ldtr.base, ldtr.limit if ldtr.access_rights & AR_P else -1)

    def mark_accessed(self, descriptor: Descriptor) -> Iterable[Write]:
        """Make the write that sets the accessed bit, if it is clear."""
        if descriptor.access_rights & AR_ACCESSED:
            return ()
        access_byte = descriptor.raw >> 40 & 0xFF | AR_ACCESSED
        bits = 64 if self.long_mode else 32
        return wrapped_writes(descriptor.address + 5, bytes([access_byte]), bits, user=False)

    def tss(self, offset: int, size: int) -> int:
        """Read ``size`` bytes of the current TSS, all within its limit."""
        register = self.state.segment("tr")
        if offset + size - 1 > register.limit:
            raise self.fault(Vector.TS, register.selector)
        return self.read(register.base + offset, size)

    @property
    def tss_is_32_bit(self) -> bool:
        """Type 9 or 11, not 1 or 3."""
        return bool(self.state.segment("tr").access_rights & 8)
