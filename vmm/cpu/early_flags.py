"""Arithmetic flags at a refused SETcc (quirk "early-flags").

The engine keeps the operands of the last arithmetic instruction and computes flags from them when it must. SETcc
with a memory operand may compute them *before* it stores, into the place of an operand; if the store is then
refused, the engine forgets that it did, and would compute flags from flags. The flags themselves are safe in that
place. Whether it computes depends on the condition, the operation, and on whether the instruction that set the
flags was translated in the same block.
"""

from __future__ import annotations

from typing import Final

from iced_x86 import Decoder, Mnemonic, Register

#: CF, PF, AF, ZF, SF, OF in RFLAGS, and as iced-x86 numbers them.
ARITHMETIC: Final = 0x8D5
_ARITHMETIC_IN_ICED: Final = 0x3F

_PREFIXES: Final = bytes([*range(0x40, 0x50), 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3])
# Conditions as opcodes have them, without the bit that negates.
_O, _B, _Z, _BE, _S, _P, _L, _LE = range(8)
# What CC_OP may be (QEMU, target/i386/cpu.h).
_OP_EFLAGS: Final = 1
_OP_SUB: Final = range(14, 18)
_OP_CLR: Final = 49
_BY_COUNT: Final = frozenset({Mnemonic.SHL, Mnemonic.SHR, Mnemonic.SAR, Mnemonic.SHLD, Mnemonic.SHRD})


def is_conditional_store(code: bytes) -> bool:
    """Whether the instruction is SETcc with a memory operand."""
    return _condition(code) is not None


def computes_flags(code: bytes, operation: int, block: bytes | None, bits: int) -> bool:
    """Whether this SETcc has put the flags into CC_SRC before its store was refused.

    ``operation`` is CC_OP, ``block`` the guest code from the start of the engine's block to the SETcc, None if that
    is not known.
    """
    condition = _condition(code)
    if condition in (None, _B) or operation in (_OP_EFLAGS, _OP_CLR):
        return False
    if condition in (_O, _P) or not _sets_flags(block or b"", bits):
        return True
    return condition in (_BE, _L, _LE) and operation not in _OP_SUB


def _condition(code: bytes) -> int | None:
    if b"\x0f" not in code[:4]:
        return None
    body = code.lstrip(_PREFIXES)
    if len(body) > 2 and body[0] == 0x0F and body[1] & 0xF0 == 0x90 and body[2] < 0xC0:
        return body[1] >> 1 & 7
    return None


def _sets_flags(code: bytes, bits: int) -> bool:
    """Whether the engine knows, after these instructions, which operation the flags come from."""
    known = False
    for instruction in Decoder(bits, code, ip=0):
        if instruction.rflags_modified & _ARITHMETIC_IN_ICED:
            last = instruction.op_register(instruction.op_count - 1) if instruction.op_count else Register.NONE
            known = not (instruction.mnemonic in _BY_COUNT and last == Register.CL)
    return known
