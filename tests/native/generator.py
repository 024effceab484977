"""Random programs that patch themselves: each seed is one, always the same.

Layout: the main program at 0x10000, three frames of small functions behind it, data, an IDT with its handlers. The
frames are reached through identity and four aliases, two of which put frames next to each other that are not, and
one of which maps one frame twice in a row. The handlers note CR2, error code, RIP and flags, and go on at R15.
"""

from __future__ import annotations

import random
import re
from typing import Final

from keystone import KS_ARCH_X86, KS_MODE_64, Ks  # type: ignore[import-untyped]

from .program import BASE, Alias, Program
from .stores import UNALIGNED

_P1, _P2, _P3 = 0x14000, 0x15000, 0x16000
DATA, IDT, _HANDLERS, LOG = 0x20000, 0x28000, 0x2A000, 0x2C000
_READ_ONLY, _NO_EXECUTE, _SUPERVISOR, _HOLE = 0xE000000, 0xE001000, 0xE002000, 0xE003000
RSP0, _STACK = 0x34000, 0x3F000
_MAPS: Final = (
    Alias(BASE, BASE, 0x70000),
    Alias(0x8000000, _P2),
    Alias(0x8001000, _P1),
    Alias(0x9000000, _P1),
    Alias(0x9001000, _P1),
    Alias(0xA000000, _P1, 0x3000),
    Alias(0xB000000, _P3),
    Alias(0xB001000, DATA),
    Alias(0xB002000, _P2),
    Alias(_READ_ONLY, _P1, access="rx"),
    Alias(_NO_EXECUTE, _P1, access="rw"),
)
#: Linear addresses of each function frame.
_VIEWS: Final = {
    _P1: (_P1, 0x8001000, 0x9000000, 0x9001000, 0xA000000),
    _P2: (_P2, 0x8000000, 0xA001000, 0xB002000),
    _P3: (_P3, 0xA002000, 0xB000000),
}
_SLOT: Final = 32
_FUNCTIONS: Final = 40  # slots of a frame that hold functions; the rest of it is scratch
_SCRATCH: Final = 0x800
_REGISTERS: Final = ("rbx", "rbp", "r8", "r9", "r12", "r13")
_CONDITIONS: Final = ["o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g"]
_VECTORS: Final = (0, 1, 3, 6, 12, 13, 14, 16, 0x81)
_WITH_ERROR_CODE: Final = (12, 13, 14)
_ks = Ks(KS_ARCH_X86, KS_MODE_64)


def assemble(text: str, address: int = BASE) -> bytes:
    """Machine code for Intel-syntax text."""
    encoding, _ = _ks.asm(text, address)
    return bytes(encoding)


def _by_register(statement: str) -> str:
    """The statement with an absolute operand turned into one by RDI (the assembler gets absolute ones wrong)."""
    found = re.search(r"\[(\d+)\]", statement)
    return statement if found is None else f"mov edi, {found[1]}; {statement.replace(found[0], '[rdi]')}"


def generate(seed: int) -> Program:
    """The program of a seed."""
    return _Generator(seed).program()


def handlers() -> dict[int, bytes]:
    """IDT and handlers: note what happened, go on at R15."""
    idt = bytearray(16 * 256)
    code = bytearray()
    for vector in _VECTORS:
        address = _HANDLERS + len(code)
        dpl = 3 if vector in (3, 0x81) else 0
        low = address & 0xFFFF | 0x08 << 16 | (0x8E00 | dpl << 13) << 32 | (address >> 16) << 48
        idt[16 * vector : 16 * vector + 8] = low.to_bytes(8, "little")
        push = "" if vector in _WITH_ERROR_CODE else "push 0;"
        code += assemble(
            f"""{push} push rax; push rbx; mov ebx, {LOG}; mov rbx, qword ptr [rbx]; mov rax, cr2;
            mov qword ptr [rbx], rax;
            mov rax, qword ptr [rsp + 16]; mov qword ptr [rbx + 8], rax;
            mov rax, qword ptr [rsp + 24]; mov qword ptr [rbx + 16], rax;
            mov rax, qword ptr [rsp + 40]; mov qword ptr [rbx + 24], rax; mov byte ptr [rbx + 32], {vector};
            add rbx, 40; mov eax, {LOG}; mov qword ptr [rax], rbx;
            mov qword ptr [rsp + 24], r15; pop rbx; pop rax; add rsp, 8; iretq""",
            address,
        )
    return {IDT: bytes(idt), _HANDLERS: bytes(code), LOG: (LOG + 0x40).to_bytes(8, "little")}


