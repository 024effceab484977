"""Programs that were picked to be hard, and those that once came out wrong."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from .generator import DATA, IDT, LOG, RSP0, assemble, handlers
from .judging import BY_NAME, disagreements
from .program import BASE, Alias, Program

FIRST, SECOND = 0x11000, 0x12000
#: add r8d, imm32; ret
FUNCTION = b"\x41\x81\xc0\x11\x22\x33\x44\xc3"
ALIASES = (Alias(0x8000000, FIRST), Alias(0x8001000, SECOND), Alias(0x9000000, FIRST, access="rw"))
SWAPPED = (Alias(0x8000000, SECOND), Alias(0x8001000, FIRST))
FRAMES = {FIRST: FUNCTION + b"\x11\x22\x33\x44" * 100, SECOND: FUNCTION, DATA: bytes(range(256))}
END = "; out 0xf4, al"
RUN_FIRST = f"mov ecx, {FIRST}; call rcx; mov edi, 0x8000100;"
RUN_BOTH = "mov ecx, 0x8000000; call rcx; mov ecx, 0x8001000; call rcx; mov edi, 0x8000ffd;"
SINGLE_STEP = "pushfq; or dword ptr [rsp], 0x100; popfq;"
NO_SINGLE_STEP = "; pushfq; and dword ptr [rsp], 0xfffffeff; popfq; nop"
#: The flags that PUSHFQ of a process leaves below RSP carry the operating system's IOPL and IF.
FLAGS_LEFT = ((0x3EFF8, 8),)


def given(text: str, *, maps: tuple[Alias, ...] = ALIASES, **other: Any) -> Program:
    """A program over FIRST and SECOND."""
    code = {BASE: assemble(text + END)} | FRAMES
    return evolve(Program("hand-picked", code, maps), **other)


PROGRAMS = {
    "loop that patches the next instruction": given(
        "mov ecx, 300; l: mov byte ptr [rip + x + 1], cl; x: add al, 0x55; dec ecx; jnz l"
    ),
    "writer's alias": given(f"mov ecx, {FIRST}; call rcx; mov edi, 0x9000003; mov eax, 9; l: mov [rdi], eax; call rcx; "
                            "dec eax; jnz l; mov eax, r8d"),
    "flags across a trap": given(
        RUN_FIRST + "mov ebx, 20; l: add r9b, 0x33; mov [rdi], bl; jo o; inc r10; o: jp p; inc r11; p: adc r12, 7; "
        "dec ebx; jnz l"
    ),
    "direction flag across a trap": given(
        RUN_FIRST + "std; mov esi, 0x8000020; mov ecx, 5; movsb; rep movsb; mov byte ptr [rdi], 1; stosb",
        flags=0xCD5,
    ),
    "flags pushed into code": given(
        RUN_FIRST + "mov rbp, rsp; mov esp, 0x8000048; cmp eax, ebx; pushfq; and dword ptr [rsp], 0xcd5; pop rax; "
        "mov rsp, rbp"
    ),
    "stack in code": given(
        RUN_FIRST + "mov rbp, rsp; mov esp, 0x8000800; mov ebx, 20; l: call f; dec ebx; jnz l; mov rsp, rbp; jmp e; "
        "f: push rbx; pop rax; call rcx; ret; e: nop"
    ),
    "branches through code": given(
        RUN_FIRST + "lea rax, [rip + k]; mov [rdi], rax; jmp qword ptr [rdi]; ud2; k: lea rax, [rip + j]; "
        "mov [rdi + 8], rax; call qword ptr [rdi + 8]; jmp e; j: push qword ptr [rdi]; pop rdx; ret; e: nop"
    ),
    "one register twice": given(
        RUN_FIRST + "mov eax, [rdi]; xadd [rdi], eax; cmpxchg [rdi], eax; cmpxchg [rdi], edi; xchg [rdi], rdi"
    ),
    "cmpxchg16b, equal and not": given(
        RUN_FIRST + "mov rax, [rdi]; mov rdx, [rdi + 8]; mov rbx, 5; mov rcx, 7; lock cmpxchg16b xmmword ptr [rdi]; "
        "setz r9b; lock cmpxchg16b xmmword ptr [rdi]; setz r10b"
    ),
    "bit strings far away": given(
        RUN_FIRST + f"mov edi, {DATA}; mov rax, 0x8000000; sub rax, rdi; shl rax, 3; add rax, 777; bts [rdi], rax; "
        "mov edi, 0x8003000; mov rax, -70000; btc qword ptr [rdi], rax; cmp eax, eax"
    ),
    "copy over the running loop": given(
        "mov ebx, 4; l: lea rsi, [rip + src]; lea rdi, [rip + dst]; mov ecx, 5; rep movsb; dst: add eax, 1; nop; nop; "
        "dec ebx; jnz l; jmp e; src: .byte 0x05, 0, 1, 0, 0; e: nop"
    ),
    "16 bytes over frames out of order": given(
        RUN_BOTH + "movups [rdi - 4], xmm1; movups xmm2, [rdi - 4]; movdqu [rdi - 12], xmm2",
        maps=SWAPPED,
        registers={"xmm1": 0x1122_3344_5566_7788_99AA_BBCC_DDEE_FF00},
    ),
    "locked over frames out of order": given(
        RUN_BOTH + "mov eax, 0x01020304; lock xadd [rdi], eax; lock inc dword ptr [rdi]; lock xor qword ptr [rdi - 2], "
        "rcx; xchg [rdi], ebx",
        maps=SWAPPED,
    ),
    "segment bases": given(
        RUN_FIRST + "mov eax, 0x99; mov fs:[0x40], eax; mov gs:[rcx + 0x10], eax; add fs:[0x41], al",
        registers={"fs_base": 0x8000000, "gs_base": 0x8000000 - FIRST},
    ),
    "32-bit addresses": given(RUN_FIRST + "mov rax, 0x1122334455667788; mov [edi], rax; add dword ptr [edi + 4], eax"),
    "enter with a frame chain": given(
        RUN_FIRST + "mov rbx, rsp; mov esp, 0x8000900; mov ebp, 0x8000980; .byte 0xc8, 32, 0, 5; leave; mov rsp, rbx"
    ),
    "into overlapping instructions": given(
        "mov ebx, 5; l: lea rcx, [rip + x + 2]; call x; call rcx; inc byte ptr [rip + x + 3]; dec ebx; jnz l; jmp e; "
        "x: .byte 0x66, 0xb8, 0x04, 0x01, 0x90, 0xc3; e: nop"
    ),
    "rounding modes across traps": given(
        RUN_FIRST + "mov dword ptr [rdi], 0x5f80; ldmxcsr dword ptr [rdi]; mov eax, 1; mov ebx, 3; cvtsi2ss xmm0, eax; "
        "cvtsi2ss xmm1, ebx; divss xmm0, xmm1; movss dword ptr [rdi + 4], xmm0; divss xmm0, xmm1; "
        "movss dword ptr [rdi + 8], xmm0; cvtss2si eax, xmm0",
        mxcsr_mask=0xFFC0,
    ),
    "x87 stack across traps": given(
        RUN_FIRST + "fld1; fldz; fld1; fadd st(0), st(2); fst qword ptr [rdi]; fild dword ptr [rdi + 4]; "
        "fistp qword ptr [rdi + 16]; fstp tbyte ptr [rdi + 32]; fxch; fnstsw ax"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hand_picked_program(name: str) -> None:
    assert disagreements(PROGRAMS[name], [BY_NAME["plain"], BY_NAME["checked"], BY_NAME["stepped"]]) == {}


# What once came out wrong


def test_tens_of_thousands_of_patches() -> None:
    setup = "mov ecx, 20000; mov edi, 0x8000003; mov esi, 0x11000;"
    loop = setup + "l: mov [rdi], ecx; call rsi; dec ecx; jnz l; mov eax, r8d"
    assert disagreements(given(loop), [BY_NAME["plain"]]) == {}


@pytest.mark.parametrize("source", ["cmp eax, 0x12345678", "add al, 0x80", "inc ebx", "neg ebx", "stc",
"sub eax, eax"])
@pytest.mark.parametrize("store", ["setbe", "seto", "setp", "setl", "setz", "rcl", "rcr"])
def test_flags_that_a_refused_store_has_computed_early(source: str, store: str) -> None:
    count = ", 1" if store.startswith("rc") else ""
    before = RUN_FIRST + "mov eax, 0x80000003; mov ebx, 7; mov edx, [rdi]; jmp k; k:"
    text = before + f"{source}; {store} byte ptr [rdi]{count}"
    assert disagreements(given(text), [BY_NAME["plain"], BY_NAME["stepped"], BY_NAME["adaptive"]]) == {}


@pytest.mark.parametrize("store", ["stosb", "stosw", "stosd", "stosq"])
@pytest.mark.parametrize("start", [0, -3, 1])
def test_a_repeated_store_over_itself_goes_on_to_its_end(store: str, start: int) -> None:
    room = "nop; " * 64
    text = f"lea rdi, [rip + x + {start}]; mov ecx, 7; mov rax, 0x9090909090909090; x: rep {store}; {room}"
    assert disagreements(given(text)) == {}


def test_the_second_frame_of_an_instruction_is_fetched_anew_in_a_step() -> None:
    over = 0x8000FFB  # add r8d, imm32 with two bytes of the number in the next frame
    text = f"mov ebx, 6; l: mov ecx, {over}; call rcx; mov edi, {over + 4}; mov [rdi], bx; call rcx; dec ebx; jnz l"
    frames = {FIRST: bytes(0xFFB) + FUNCTION[:5], SECOND: FUNCTION[5:]}
    program = given(text)
    assert disagreements(evolve(program, code=program.code | frames)) == {}


@pytest.mark.parametrize("what", ["ud2", "int3", "int 0x81", f"mov [rdi + {DATA * 16}], rax"])
def test_the_resume_flag_in_what_an_exception_saves(what: str) -> None:
    """A fault's handler returns with RF set; what follows must not save it again."""
    once = "lea r15, [rip + {0}]; {1}; {0}: nop;"
    text = "xor edi, edi;" + once.format("a", "ud2") + once.format("b", what) + once.format("c", "int3")
    program = given(text, idt=IDT, rsp0=RSP0)
    assert disagreements(evolve(program, code=program.code | handlers())) == {}


