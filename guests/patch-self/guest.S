# Patch self: stores that hit the very instruction that performs them.
#
#   grow   adds its own immediate to that immediate: 1, 2, 4, ... 64, twice as much each time it runs
#   once   turns itself into NOPs: it stores eight NOPs over itself, and would store int3 if it ever ran again
#
# A store retires with the bytes that it was fetched with, and the next pass over it must see the new ones.

        .include "guest.inc"
        .global _start, grow, grow_immediate, once, once_end

_start: xor     r15d, r15d
        say     "patch-self grew "

        mov     ecx, 6
1:
grow:   add     byte ptr [rip + grow_immediate], 1      # 80 05 disp32 01
        .equ    grow_immediate, . - 1
        movzx   eax, byte ptr [rip + grow_immediate]
        call    put_decimal
        mix
        dec     ecx
        jnz     1b

        mov     rdx, 0x9090909090909090
        mov     ecx, 4
        .balign 8, 0x90
once:   mov     qword ptr [rip + once], rdx             # seven bytes
        nop                                             # and one
once_end:
        mov     rdx, 0xcccccccccccccccc                 # int3, for whoever comes by with stale code
        mov     eax, dword ptr [rip + once]
        mix
        dec     ecx
        jnz     once

        say     "and vanished "
        jmp     finish
