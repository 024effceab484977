"""The instruction at which the guest has come out: what it is, and what it was reaching for."""

from __future__ import annotations

from vmm.cpu.context import Context
from vmm.cpu.engine import FETCH, READ
from vmm.decode import Decoded, MemoryOperand, decode, operand_address
from vmm.memory import PAGE
from vmm.memory.frames import Frame
from vmm.mmu.translation import Mmu


class CurrentInstruction:
    """The instruction at RIP of a vCPU's saved state."""

    def __init__(self, context: Context, mmu: Mmu) -> None:
        #: (linear address, bytes) of a REP that has overwritten itself and is not finished: it goes on with these.
        self.held: tuple[int, bytes] | None = None
        self._context = context
        self._mmu = mmu
        self._known: tuple[int, Decoded] | None = None

    @property
    def pc(self) -> int:
        """Its linear address."""
        return self._context.pc

    @property
    def code(self) -> bytes:
        """Up to 15 bytes from there on."""
        return self.bytes_at(self._context.pc)

    @property
    def decoded(self) -> Decoded:
        """What it is."""
        pc = self._context.pc
        if self._known is not None and self._known[0] == pc:
            return self._known[1]
        return decode(self.bytes_at(pc), self._context.code_bits)

    def bytes_at(self, gva: int) -> bytes:
        """Up to 15 bytes of an instruction at a linear address, as it is going to be fetched."""
        if self.held is not None and self.held[0] == gva:
            return self.held[1]
        return self._mmu.code_bytes(gva)

    def pin(self, pc: int, decoded: Decoded) -> None:
        """It is known to be this, until ``unpin``."""
        self._known = pc, decoded

    def unpin(self) -> None:
        """Look again next time."""
        self._known = None

    def address_of(self, operand: MemoryOperand) -> int:
        """The linear address of one of its memory operands."""
        return operand_address(operand, self._context)

    def faulting_address(self, page: int, access: int) -> int:
        """The exact linear address of an access of it that was refused.

        The first byte of the access that lies on the linear page; the page itself if the instruction does not tell.
        """
        if access == FETCH:
            pc = self._context.pc
            return pc if pc & -PAGE == page else page
        for operand in self.decoded.operands:
            if operand.reads if access == READ else operand.writes:
                address = operand_address(operand, self._context)
                if address < page + PAGE and address + max(operand.size, 1) > page:
                    return max(address, page)
        return page

    def modifies(self, address: int) -> bool:
        """Whether it reads and writes the memory at a linear address (read-modify-write)."""
        return self.decoded.modifies(address, self.address_of)

    def lies_in(self, frame: Frame) -> bool:
        """Whether any byte of it lies in a frame."""
        pc = self._context.pc
        hosts = (self._mmu.peek(gva) for gva in (pc, pc + max(self.decoded.length, 1) - 1))
        return any(host is not None and host & -PAGE == frame.hpa for host in hosts)

    def uses_stack(self, page: int) -> bool:
        """Whether it reaches a linear page by SS (a non-canonical address is then #SS)."""
        return any(o.segment == 2 and self.address_of(o) & -PAGE == page for o in self.decoded.operands)