@pytest.mark.parametrize(
    "text",
    [
        "mov esi, 0x20000; mov edi, 0x8000003; mov ecx, 4;" + SINGLE_STEP + "rep movsb; nop",
        "mov edi, 0x8000003;" + SINGLE_STEP + "mov dword ptr [rdi], 0x55667788; call rcx; mov eax, 5",
        "mov rbp, rsp;" + SINGLE_STEP + "mov esp, 0x8000040; push rbp; pop rax; mov rsp, rbp",
        SINGLE_STEP + "lea r15, [rip + q]; int 0x81; q: nop",
    ],
)
def test_single_steps_by_the_trap_flag(text: str) -> None:
    """The handler of #DB notes RIP and RSP and goes on where it was."""
    at = 0x2B000
    code = handlers()
    table = bytearray(code[IDT])
    table[16:24] = (at & 0xFFFF | 8 << 16 | 0x8E00 << 32 | at >> 16 << 48).to_bytes(8, "little")
    code[IDT] = bytes(table)
    code[at] = assemble(
        f"push rax; push rbx; mov ebx, {LOG}; mov rbx, [rbx]; mov rax, [rsp + 16]; mov [rbx], rax; "
        f"mov rax, [rsp + 40]; mov [rbx + 8], rax; add rbx, 16; mov eax, {LOG}; mov [rax], rbx; "
        "pop rbx; pop rax; iretq",
        at,
    )
    program = given(f"mov ecx, {FIRST}; call rcx;" + text + NO_SINGLE_STEP, idt=IDT, rsp0=RSP0, ignore=FLAGS_LEFT)
    assert disagreements(evolve(program, code=program.code | code)) == {}


