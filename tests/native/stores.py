"""Every way in which an instruction of this CPU model stores, as Intel-syntax text.

``[rdi]`` is the place (RDI set to it); an instruction that reaches its place otherwise comes with the text that
prepares it, and with what it leaves changed restored by the program around it. Flags that are undefined afterwards
are the caller's to define anew.
"""

from __future__ import annotations

from typing import Final

#: text -> text before it. ``{place}`` is the linear address.
_PLAIN: Final = """
mov byte ptr [rdi], al
mov byte ptr [rdi], ah
mov word ptr [rdi], ax
mov dword ptr [rdi], eax
mov qword ptr [rdi], rax
mov byte ptr [rdi], 0x90
mov word ptr [rdi], 0x9090
mov dword ptr [rdi], 0xc3c0ff41
mov qword ptr [rdi], 0x10c0ff41
mov word ptr [rdi], fs
movbe word ptr [rdi], ax
movbe dword ptr [rdi], eax
movbe qword ptr [rdi], rax
movnti dword ptr [rdi], eax
movnti qword ptr [rdi], rax
movdqu xmmword ptr [rdi], xmm1
movups xmmword ptr [rdi], xmm1
movupd xmmword ptr [rdi], xmm1
movss dword ptr [rdi], xmm1
movsd qword ptr [rdi], xmm1
movd dword ptr [rdi], xmm1
movq qword ptr [rdi], xmm1
movlps qword ptr [rdi], xmm1
movlpd qword ptr [rdi], xmm1
movhps qword ptr [rdi], xmm1
movhpd qword ptr [rdi], xmm1
pextrb byte ptr [rdi], xmm1, 3
pextrw word ptr [rdi], xmm1, 5
pextrd dword ptr [rdi], xmm1, 2
pextrq qword ptr [rdi], xmm1, 1
extractps dword ptr [rdi], xmm1, 3
xchg byte ptr [rdi], al
xchg word ptr [rdi], ax
xchg dword ptr [rdi], eax
xchg qword ptr [rdi], rax
xadd byte ptr [rdi], al
xadd word ptr [rdi], ax
lock xadd dword ptr [rdi], eax
xadd qword ptr [rdi], rax
xadd dword ptr [rdi], edi
cmpxchg byte ptr [rdi], bl
cmpxchg dword ptr [rdi], ebx
lock cmpxchg qword ptr [rdi], rbx
cmpxchg dword ptr [rdi], eax
cmpxchg8b qword ptr [rdi]
lock cmpxchg8b qword ptr [rdi]
add byte ptr [rdi], al
or word ptr [rdi], ax
adc dword ptr [rdi], eax
sbb qword ptr [rdi], rax
and dword ptr [rdi], 0x7fffffff
sub qword ptr [rdi], 1
xor dword ptr [rdi], eax
lock add dword ptr [rdi], eax
lock sub byte ptr [rdi], 5
lock or qword ptr [rdi], rax
lock and word ptr [rdi], ax
lock xor byte ptr [rdi], 0x21
inc byte ptr [rdi]
inc qword ptr [rdi]
dec word ptr [rdi]
lock inc dword ptr [rdi]
lock dec qword ptr [rdi]
not byte ptr [rdi]
not qword ptr [rdi]
lock not dword ptr [rdi]
neg byte ptr [rdi]
neg dword ptr [rdi]
lock neg qword ptr [rdi]
shl byte ptr [rdi], 1
shr word ptr [rdi], 3
sar dword ptr [rdi], cl
rol qword ptr [rdi], 9
ror byte ptr [rdi], cl
rcl dword ptr [rdi], 1
rcr qword ptr [rdi], 5
shld dword ptr [rdi], eax, 5
shld qword ptr [rdi], rax, cl
shrd word ptr [rdi], ax, 3
shrd qword ptr [rdi], rax, 11
bts dword ptr [rdi], 7
btr qword ptr [rdi], 43
btc word ptr [rdi], 9
lock bts qword ptr [rdi], 3
lock btc dword ptr [rdi], 31
sete byte ptr [rdi]
setc byte ptr [rdi]
stmxcsr dword ptr [rdi]
fnstcw word ptr [rdi]
fnstsw word ptr [rdi]
"""

