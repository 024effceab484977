"""Random guests that patch themselves, made to order for comparing ways of running them.

A guest is a handful of functions on code pages whose frames are not in the order of their addresses; every page
is reachable at three aliases. Functions consist of units of 8 bytes; everything that a patch can produce is a
sequence of whole units, so that no guest ever executes garbage:

* arithmetic on r15d with an immediate of 4 bytes: stores of any size may change those 4 bytes,
* a conditional increment, so that functions hold several blocks,
* calls of later functions through a random alias (the call graph has no cycles),
* patches: stores, read-modify-writes and locked ones, to immediates of any function or to whole units, through a
  random alias; REP MOVS copies the units of one function over those of another.

All functions start at an odd place, so that units, immediates and blocks straddle pages.
"""

from __future__ import annotations

import random
import struct

import tiny
from tiny import CODE, DATA, PAGE, map_page

from vmm.guest.manifest import Policy

#: The code pages, in the order of their linear addresses.
FRAMES = (0x26000, 0x21000, 0x23000)
BASES = (0x4000_0000, 0x5000_0000, 0x6000_0000)
POOL = DATA + 0x100
POOL_UNITS = 16
UNIT = 8
#: Registers that hold the alias bases.
BASE_REGISTERS = ("r8", "r9", "r10")
EXTENDED = {"al": "r15b", "ax": "r15w", "eax": "r15d", "rax": "r15"}


def unit(text: str) -> bytes:
    """One instruction or more, padded with NOP to whole units."""
    code = tiny.assemble(text, 0)
    return code + b"\x90" * (-len(code) % UNIT)


def arithmetic(rng: random.Random) -> bytes:
    operation = rng.choice([b"\x41\x81\xc7", b"\x41\x81\xf7", b"\x41\x81\xef", b"\x45\x69\xff"])
    return operation + struct.pack("<I", rng.getrandbits(32) | 1) + b"\x90"


#: test r15d, r15d; jns +3; inc r15d
BRANCH = bytes.fromhex("4585ff 7903 41ffc7")
RET = b"\xc3" + b"\x90" * 7


