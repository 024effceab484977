# Straddle: an instruction and a store that each lie over two code pages that are neighbours in the linear
# address space only.
#
#   linear                guest-physical
#   RUN,  RUN + 0x1000    0x12000, 0x11000      rwx
#   VIEW, VIEW + 0x1000   0x12000, 0x11000      rw-
#
# The frame behind 0x12000 is 0x13000, `decoy`: whoever takes the second half of the access from "the next
# guest-physical byte" reads or writes there. `patch_site` has its opcode and half of its immediate on the
# first page and the rest on the second; the store that patches it covers eight bytes over both pages, in
# odd rounds through the view, in even rounds through the addresses that run.

        .include "guest.inc"
        .global _start, round, writer, second_page, first_page, patch_site, decoy

        .equ    RUN, 0x20000000
        .equ    VIEW, 0x30000000
        .equ    SITE, 0xffd             # offset of patch_site from the start of the pair

_start: mov     ecx, 32
        xor     r15d, r15d
        mov     r12d, RUN + SITE - 5    # five one-byte NOPs lead to the site
        mov     r13d, RUN + SITE + 1
        mov     r14d, VIEW + SITE + 1
        mov     rbp, 0x909090c300000000 # behind the immediate: ret, nop, nop, nop as before
        say     "straddle mixed "

round:  imul    edx, ecx, 0x01030507    # all four bytes of the immediate change
        or      rdx, rbp
        mov     rdi, r13
        test    cl, 1
        cmovnz  rdi, r14
writer: mov     qword ptr [rdi], rdx    # two bytes on the first page, six on the second
        call    r12
        mix
        dec     ecx
        jnz     round

        mov     esi, offset decoy       # nothing may have come here
        mov     ecx, 16
1:      lodsd
        mix
        dec     ecx
        jnz     1b

        mov     eax, r15d
        call    put_decimal
        jmp     finish

        .balign 4096, 0xcc              # 0x11000
second_page:
        .byte   0xff, 0xff              # ... the high half of the immediate
        ret
        nop
        nop
        nop
        .balign 4096, 0xcc              # 0x12000
first_page:
        .fill   SITE - 5, 1, 0xcc
        nop
        nop
        nop
        nop
        nop
patch_site:
        .byte   0xb8, 0xff, 0xff        # mov eax, imm32: the opcode and the low half of the immediate ...
decoy:  .fill   64, 1, 0xcc             # 0x13000
