# Alias patch: the writer never touches the address that runs.
#
# One frame has two linear addresses: `target` runs at its own, which is read-and-execute only, and is
# written through VIEW, which is read-and-write and no-execute. This is how a JIT compiler that keeps W^X
# works. Each of 100 rounds writes another function (its immediate is the square of the round) and calls it;
# the sum is 338350 only if every single version ran.

        .include "guest.inc"
        .global _start, round, writer, target

        .equ    VIEW, 0x40000000        # see guest.toml: VIEW + gpa is the writable view

_start: mov     edi, offset target + 1 + VIEW
        mov     ecx, 1
        xor     r15d, r15d
        say     "alias-patch sum "

round:  mov     edx, ecx
        imul    edx, ecx
writer: mov     dword ptr [rdi], edx    # through the writable view
        call    target                  # through the executable one
        add     r15d, eax
        inc     ecx
        cmp     ecx, 100
        jbe     round

        mov     eax, r15d
        call    put_decimal
        jmp     finish

        .balign 4096, 0xcc              # a frame of its own: the writer is not on it
target: mov     eax, 0x7fffffff         # b8 imm32
        ret
        .balign 64, 0xcc