class RandomGuest:
    """One guest, decided by its seed."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.start = PAGE - rng.choice([3, 12, 21, 30, 45])
        self.functions: list[list[bytes]] = []
        self.offsets: list[int] = []
        #: (function, index) of units that patches may replace as a whole, and so of immediates.
        self.plain: list[list[int]] = []
        self._lay_out()
        self._fill()

    # The functions

    def _lay_out(self) -> None:
        """Sizes and places first: the contents refer to them."""
        at = self.start
        self.shapes: list[list[str]] = []
        for number in range(self.rng.randint(3, 5)):
            shape = self.rng.choices(["plain", "branch", "call", "patch"], [8, 2, 2, 3], k=self.rng.randint(3, 8))
            shape = ["plain", "plain", *shape]
            self.shapes.append(shape)
            self.plain.append([])
            self.offsets.append(at)
            self.functions.append([])
            at += sum({"patch": 4}.get(kind, 1) for kind in shape) * UNIT + UNIT
            at += self.rng.choice([0, 0, 1, 64, 1700]) if number < 2 else 0
            position = 0
            for kind in shape:
                if kind == "plain":
                    self.plain[number].append(position)
                position += 4 if kind == "patch" else 1

    def _fill(self) -> None:
        for number, shape in enumerate(self.shapes):
            body = self.functions[number]
            for kind in shape:
                if kind == "plain":
                    body.append(arithmetic(self.rng))
                elif kind == "branch":
                    body.append(BRANCH)
                elif kind == "call":
                    body.append(self._call(number))
                else:
                    patch = self._patch()
                    body += [patch[i : i + UNIT] for i in range(0, 4 * UNIT, UNIT)]
            body.append(RET)

    def _call(self, number: int) -> bytes:
        if number + 1 == len(self.shapes):
            return BRANCH
        target = self.offsets[self.rng.randrange(number + 1, len(self.shapes))]
        here = self.offsets[number] + len(self.functions[number]) * UNIT
        return b"\xe8" + struct.pack("<i", target - here - 5) + b"\x90" * 3

    def _site(self) -> int:
        """The offset of a unit that may change."""
        function = self.rng.randrange(len(self.shapes))
        return self.offsets[function] + self.rng.choice(self.plain[function]) * UNIT

    def _pair(self) -> int:
        """The offset of two such units in a row: every function starts with them."""
        return self.offsets[self.rng.randrange(len(self.offsets))]

    def _patch(self) -> bytes:
        """One patch, in exactly four units."""
        rng, base = self.rng, self.rng.choice(BASE_REGISTERS)
        immediate = f"[{base} + {self._site() + 3}]"
        byte = f"[{base} + {self._site() + 3 + rng.randrange(4)}]"
        whole = f"[{base} + {self._site()}]"
        pair = f"[{base} + {self._pair()}]"
        pool = POOL + rng.randrange(POOL_UNITS - 2) * UNIT
        value = rng.getrandbits(31)
        text = rng.choice(
            [
                f"mov dword ptr {immediate}, r15d",
                f"mov dword ptr {immediate}, {value}",
                f"mov word ptr {immediate}, r15w",
                f"mov byte ptr {byte}, r15b",
                f"add dword ptr {immediate}, r15d",
                f"lock add dword ptr {immediate}, r15d",
                f"lock xadd dword ptr {immediate}, r15d",
                f"inc byte ptr {byte}",
                f"neg dword ptr {immediate}",
                f"lock not word ptr {immediate}",
                f"xchg dword ptr {immediate}, r15d",
                f"bts dword ptr {immediate}, {rng.randrange(32)}",
                f"mov eax, r15d; lock cmpxchg dword ptr {immediate}, r15d",
                f"rol dword ptr {immediate}, {rng.randrange(1, 31)}",
                f"movd xmm0, r15d; movss dword ptr {immediate}, xmm0",
                f"mov esi, {pool}; mov rax, [rsi]; mov qword ptr {whole}, rax",
                f"mov esi, {pool}; movq xmm0, [rsi]; movq qword ptr {whole}, xmm0",
                f"mov esi, {pool}; movups xmm0, [rsi]; movups xmmword ptr {pair}, xmm0",
                f"mov rax, {whole}; mov qword ptr {whole}, rax",
                f"mov esi, {pool}; lea rdi, {pair}; mov ecx, 2; rep movsq",
                f"mov esi, {pool}; lea rdi, {whole}; mov ecx, 8; rep movsb",
                f"lea rsi, {pair}; lea rdi, [{rng.choice(BASE_REGISTERS)} + {self._pair()}]; movsq; movsq",
            ]
        )
        code = unit(text)
        assert len(code) <= 4 * UNIT, text
        return code.ljust(4 * UNIT, b"\x90")

    # The machine

    def driver(self) -> str:
        """Calls every function a few times, through random aliases, patching in between."""
        lines = [f"mov {register}, {base}" for register, base in zip(BASE_REGISTERS, BASES, strict=True)]
        lines += [f"mov r15d, {self.rng.getrandbits(31)}", f"mov ebp, {self.rng.randint(2, 4)}", "round:"]
        for _ in range(self.rng.randint(4, 9)):
            base = self.rng.choice(BASES)
            lines.append(f"mov ebx, {base + self.rng.choice(self.offsets)}; call rbx")
            if self.rng.random() < 0.5:
                lines.append(f"mov dword ptr [{self.rng.choice(BASE_REGISTERS)} + {self._site() + 3}], r15d")
            if self.rng.random() < 0.3:
                lines.append("mov eax, r15d; out 0xe9, al")
        lines += ["dec ebp", "jnz round", "xor eax, eax", tiny.END]
        return "\n".join(lines)

    def segments(self) -> dict[int, str | bytes]:
        image = bytearray(b"\xcc" * (len(FRAMES) * PAGE))
        for offset, body in zip(self.offsets, self.functions, strict=True):
            code = b"".join(body)
            image[offset : offset + len(code)] = code
        pages: dict[int, str | bytes] = {
            frame: bytes(image[i * PAGE : (i + 1) * PAGE]) for i, frame in enumerate(FRAMES)
        }
        pool = b"".join(arithmetic(self.rng) for _ in range(POOL_UNITS))
        return {CODE: self.driver(), POOL: pool, **pages}

    def build(self, segments: dict[int, str | bytes], *, options, policy: Policy) -> tiny.Tiny:
        maps = [map_page(base + i * PAGE, frame) for base in BASES for i, frame in enumerate(FRAMES)]
        return tiny.build(segments, maps=maps, options=options, policy=policy, code=(CODE, *FRAMES))
