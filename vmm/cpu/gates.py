"""IDT gates and the checks that lead from a vector to a code segment (SDM vol. 3, 6.11 and 6.14.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from vmm.cpu.entry import AR_D, AR_L
from vmm.cpu.events import GuestFault, Vector

if TYPE_CHECKING:
    from vmm.cpu.descriptors import Descriptor, Tables
    from vmm.cpu.events import Event

_TASK = 0x5
_LEGACY_GATES = frozenset({_TASK, 0x6, 0x7, 0xE, 0xF})
_LONG_GATES = frozenset({0xE, 0xF})
_IDT_BIT = 2


# Gate, 8 bytes in protected mode, 16 bytes in IA-32e mode:
#
#  127      96 95      64 63      48 47 46-45 44 43-40 39   35 34-32 31      16 15       0
# +-----------+----------+----------+--+-----+--+-----+-------+-----+----------+----------+
# | reserved  | offset   | offset   |P | DPL |0 |type |   -   | IST | selector | offset   |
# |           | 63:32    | 31:16    |  |     |  |     |       |     |          | 15:0     |
# +-----------+----------+----------+--+-----+--+-----+-------+-----+----------+----------+
#
# Types: 5 task gate; 6 and E interrupt gate, 7 and F trap gate, of 16 and 32 (or 64) bits.
@frozen(slots=True)
class Gate:
    """One entry of the IDT; offset bits 63:32 and IST count in IA-32e mode only."""

    raw: int

    @property
    def type(self) -> int:
        """Bits 44:40: S must be 0, so that a valid type is at most 0xf."""
        return self.raw >> 40 & 0x1F

    @property
    def dpl(self) -> int:
        """0 to 3."""
        return self.raw >> 45 & 3

    @property
    def present(self) -> bool:
        """P."""
        return bool(self.raw >> 47 & 1)

    @property
    def selector(self) -> int:
        """The handler's code segment, or the TSS of a task gate."""
        return self.raw >> 16 & 0xFFFF

    @property
    def offset(self) -> int:
        """The handler's address in its code segment; 16 bits of it in a 16-bit gate."""
        low = self.raw & 0xFFFF
        if self.operand_size == 2:
            return low
        return low | self.raw >> 32 & 0xFFFF_FFFF_FFFF_0000

    @property
    def ist(self) -> int:
        """0, or the number 1 to 7 of an interrupt stack."""
        return self.raw >> 32 & 7

    @property
    def operand_size(self) -> int:
        """Bytes in a stack slot of a protected-mode gate, 2 or 4."""
        return 4 if self.type & 8 else 2

    @property
    def is_task_gate(self) -> bool:
        """The handler is another task."""
        return self.type == _TASK

    @property
    def is_interrupt_gate(self) -> bool:
        """The handler starts with IF clear."""
        return not self.type & 1


def find_gate(tables: Tables, event: Event, cpl: int) -> Gate:
    """Find the gate that the event goes through, checked. Raises ``GuestFault`` and ``PageFault``."""
    size, types = (16, _LONG_GATES) if tables.long_mode else (8, _LEGACY_GATES)
    base, limit = tables.state.idtr
    start = event.vector * size
    if start + size - 1 > limit:
        raise _gate_fault(tables, Vector.GP, event)
    gate = Gate(tables.read(base + start, size))
    if gate.type not in types or (event.checks_gate_dpl and gate.dpl < cpl):
        raise _gate_fault(tables, Vector.GP, event)
    if not gate.present:
        raise _gate_fault(tables, Vector.NP, event)
    return gate


def _gate_fault(tables: Tables, vector: Vector, event: Event) -> GuestFault:
    return GuestFault(vector, event.vector << 3 | _IDT_BIT | tables.ext)


def find_code_segment(tables: Tables, gate: Gate, cpl: int) -> Descriptor:
    """Find the code segment of a gate, no task gate, checked. Raises ``GuestFault`` and ``PageFault``."""
    if not gate.selector & 0xFFFC:
        raise tables.fault(Vector.GP)
    code = tables.descriptor(gate.selector, outside=Vector.GP)
    if not code.is_code or code.dpl > cpl:
        raise tables.fault(Vector.GP, gate.selector)
    if tables.long_mode and code.access_rights & (AR_L | AR_D) != AR_L:
        raise tables.fault(Vector.GP, gate.selector)
    if not code.present:
        raise tables.fault(Vector.NP, gate.selector)
    return code


def handler_cpl(code: Descriptor, cpl: int) -> int:
    """Compute the privilege level that the handler runs at."""
    return cpl if code.is_conforming_code else code.dpl
