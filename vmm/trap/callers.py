"""Who called the function that stores to code: return addresses on the stack of a supervisor, as far as they tell.

Most code is patched by a routine that copies memory; whoever wants to know what is being patched needs its caller. Code
without frame pointers cannot be unwound without its tables, so the stack is searched. A quadword is taken for a return
address if it is within reach of RIP, leads to a frame that holds code, and stands behind a CALL. What an earlier call
has left on a stack that nothing has overwritten since passes for one, too: these are candidates, innermost first.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final

from attrs import define
from iced_x86 import Mnemonic

from vmm.cpu.context import Context
from vmm.decode import decode
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frames, FrameState
from vmm.mmu import Mmu

#: Quadwords of the stack that are looked at, and how many return addresses are kept.
DEPTH: Final = 32
MOST: Final = 6
#: How far from RIP a caller may be, in bytes: as far as CALL with a displacement reaches.
_REACH: Final = 1 << 31
_SHORTEST_CALL: Final = 2
#: FF /2 with a SIB byte and a displacement of 32 bits.
_LONGEST_CALL: Final = 7
_MASK: Final = (1 << 64) - 1


@define(slots=True)
class Callers:
    """Looks for return addresses in the memory of one vCPU, without any effect on the guest.

    A copy is many stores by one page of code with one stack: the answer is kept until one of them is another.
    """

    memory: GuestMemory
    frames: Frames
    mmu: Mmu
    context: Context
    _asked: tuple[int, bytes] = (0, b"")
    _answer: tuple[int, ...] = ()

    def find(self, pc: int) -> tuple[int, ...]:
        """Up to ``MOST`` return addresses, innermost first; none unless the vCPU is in 64-bit mode and ring 0.

        ``pc`` is the linear address of the instruction at work.
        """
        if self.context.code_bits != 64 or self.context.cpl:
            return ()
        asked = pc & -PAGE, self._stack(self.context.rsp)
        if asked != self._asked:
            self._asked, self._answer = asked, self._candidates(*asked)
        return self._answer

    def _candidates(self, pc: int, stack: bytes) -> tuple[int, ...]:
        lowest, highest = pc - _REACH, pc + _REACH
        found: list[int] = []
        for word in dict.fromkeys(struct.unpack_from(f"<{len(stack) // 8}Q", stack)):
            if lowest <= word < highest and _ends_in_call(self._code_before(word)):
                found.append(word)
                if len(found) == MOST:
                    break
        return tuple(found)

    def _stack(self, rsp: int) -> bytes:
        """The stack from an address up, as far as it is mapped."""
        data = b""
        while len(data) < 8 * DEPTH:
            at = rsp + len(data) & _MASK
            host = self.mmu.peek(at)
            if host is None:
                break
            data += self.memory.read(host, min(8 * DEPTH - len(data), PAGE - at % PAGE))
        return data

    def _code_before(self, address: int) -> bytes:
        """The bytes in front of an address that a CALL could consist of; none where nothing is executed."""
        last = address - 1 & _MASK
        size = min(_LONGEST_CALL, last % PAGE + 1)
        code = self._executed(last + 1 - size, size)
        if code and size < _LONGEST_CALL:
            rest = _LONGEST_CALL - size
            code = self._executed(last + 1 - _LONGEST_CALL & _MASK, rest) + code
        return code

    def _executed(self, gva: int, size: int) -> bytes:
        """Bytes within one page, if its frame holds code."""
        host = self.mmu.fetch_host(gva)
        if host is None or self.frames.at(self.memory.home(host)).state is FrameState.DATA:
            return b""
        return self.memory.read(host, size)


@lru_cache(maxsize=4096)
def _ends_in_call(code: bytes) -> bool:
    """Whether a CALL ends where ``code`` does."""
    for length in range(_SHORTEST_CALL, len(code) + 1):
        decoded = decode(code[-length:], 64)
        if decoded.mnemonic == Mnemonic.CALL and decoded.length == length:
            return True
    return False
