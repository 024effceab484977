# Patch next: a store changes the instruction right behind it, with no branch in between.
#
# The nearest that a store can come to its own translation: both are always in one block. A processor has
# fetched and decoded `patch_site` long before the store retires and still has to run the new bytes (SDM
# vol. 3, "Self-Modifying Code"; processors from the P6 family on check each store against what they have in
# flight).

        .include "guest.inc"
        .global _start, writer, patch_site, round

_start: mov     ecx, 10
        xor     r15d, r15d
        say     "patch-next ran "

round:  lea     edx, [rcx + rcx * 2]    # 30, 27, ... 3
writer: mov     byte ptr [rip + patch_site + 1], dl
patch_site:
        mov     eax, 0x7f               # b8 7f 00 00 00
        call    put_decimal
        mix
        dec     ecx
        jnz     round
        jmp     finish