_PREPARED: Final = {
    "push rax": "lea rsp, [rdi + 8]",
    "push ax": "lea rsp, [rdi + 2]",
    "push 0x55": "lea rsp, [rdi + 8]",
    "push 0x11223344": "lea rsp, [rdi + 8]",
    "push qword ptr [r10]": "lea rsp, [rdi + 8]",
    "push word ptr [r10]": "lea rsp, [rdi + 2]",
    "push rsp": "lea rsp, [rdi + 8]",
    "push qword ptr [rsp]": "lea rsp, [rdi + 8]",
    "pop qword ptr [rdi]": "lea rsp, [r10]",
    "pop word ptr [rdi]": "lea rsp, [r10]",
    "pop qword ptr [rsp + 8]": "lea rsp, [rdi - 16]",
    "enter 0, 0": "lea rsp, [rdi + 8]",
    "enter 16, 0": "lea rsp, [rdi + 8]",
    "enter 8, 1": "lea rbp, [r10 + 64]; lea rsp, [rdi + 16]",
    "enter 8, 3": "lea rbp, [r10 + 64]; lea rsp, [rdi + 32]",
    "enter 0, 31": "lea rbp, [r10 + 0x300]; lea rsp, [rdi + 256]",
    "call rdx": "lea rsp, [rdi + 8]; lea rdx, [rip + after]",
    "call after": "lea rsp, [rdi + 8]",
    "call qword ptr [r11]": "lea rsp, [rdi + 8]; lea rdx, [rip + after]; mov [r11], rdx",
    "stosb": "",
    "stosw": "",
    "stosd": "",
    "stosq": "",
    "std; stosq; cld": "",
    "rep stosb": "mov ecx, 11",
    "rep stosw": "mov ecx, 5",
    "rep stosd": "mov ecx, 3",
    "rep stosq": "mov ecx, 3",
    "std; rep stosb; cld": "mov ecx, 11",
    "std; rep stosq; cld": "mov ecx, 3",
    "movsb": "mov rsi, r10",
    "movsw": "mov rsi, r10",
    ".byte 0xa5": "mov rsi, r10",  # movsd, which the assembler takes for the SSE instruction only
    "movsq": "mov rsi, r10",
    "rep movsb": "mov rsi, r10; mov ecx, 13",
    "rep movsw": "mov rsi, r10; mov ecx, 5",
    ".byte 0xf3, 0xa5": "mov rsi, r10; mov ecx, 3",
    "rep movsq": "mov rsi, r10; mov ecx, 3",
    "std; rep movsb; cld": "lea rsi, [r10 + 15]; mov ecx, 13",
    "std; rep movsq; cld": "lea rsi, [r10 + 24]; mov ecx, 3",
    "movdq2q mm1, xmm1; movq qword ptr [rdi], mm1; emms": "",
    "movdq2q mm1, xmm1; movntq qword ptr [rdi], mm1; emms": "",
    "movdq2q mm1, xmm1; movd dword ptr [rdi], mm1; emms": "",
    "movdq2q mm1, xmm1; pcmpeqb mm0, mm0; maskmovq mm1, mm0; emms": "",
    "movdq2q mm1, xmm1; movq2dq xmm5, mm1; movdq2q mm0, xmm2; maskmovq mm1, mm0; emms": "",
    "maskmovdqu xmm1, xmm2": "",
    "maskmovdqu xmm1, xmm3": "pcmpeqb xmm3, xmm3",
    "fst dword ptr [rdi]": "fld1",
    "fst qword ptr [rdi]": "fldpi",
    "fstp dword ptr [rdi]": "fldl2e",
    "fstp qword ptr [rdi]": "fldpi",
    "fstp tbyte ptr [rdi]": "fldpi",
    "fist word ptr [rdi]": "fldpi",
    "fist dword ptr [rdi]": "fldpi",
    "fistp word ptr [rdi]": "fldl2t",
    "fistp dword ptr [rdi]": "fldpi",
    "fistp qword ptr [rdi]": "fldpi",
    "fisttp word ptr [rdi]": "fldpi",
    "fisttp dword ptr [rdi]": "fldpi",
    "fisttp qword ptr [rdi]": "fldl2t",
    "fbstp tbyte ptr [rdi]": "fldpi",
    "fnstenv [rdi]": "fldpi",
    "fnsave [rdi]": "fldpi",
    "bts dword ptr [r10], eax": "mov rax, rdi; sub rax, r10; lea eax, [rax * 8 + 5]",
    "btr qword ptr [r10], rax": "mov rax, rdi; sub rax, r10; lea rax, [rax * 8 + 33]",
    "btc word ptr [r10], ax": "mov rax, rdi; lea r10, [rdi + 0x40]; mov ax, -0x200",
    "lock bts qword ptr [r10], rax": "mov rax, rdi; sub rax, r10; lea rax, [rax * 8 + 2]",
    "cmpxchg8b qword ptr [rdi] ": "mov eax, [rdi]; mov edx, [rdi + 4]; mov ebx, 0xc3c0ff41; mov ecx, 0xc3c1ff41",
    "lock cmpxchg dword ptr [rdi], ebx": "mov eax, [rdi]; mov ebx, 0xc3c1ff41",
}

#: Stores that want an address aligned to 16 bytes (or do more than one can predict there).
_ALIGNED: Final = {
    "movaps xmmword ptr [rdi], xmm1": "",
    "movapd xmmword ptr [rdi], xmm1": "",
    "movdqa xmmword ptr [rdi], xmm1": "",
    "movntdq xmmword ptr [rdi], xmm1": "",
    "movntps xmmword ptr [rdi], xmm1": "",
    "movntpd xmmword ptr [rdi], xmm1": "",
    "cmpxchg16b xmmword ptr [rdi]": "",
    "lock cmpxchg16b xmmword ptr [rdi]": "mov rax, [rdi]; mov rdx, [rdi + 8]; mov rbx, rax; mov rcx, rdx",
    "fxsave [rdi]": "fldpi",
    "fxsave64 [rdi]": "fldpi",
}

#: Where an image of the x87 unit holds what processors store differently: (offset, bytes).
X87_VARIES: Final = {
    "fnstenv [rdi]": ((0, 28),),
    "fnsave [rdi]": ((0, 28),),
    "fxsave [rdi]": ((4, 28),),
    "fxsave64 [rdi]": ((4, 28),),
}

UNALIGNED: Final = dict.fromkeys(_PLAIN.strip().splitlines(), "") | _PREPARED
ALIGNED: Final = _ALIGNED
