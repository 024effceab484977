"""What an instruction is and which memory it touches, from its bytes.

The engines tell the page of a refused access, not the address; the address comes from here. Decoding is
remembered by the instruction's bytes, so that a trap in a loop costs one dictionary look-up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final, Protocol

from attrs import frozen
from iced_x86 import (
    Code,
    CodeSize,
    Decoder,
    Formatter,
    FormatterSyntax,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    Mnemonic,
    OpAccess,
    Register,
    RegisterExt,
)

from vmm.cpu.context import Context
from vmm.cpu.defects import corrected

MAX_LENGTH: Final = 15

_READS: Final = {OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
_WRITES: Final = {OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
_GPR64: Final = {
    Register.RAX: 0, Register.RCX: 1, Register.RDX: 2, Register.RBX: 3, Register.RSP: 4, Register.RBP: 5,
    Register.RSI: 6, Register.RDI: 7, Register.R8: 8, Register.R9: 9, Register.R10: 10, Register.R11: 11,
    Register.R12: 12, Register.R13: 13, Register.R14: 14, Register.R15: 15,
}  # fmt: skip
_SEGMENTS: Final = {
    Register.ES: 0, Register.CS: 1, Register.SS: 2, Register.DS: 3, Register.FS: 4, Register.GS: 5,
}  # fmt: skip
_IP: Final = {Register.RIP, Register.EIP}
_BIT_STRINGS: Final = {Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC}
_MAPPING_CHANGERS: Final = {Mnemonic.INVLPG, Mnemonic.INVPCID, Mnemonic.LMSW, Mnemonic.WRMSR}
#: Instructions that read or write a descriptor table or the TSS with supervisor rights at any CPL.
_DESCRIPTOR_USERS: Final = {
    Mnemonic.MOV, Mnemonic.POP, Mnemonic.LDS, Mnemonic.LES, Mnemonic.LFS, Mnemonic.LGS, Mnemonic.LSS,
    Mnemonic.CALL, Mnemonic.JMP, Mnemonic.RETF, Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ, Mnemonic.LAR,
    Mnemonic.LSL, Mnemonic.VERR, Mnemonic.VERW, Mnemonic.IN, Mnemonic.OUT, Mnemonic.INSB, Mnemonic.INSW,
    Mnemonic.INSD, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD,
}  # fmt: skip


class Registers(Protocol):
    """General registers in encoding order; a ctypes array, which is cheaper to index than to copy."""

    def __getitem__(self, index: int, /) -> int:
        """Register ``index``, 0 to 15."""


@frozen(slots=True)
class MemoryOperand:
    """One memory access of an instruction, as a recipe for its linear address.

    ``size`` is in bytes, 0 if it depends on more than the instruction.
    """

    segment: int
    base: int | None
    index: int | None
    scale: int
    displacement: int
    from_ip: bool
    mask: int
    size: int
    reads: bool
    writes: bool
    #: How much of the index register counts: all of it, or AL (XLAT).
    index_mask: int = 0xFFFF_FFFF_FFFF_FFFF
    #: The register that selects a bit of a bit string, for BT and its kin.
    bit_offset: int | None = None

    def address(self, rip: int, gprs: Registers, segment_base: Callable[[int], int]) -> int:
        """The linear address, given RIP of the instruction and the general registers in encoding order."""
        offset = self.displacement + (rip if self.from_ip else 0)
        if self.base is not None:
            offset += gprs[self.base]
        if self.index is not None:
            offset += (gprs[self.index] & self.index_mask) * self.scale
        if self.bit_offset is not None:
            offset += self._word_of_bit(gprs[self.bit_offset])
        linear = (offset & self.mask) + segment_base(self.segment)
        return linear & (0xFFFF_FFFF_FFFF_FFFF if self.mask >> 32 else 0xFFFF_FFFF)

    def _word_of_bit(self, register: int) -> int:
        """The offset of the operand-sized word that holds a bit, given as a signed operand-sized number."""
        bits = 8 * self.size
        number = register & (1 << bits) - 1
        return ((number ^ 1 << bits - 1) - (1 << bits - 1)) // bits * self.size


@frozen(slots=True)
class Decoded:
    """One decoded instruction. ``length`` is 0 if the bytes are no instruction."""

    length: int
    mnemonic: int
    operands: tuple[MemoryOperand, ...]
    uses_descriptors: bool
    #: Whether cached translations may be void after it: INVLPG, INVPCID, LMSW, WRMSR, a move to a control register.
    changes_mappings: bool
    #: What the engine must fetch instead, where it gets the instruction wrong (see ``vmm.cpu.defects``).
    correction: bytes = b""
    #: Whether it is a string instruction with a REP prefix.
    repeats: bool = False
    #: Whether it is a MOV to CR3.
    loads_cr3: bool = False

    def modifies(self, address: int, locate: Callable[[MemoryOperand], int]) -> bool:
        """Whether it reads and writes the memory at a linear address (read-modify-write)."""
        return any(
            operand.reads and operand.writes and locate(operand) <= address < locate(operand) + max(operand.size, 1)
            for operand in self.operands
        )

    @property
    def is_hlt(self) -> bool:
        """Whether it is HLT."""
        return self.mnemonic == Mnemonic.HLT

    @property
    def is_invlpg(self) -> bool:
        """Whether it is INVLPG, whose operand is an address that it does not access."""
        return self.mnemonic == Mnemonic.INVLPG

    @property
    def is_int1(self) -> bool:
        """Whether it is INT1, with any prefixes."""
        return self.mnemonic == Mnemonic.INT1


def operand_address(operand: MemoryOperand, context: Context) -> int:
    """The linear address of a memory operand in a saved state."""
    flat = context.code_bits == 64

    def segment_base(index: int) -> int:
        if flat and index < 4:
            return 0
        return context.segment_base(index)

    return operand.address(context.rip, context.gprs, segment_base)


@lru_cache(maxsize=65536)
def decode(code: bytes, bits: int) -> Decoded:
    """Decode the first instruction in ``code`` (up to 15 bytes used) for a 16-, 32- or 64-bit code segment."""
    instruction = Decoder(bits, code[:MAX_LENGTH], ip=0).decode()
    if instruction.code == Code.INVALID:
        return Decoded(0, Mnemonic.INVALID, (), uses_descriptors=False, changes_mappings=False)
    info = InstructionInfoFactory().info(instruction)
    operands = tuple(
        _operand(instruction, used, bits)
        for used in info.used_memory()
        if used.access not in (OpAccess.NO_MEM_ACCESS, OpAccess.NONE)
    )
    if instruction.mnemonic == Mnemonic.INVLPG:
        operands = (_named(instruction, bits),)
    far = instruction.mnemonic not in (Mnemonic.MOV, Mnemonic.POP, Mnemonic.CALL, Mnemonic.JMP)
    loads_segment = any(
        RegisterExt.is_segment_register(instruction.op_register(i)) for i in range(instruction.op_count)
    )
    return Decoded(
        length=instruction.len,
        mnemonic=instruction.mnemonic,
        operands=operands,
        uses_descriptors=instruction.mnemonic in _DESCRIPTOR_USERS
        and (far or loads_segment or _is_far(instruction)),
        changes_mappings=instruction.mnemonic in _MAPPING_CHANGERS
        or (instruction.op_count > 0 and Register.CR0 <= instruction.op_register(0) <= Register.CR15),
        repeats=_repeats(instruction),
        loads_cr3=instruction.mnemonic == Mnemonic.MOV and instruction.op0_register == Register.CR3,
        correction=corrected(code, bits),
    )


def _repeats(instruction: Instruction) -> bool:
    return instruction.is_string_instruction and (instruction.has_rep_prefix or instruction.has_repne_prefix)


def _is_far(instruction: Instruction) -> bool:
    return instruction.is_call_far or instruction.is_jmp_far or (
        instruction.is_call_far_indirect or instruction.is_jmp_far_indirect
    )


def _operand(instruction: Instruction, used: object, bits: int) -> MemoryOperand:
    base, index = used.base, used.index  # type: ignore[attr-defined]
    from_ip = base in _IP or (base == Register.NONE and instruction.is_ip_rel_memory_operand)
    size = {CodeSize.CODE16: 16, CodeSize.CODE32: 32, CodeSize.CODE64: 64}.get(used.address_size, bits)  # type: ignore[attr-defined]
    return MemoryOperand(
        segment=_SEGMENTS.get(used.segment, 3),  # type: ignore[attr-defined]
        base=None if base in _IP else _gpr(base),
        index=_gpr(index),
        scale=used.scale,  # type: ignore[attr-defined]
        displacement=used.displacement,  # type: ignore[attr-defined]
        from_ip=from_ip,
        mask=(1 << size) - 1,
        size=MemorySizeExt.size(used.memory_size) or _element_size(instruction),  # type: ignore[attr-defined]
        reads=used.access in _READS,  # type: ignore[attr-defined]
        writes=used.access in _WRITES,  # type: ignore[attr-defined]
        index_mask=0xFF if index == Register.AL else 0xFFFF_FFFF_FFFF_FFFF,
        bit_offset=_gpr(instruction.op1_register) if instruction.mnemonic in _BIT_STRINGS else None,
    )


def _named(instruction: Instruction, bits: int) -> MemoryOperand:
    """The operand of an instruction that names memory and does not access it."""
    base, index = instruction.memory_base, instruction.memory_index
    wide = RegisterExt.size(base if base != Register.NONE else index)
    size = 8 * (wide or instruction.memory_displ_size or bits // 8)
    return MemoryOperand(
        segment=_SEGMENTS.get(instruction.memory_segment, 3),
        base=None if base in _IP else _gpr(base),
        index=_gpr(index),
        scale=instruction.memory_index_scale,
        displacement=instruction.memory_displacement,
        from_ip=instruction.is_ip_rel_memory_operand,
        mask=(1 << size) - 1,
        size=0,
        reads=False,
        writes=False,
    )


def _element_size(instruction: Instruction) -> int:
    """Bytes of one iteration of a repeated string instruction, whose whole size depends on the count."""
    return MemorySizeExt.size(instruction.memory_size) if _repeats(instruction) else 0


def _gpr(register: int) -> int | None:
    if register == Register.NONE:
        return None
    # The library types registers as an enumeration but hands out plain integers.
    return _GPR64.get(RegisterExt.full_register(register))  # type: ignore[arg-type]


_PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_REPEAT: Final = frozenset(b"\xf2\xf3")


def io_operands(code: bytes) -> tuple[bool, bool, bool]:
    """Of an IN, OUT, INS or OUTS: whether it is a string instruction, repeated, with an immediate port."""
    repeated = False
    for byte in code:
        if byte in _REPEAT:
            repeated = True
        elif byte not in _PREFIXES and byte & 0xF0 != 0x40:
            return byte & 0xFC == 0x6C, repeated and byte & 0xFC == 0x6C, byte & 0xFC == 0xE4
    return False, False, False


_formatter = Formatter(FormatterSyntax.INTEL)
_formatter.hex_prefix = "0x"
_formatter.hex_suffix = ""
_formatter.space_after_operand_separator = True


def disassemble(code: bytes, address: int, bits: int, *, limit: int) -> list[str]:
    """Up to ``limit`` instructions as Intel-syntax text; bytes that are none show as ``(bad)``."""
    lines: list[str] = []
    for instruction in Decoder(bits, code, ip=address):
        if len(lines) == limit:
            break
        bad = instruction.code == Code.INVALID
        lines.append("(bad)" if bad else _formatter.format(instruction))
    return lines


def lengths(code: bytes, bits: int) -> tuple[tuple[int, bool], ...]:
    """Of each instruction in ``code``: its length in bytes, and whether it is a REP string instruction."""
    return tuple((instruction.len, _repeats(instruction)) for instruction in Decoder(bits, code, ip=0))
