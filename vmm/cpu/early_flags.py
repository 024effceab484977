"""Arithmetic flags at a refused access (quirk "early-flags").

The engine keeps the operands of the last arithmetic instruction and computes flags from them when it must. RCL,
RCR and SETcc compute them *before* they touch memory, into the place of an operand; if the access is then refused,
the engine forgets that it did, and would compute flags from flags. The flags themselves are safe in that place.

RCL and RCR always compute. SETcc does where it cannot tell its condition from the operands, which depends on
whether the instruction that set the flags was translated in the same block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from iced_x86 import Decoder, Mnemonic, Register

#: CF, PF, AF, ZF, SF, OF.
ARITHMETIC: Final = 0x8D5

_PREFIXES: Final = bytes([*range(0x40, 0x50), 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3])
_ROTATE: Final = 8
_O, _B, _Z, _BE, _S, _P, _L, _LE = range(8)
# QEMU's names for what the operands belong to (CCOp of target/i386/cpu.h).
_OP_EFLAGS: Final = 1
_OP_SUB: Final = range(14, 18)
_OP_CLR: Final = 49
_BY_COUNT: Final = frozenset(
    {Mnemonic.SHL, Mnemonic.SHR, Mnemonic.SAR, Mnemonic.SHLD, Mnemonic.SHRD, Mnemonic.ROL, Mnemonic.ROR}
)


def are_computed(code: bytes, operation: int, source: int, bits: int, block: Callable[[], bytes | None]) -> bool:
    """Whether the instruction whose memory access was refused has left the flags in place of an operand.

    ``operation`` and ``source`` are the engine's lazy flags. ``block`` gives the guest code from the start of the
    engine's block to the instruction (empty in a step), or None if that is not known.
    """
    kind = _kind(code)
    if kind is None or kind == _B or operation in (_OP_EFLAGS, _OP_CLR) or source & ~ARITHMETIC:
        return False
    if kind in (_ROTATE, _O, _P):
        return True
    if not _sets_flags(block() or b"", bits):
        return True
    return kind in (_BE, _L, _LE) and operation not in _OP_SUB


def _kind(code: bytes) -> int | None:
    """The condition of a SETcc, ``_ROTATE`` for RCL and RCR; None for everything else and without memory operand."""
    body = code.lstrip(_PREFIXES)
    if len(body) < 3:
        return None
    if body[0] == 0x0F and body[1] & 0xF0 == 0x90 and body[2] < 0xC0:
        return body[1] >> 1 & 7
    if body[0] in b"\xc0\xc1\xd0\xd1\xd2\xd3" and body[1] >> 4 & 3 == 1 and body[1] < 0xC0:
        return _ROTATE
    return None


def _sets_flags(code: bytes, bits: int) -> bool:
    """Whether the translation knows what set the flags after ``code``."""
    known = False
    for instruction in Decoder(bits, code, ip=0):
        if instruction.rflags_modified & _ARITHMETIC_IN_ICED:
            by_count = instruction.mnemonic in _BY_COUNT and instruction.op_register(instruction.op_count - 1) == Register.CL
            known = not by_count
    return known


#: OF, SF, ZF, AF, CF, PF as iced-x86 numbers them.
_ARITHMETIC_IN_ICED: Final = 0x3F
