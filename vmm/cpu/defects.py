"""Instructions that the engine executes wrongly, and how they are executed rightly: by stepping.

SHLD and SHRD by an immediate count address a RIP-relative operand one byte too low (quirk "shld-rip"): the engine
takes the end of the instruction before it has read the immediate. With a displacement that is one larger they do
what a processor does. Blocks that contain one are never executed freely; they are stepped, and the stepping engine
fetches the corrected bytes.

RCL and RCR of memory change the flags before they store, so that a refused store leaves flags that nobody can put
right any more (quirk "early-flags"). They are stepped, too: a step keeps the flags from before it.
"""

from __future__ import annotations

import re
from typing import Final

from iced_x86 import Decoder, Instruction, Mnemonic, OpKind

#: Opcode and ModRM of SHLD and SHRD by an immediate with a RIP-relative operand; the displacement follows.
_CANDIDATE: Final = re.compile(rb"\x0f[\xa4\xac][\x05\x0d\x15\x1d\x25\x2d\x35\x3d]", re.DOTALL)
_MNEMONICS: Final = (Mnemonic.SHLD, Mnemonic.SHRD)


#: Opcode and ModRM of RCL and RCR with a memory operand.
_ROTATE: Final = re.compile(rb"[\xc0\xc1\xd0-\xd3][\x10-\x1f\x50-\x5f\x90-\x9f]", re.DOTALL)
_ROTATES: Final = (Mnemonic.RCL, Mnemonic.RCR)


def block_is_affected(code: bytes, bits: int) -> bool:
    """Whether a block of guest code contains an instruction that the engine gets wrong."""
    if _ROTATE.search(code) is None and (bits != 64 or _CANDIDATE.search(code) is None):
        return False
    return any(_is_affected(instruction) or _is_rotate(instruction) for instruction in Decoder(bits, code, ip=0))


def corrected(code: bytes, bits: int) -> bytes:
    """The bytes to fetch instead of the instruction at the start of ``code``; none if it needs no correction."""
    if bits != 64 or _CANDIDATE.search(code) is None:
        return b""
    decoder = Decoder(64, code, ip=0)
    instruction = decoder.decode()
    if not _is_affected(instruction):
        return b""
    place = decoder.get_constant_offsets(instruction).displacement_offset
    displacement = int.from_bytes(code[place : place + 4], "little") + 1 & 0xFFFF_FFFF
    return code[:place] + displacement.to_bytes(4, "little") + code[place + 4 : instruction.len]


def _is_affected(instruction: Instruction) -> bool:
    return instruction.mnemonic in _MNEMONICS and instruction.is_ip_rel_memory_operand


def _is_rotate(instruction: Instruction) -> bool:
    return instruction.mnemonic in _ROTATES and instruction.op0_kind == OpKind.MEMORY