@pytest.mark.parametrize(
    "text",
    [
        "add dword ptr [rdi], eax", "lock xadd [rdi], eax", "xchg [rdi], al", "cmpxchg [rdi], ebx",
        "inc qword ptr [rdi]",
        "rcl byte ptr [rdi], 1", "bts dword ptr [rdi], 3", "mov eax, 70000; bts dword ptr [rdi], eax",
        "mov rax, -9; btr qword ptr [rdi], rax", "mov eax, 9; bt dword ptr [rdi], eax",
        "mov rbx, rdi; mov eax, 0x777; xlatb",
        "mov rsp, rdi; push rax", "mov rsp, rdi; pop qword ptr [rsp + 64]", "mov rsp, rdi; call rcx",
        "push qword ptr [rdi]", "mov rsi, rdi; mov edi, 0x8000100; movsq", "mov ecx, 9; rep stosb",
        "fstp tbyte ptr [rdi]",
        "movups [rdi], xmm0", "cmpxchg8b qword ptr [rdi]", "mov rbx, [rdi]",
        "sub rdi, rcx; mov [rdi + rcx], al", ".byte 0xff, 0x7f, 0x00",
        "movabs rdi, 0x8000000000000000; inc byte ptr [rdi]",
        "movabs rsp, 0x8000000000000000; push rax", "mov edi, 0x8001ffd; mov [rdi], rax",
        "mov edi, 0x8001ffd; add [rdi], rax",
        "mov edi, 0x8001ff9; mov ecx, 5; rep stosd", "jmp rdi",
        "mov ecx, 0x8001ffe; mov word ptr [rcx], 0xb890; jmp rcx",
        "mov eax, 0xfff8; mov fs, ax", "xor ecx, ecx; cmp eax, eax; div ecx", ".byte 0x41, 0xf1",
    ],
)  # fmt: skip
def test_a_fault_has_its_vector_error_code_and_address(text: str) -> None:
    hole = 0xE003120
    maps = (Alias(BASE, BASE, 0x70000), *ALIASES)
    setup = f"mov ecx, {FIRST}; call rcx; mov edi, {hole}; fld1; cmp eax, ebx;"
    program = given(setup + text, maps=maps, identity=None)
    assert disagreements(program) == {}


