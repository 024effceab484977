# Patch ahead: a store changes an instruction further down on the same page, in the stretch of code that is
# running.
#
# Four rounds give the immediate of `patch_site` the values 4, 3, 2, 1. The page holds the storing
# instruction and its target, so an emulator that lets the store through by making the page writable has to
# fetch from that page as well.

        .include "guest.inc"
        .global _start, writer, patch_site

_start: mov     ecx, 4                  # the version to write, counting down
        xor     r15d, r15d              # what the versions returned, mixed
        say     "patch-ahead ran "

writer: mov     byte ptr [rip + patch_site + 1], cl
        jmp     1f                      # a taken branch: no processor needs more on its own stores
        .balign 16, 0xcc                # int3: nothing runs here
1:      mov     eax, 0
patch_site:
        mov     eax, 0x7f               # b8 7f 00 00 00: the low byte of the immediate is patched
        call    put_decimal
        mix
        dec     ecx
        jnz     writer
        jmp     finish
