# Breakpoint: an int3 is mended by its own handler, as debuggers and tracers do it.
#
# The program runs in ring 3. Its first instruction at `patch_site` is overwritten by int3 in the image; the
# #BP handler in ring 0 puts the saved byte back, steps RIP back to it and returns. In each of five rounds
# the program arms it again. The manifest gives the IDT and the ring-0 stack; the gates lie in the image.

        .include "guest.inc"
        .global _start, round, arm, patch_site, handler, mend, idt

_start: xor     r15d, r15d
        xor     r14d, r14d              # how many breakpoints were hit; kept by the handler
        mov     ecx, 5
        say     "breakpoint hit "
round:
        call    patch_site              # hits
        mix
        call    patch_site              # mended: runs through
        mix
arm:    mov     byte ptr [rip + patch_site], 0xcc
        dec     ecx
        jnz     round

        mov     eax, r14d
        call    put_decimal
        mix
        jmp     finish

        .balign 64, 0xcc
patch_site:
        .byte   0xcc                    # int3 over the opcode of `lea eax, [rcx + rcx * 4 + 100]`
        .byte   0x44, 0x89, 100
        ret

        .balign 64, 0xcc
handler:                                # ring 0; the frame is rip, cs, rflags, rsp, ss
        inc     r14d
        dec     qword ptr [rsp]         # #BP is a trap: RIP is behind the int3
        mov     rdx, [rsp]
mend:   mov     byte ptr [rdx], 0x8d    # lea
        iretq

        .data
        .balign 16
idt:    .fill   3 * 16, 1, 0            # vectors 0 to 2: not present
        .word   handler - 0x10000, 0x08, 0xee00, 0x0001 # vector 3: interrupt gate, DPL 3, offset 0x1xxxx
        .long   0, 0
