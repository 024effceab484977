# Three aliases: one frame, three linear addresses, code running at two of them.
#
#   target              r-x   runs
#   target + RUN_WRITE  rwx   runs, and `bump` running there writes through it
#   target + VIEW       rw-   is only written
#
# A write must end the translations of both running addresses, whichever of the three it came through; and
# `bump` writes to the frame that it runs from.

        .include "guest.inc"
        .global _start, round, writer, target, bump

        .equ    RUN_WRITE, 0x50000000
        .equ    VIEW, 0x60000000

_start: mov     r12d, offset target
        mov     r13d, offset target + RUN_WRITE
        mov     r14d, offset target + 1 + VIEW
        mov     ebp, offset bump + RUN_WRITE
        mov     ecx, 16
        xor     r15d, r15d
        say     "three-aliases sum of versions "
        xor     ebx, ebx

round:  imul    edx, ecx, 1000
writer: mov     dword ptr [r14], edx    # through the view that never runs
        call    both
        call    rbp                     # through the alias that runs
        call    both
        dec     ecx
        jnz     round

        mov     eax, ebx
        call    put_decimal
        jmp     finish

# both: run the target at both addresses.
both:   call    r12
        mix
        add     ebx, eax
        call    r13
        mix
        add     ebx, eax
        ret

        .balign 4096, 0xcc
target: mov     eax, 0x7fffffff         # b8 imm32
        ret

        .balign 64, 0xcc
bump:                                   # runs at bump + RUN_WRITE: RIP-relative, so it writes there too
        inc     dword ptr [rip + target + 1]
        ret
        .balign 64, 0xcc