class _Generator:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.labels = 0

    def program(self) -> Program:
        r = self.random
        code = handlers() | {frame: self.frame() for frame in _VIEWS}
        code[DATA] = bytes(r.choice(b"\x90\x41\xff\xc0\xf8\xc3") for _ in range(0x1000))
        body = "\n".join(self.action() for _ in range(r.randint(15, 40)))
        rounds = r.choice([1, 2, 3, 5, 20])
        text = f"""
            mov r14d, {rounds}
            again: {body}
            dec r14d
            jz done
            jmp again
            done: mov rsp, {_STACK}; cld; cmp r8d, r9d; mov eax, r8d; out 0xf4, al"""
        code[BASE] = assemble(text.replace("\n", ";").replace(";;", ";"))
        registers = {name: r.getrandbits(64) for name in _REGISTERS} | {"rsp": _STACK, "rflags": 2}
        registers |= {f"xmm{i}": r.getrandbits(128) for i in range(6)}
        return Program(
            f"seed {self.seed}", code, _MAPS, identity=None, registers=registers, idt=IDT, rsp0=RSP0, flags=0xCC5
        )

    # Functions

    def frame(self) -> bytes:
        """Functions of one slot each, one that lies over the end into the next frame, and scratch behind them."""
        slots = b"".join(self.function() for _ in range(_FUNCTIONS))
        scratch = bytes(self.random.choice(b"\x90\xf8\xf5\xc3") for _ in range(0x1000 - len(slots)))
        tail = b"\x41\x81\xc0\x11\x22"  # add r8d, imm32: its last two bytes lie in the next frame
        head = b"\x33\x44\xc3"
        return head + slots[3 : _FUNCTIONS * _SLOT] + scratch[: -len(tail)] + tail

    def function(self) -> bytes:
        """A slot: NOPs, instructions whose bytes may be patched at any place that ``patch`` knows, RET."""
        r = self.random
        first = b"\x90\x90\x90" + b"\x41\x81" + bytes([0xC0 | r.choice([0, 1, 4, 5]) | r.choice([0, 0x30, 0x28])])
        middle = r.getrandbits(32).to_bytes(4, "little") + b"\x48\xff" + bytes([0xC3 | r.choice([0, 8])])
        branch = bytes([0x70 | r.randrange(16), 3]) + b"\x49\xff\xc0"
        return (first + middle + branch).ljust(_SLOT - 1, b"\x90") + b"\xc3"

    def patch_place(self) -> tuple[int, int, str]:
        """(linear address, bytes, kind) of something in a function that may be patched."""
        r = self.random
        frame = r.choice(list(_VIEWS))
        slot = r.randrange(1, _FUNCTIONS) * _SLOT
        base = r.choice(_VIEWS[frame]) + slot
        offset, size, kind = r.choice([(6, 4, "any"), (6, 1, "any"), (7, 2, "any"), (12, 1, "modrm"), (13, 1, "jcc")])
        return base + offset, size, kind

    # What the main program does

    def action(self) -> str:
        kinds = (
            (self.arithmetic, 4), (self.call, 6), (self.patch, 6), (self.scratch_store, 5), (self.read_code, 3),
            (self.branch, 2), (self.fault, 3), (self.copy, 2), (self.over_the_end, 2),
        )  # fmt: skip
        chosen, _ = self.random.choices(kinds, [weight for _, weight in kinds])[0]
        return ";".join(map(_by_register, chosen().split(";"))) + ";"

    def label(self) -> str:
        self.labels += 1
        return f"l{self.labels}"

    def arithmetic(self) -> str:
        r = self.random
        a, b = r.choice(_REGISTERS), r.choice(_REGISTERS)
        return r.choice(
            [f"add {a}, {b}", f"sub {a}, {b}", f"xor {a}, {b}", f"cmp {a}, {b}", f"adc {a}, {b}", f"sbb {a}, {b}",
             f"lea {a}, [{a} + {b}*4 + 17]", f"inc {a}", f"neg {a}", f"bswap {a}", f"test {a}, {a}", "stc", "cmc",
             f"set{r.choice(_CONDITIONS)} {'bl'}", f"cmov{r.choice(_CONDITIONS)} {a}, {b}"]
        )  # fmt: skip

    def call(self) -> str:
        r = self.random
        frame = r.choice(list(_VIEWS))
        target = r.choice(_VIEWS[frame]) + r.randrange(1, _FUNCTIONS) * _SLOT + r.choice([0, 0, 1, 2, 3])
        return r.choice(
            [f"mov ecx, {target}; call rcx",
             f"lea r15, [rip + {(x := self.label())}]; push r15; push {target}; ret; {x}:",
             (f"mov dword ptr [{DATA + 0xF00}], {target}; mov dword ptr [{DATA + 0xF04}], 0; "
              f"call qword ptr [{DATA + 0xF00}]")]
        )  # fmt: skip

    def patch(self) -> str:
        r = self.random
        place, size, kind = self.patch_place()
        if kind == "modrm":
            return f"mov byte ptr [{place}], {0xC3 | r.choice([0, 8])}"
        if kind == "jcc":
            return r.choice(
                [f"mov byte ptr [{place}], {0x70 | r.randrange(16)}", f"xor byte ptr [{place}], 1",
                 f"mov edi, {place}; lock xor byte ptr [rdi], 1"]
            )  # fmt: skip
        if size == 4:
            return r.choice(
                [f"mov dword ptr [{place}], {r.getrandbits(31)}", f"mov edi, {place}; mov eax, r8d; stosd",
                 f"mov edi, {place}; xadd dword ptr [rdi], r9d", f"add dword ptr [{place}], r8d",
                 f"mov edi, {place}; mov esi, {DATA + r.randrange(0x100)}; mov ecx, 4; rep movsb",
                 f"mov edi, {place}; movd dword ptr [rdi], xmm{r.randrange(6)}", f"not dword ptr [{place}]",
                 f"mov edi, {place}; mov eax, dword ptr [rdi]; lock cmpxchg dword ptr [rdi], r12d",
                 f"rol dword ptr [{place}], 7; cmp ebx, ebx", f"rcr dword ptr [{place}], 1; cmp ebx, ebp"]
            )  # fmt: skip
        return r.choice(
            [f"mov byte ptr [{place}], {r.randrange(256)}", f"inc byte ptr [{place}]",
             f"set{r.choice(_CONDITIONS)} byte ptr [{place}]", f"sub byte ptr [{place}], bl"]
        )  # fmt: skip

    def scratch_store(self) -> str:
        """Any store instruction, into the unused part of a frame, or over its end."""
        r = self.random
        frame = r.choice(list(_VIEWS))
        view = r.choice(_VIEWS[frame])
        place = view + r.choice([_SCRATCH + r.randrange(0x500), 0xB00 + r.randrange(0x80)])
        store, before = r.choice([(s, b) for s, b in UNALIGNED.items() if not s.startswith(("fnstenv", "fnsave"))])
        after = self.label()
        count = r.choice([1, 3, 0x90909003])
        return (
            f"mov edi, {place}; mov r10d, {DATA + 0x100}; mov r11d, {DATA + 0x800}; mov rax, r8; mov rdx, r9;"
            f"mov esi, {DATA + 0x200}; mov ecx, {count}; mov r13, rbp; {before.replace('after', after)};"
            f"cmp eax, ebx; {store.replace('after', after)}; {after}: mov rsp, {_STACK}; mov rbp, r13; cld; fninit;"
            f"cmp r8, r9"
        )

    def read_code(self) -> str:
        r = self.random
        frame = r.choice(list(_VIEWS))
        place = r.choice(_VIEWS[frame]) + r.randrange(0xFF0)
        a = r.choice(_REGISTERS)
        return r.choice(
            [f"mov {a}, qword ptr [{place}]", f"cmp {a}, qword ptr [{place}]", f"add {a}, qword ptr [{place}]",
             f"movdqu xmm{r.randrange(6)}, xmmword ptr [{place}]", f"push qword ptr [{place}]; pop {a}",
             f"mov esi, {place}; mov edi, {_P1}; mov ecx, 20; repe cmpsb",
             f"mov edi, {place}; mov al, 0xc3; mov ecx, 64; repne scasb", f"test byte ptr [{place}], bl",
             f"movzx ebx, word ptr [{place}]"]
        )  # fmt: skip

    def copy(self) -> str:
        """From code to code or to data, forwards or backwards."""
        r = self.random
        source = r.choice(_VIEWS[r.choice(list(_VIEWS))]) + _SLOT * r.randrange(1, _FUNCTIONS)
        target = r.choice([r.choice(_VIEWS[r.choice(list(_VIEWS))]) + _SLOT * r.randrange(1, _FUNCTIONS), DATA + 0x300])
        if r.random() < 0.3:
            return f"mov esi, {source + 31}; mov edi, {target + 31}; mov ecx, 32; std; rep movsb; cld"
        return f"mov esi, {source}; mov edi, {target}; mov ecx, 4; rep movsq"

    def over_the_end(self) -> str:
        """Call or patch the instruction that lies over two frames, where what follows is known to be code."""
        r = self.random
        end = r.choice([_P2, _P3, 0x8001000, 0xA001000, 0xA002000, 0x9001000])
        patch = r.choice(
            [f"mov dword ptr [{end - 2}], {r.getrandbits(31)}", f"mov word ptr [{end - 1}], r8w",
             f"add dword ptr [{end - 2}], {r.getrandbits(20)}"]
        )  # fmt: skip
        return f"mov ecx, {end - 5}; call rcx; {patch}; mov ecx, {end - 5}; call rcx"

    def branch(self) -> str:
        r = self.random
        skip = self.label()
        return f"j{r.choice(_CONDITIONS)} {skip}; {self.patch()}; {self.arithmetic()}; {skip}: nop"

    def fault(self) -> str:
        """An instruction that does not complete; the handler goes on behind it."""
        r = self.random
        bad = r.choice([_HOLE + r.randrange(0x800), _READ_ONLY + r.randrange(0xF00), _HOLE - 3, 0x8002000 - 3])
        code = r.choice(_VIEWS[r.choice(list(_VIEWS))]) + _SCRATCH
        beyond = r.choice([0x8002000, 0xA003000, 0x9002000])
        what = r.choice(
            ["ud2", "int3", "int 0x81", "int 0x10", "xor edx, edx; xor ecx, ecx; cmp ecx, ecx; div ecx",
             f"mov qword ptr [{bad}], r8", f"mov r8, qword ptr [{_HOLE}]", f"add dword ptr [{bad}], r8d",
             f"mov rsp, {bad}; push r8", f"mov rsp, {_HOLE + 64}; call rcx", f"push qword ptr [{_HOLE}]",
             f"mov rsp, {bad}; push qword ptr [{code}]", f"mov edi, {bad}; movdqu xmmword ptr [rdi], xmm1",
             f"mov ecx, {_HOLE}; jmp rcx", f"mov ecx, {_NO_EXECUTE + 64}; call rcx",
             f"mov edi, {beyond - 5}; mov ecx, 16; mov al, 0x90; rep stosb",
             f"mov esi, {beyond - 9}; mov edi, {code}; mov ecx, 3; .byte 0xf3, 0xa5",
             f"mov qword ptr [{beyond - 4}], r9", f"mov edi, {beyond - 4}; xchg qword ptr [rdi], r9",
             f"mov edi, {beyond - 4}; lock xadd qword ptr [rdi], r9",
             f"mov edi, {beyond - 2}; add dword ptr [rdi], r9d", f"mov ecx, {beyond - 2}; call rcx",
             "movabs rdi, 0x8000000000000000; mov qword ptr [rdi], r8", "movabs rsp, 0x8000000000000000; push r8",
             f"mov edi, {_HOLE + 8}; cmpxchg16b xmmword ptr [rdi]", "mov eax, 0xfff8; mov ds, ax",
             "mov eax, 8; mov fs, ax",
             f"mov esi, {_HOLE}; mov edi, {code}; movsq",
             f"mov edi, {beyond - 6}; mov eax, 5; cmpxchg8b qword ptr [rdi]"]
        )  # fmt: skip
        after = self.label()
        return f"lea r15, [rip + {after}]; cmp r8, r9; {what}; {after}: mov rsp, {_STACK}; fninit; cld; cmp r9, r12"
