# Sub-page write permissions: one block of 128 bytes that may be written, in a page that may only be read.
#
# The page is a table that a kernel wants to keep, with a block of counters in it: sub-page 5. The guest counts
# in that block without the VMM hearing of it, then stores next to the block, before and behind it, and once
# over its end: each of these three is an EPT violation, which the VMM reports and lets through.

        .include "guest.inc"
        .global _start, table, counters, count, before, behind, over_the_end, sum

        .equ    BLOCK, 128

_start: xor     r15d, r15d
        mov     ebp, offset counters
        mov     ecx, 1000
count:  mov     eax, ecx
        and     eax, 31
        inc     dword ptr [rbp + 4 * rax]       # any of the block's 32 counters: no exit
        dec     ecx
        jnz     count

        mov     edi, offset counters            # a string instruction over the whole block: no exit
        mov     esi, offset table
        mov     ecx, BLOCK / 8
        rep movsq

before: mov     byte ptr [rbp - 1], 0x11
behind: mov     byte ptr [rbp + BLOCK], 0x22
over_the_end:
        mov     dword ptr [rbp + BLOCK - 2], 0x33445566

        inc     dword ptr [rbp]                 # and in the block again

        mov     esi, offset table               # reads are allowed everywhere
        mov     ecx, 1024
sum:    lodsd
        mix
        dec     ecx
        jnz     sum

        say     "spp-block summed "
        mov     eax, 1024
        call    put_decimal
        jmp     finish

        .data
        .balign 4096
table:  .set    number, 0
        .rept   1024
        .long   number * 0x10101
        .set    number, number + 1
        .endr
        .equ    counters, table + 5 * BLOCK
