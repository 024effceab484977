# REP MOVS: a string instruction copies functions over a function that has run, from code frame to code
# frame.
#
# The source is code (execute-only under the VMM) and so is the destination; each iteration is a boundary at
# which the instruction can be interrupted. `slot` is filled forwards, then backwards (DF set), then by
# quadwords, after a REP STOSB that leaves NOPs everywhere.

        .include "guest.inc"
        .global _start, slot, slot_end, copy_forward, copy_backward, copy_quads, fill
        .global double_it, square_it, times_sixteen

        .equ    FUNCTION, 16            # the length of each, padded with int3

_start: xor     r15d, r15d
        say     "rep-movs ran "
        call    use_slot                # the function that the image holds: 7 + 1

        mov     esi, offset double_it
        mov     edi, offset slot
        mov     ecx, FUNCTION
copy_forward:
        rep movsb
        call    use_slot                # 7 + 7

        mov     esi, offset square_it + FUNCTION - 1
        mov     edi, offset slot + FUNCTION - 1
        mov     ecx, FUNCTION
        std
copy_backward:
        rep movsb
        cld
        call    use_slot                # 7 * 7

        mov     edi, offset slot
        mov     ecx, FUNCTION
        mov     al, 0x90
fill:   rep stosb                       # NOPs up to the `ret` at slot_end
        call    use_slot                # 7, unchanged

        mov     esi, offset times_sixteen
        mov     edi, offset slot
        mov     ecx, FUNCTION / 8
copy_quads:
        rep movsq
        call    use_slot                # 7 * 16
        jmp     finish

use_slot:
        mov     eax, 7
        call    slot
        call    put_decimal
        mix
        ret

        .balign 4096, 0xcc
slot:   inc     eax
        ret
        .org    slot + FUNCTION, 0xcc
slot_end:
        ret

        .balign 4096, 0xcc
double_it:
        add     eax, eax
        ret
        .org    double_it + FUNCTION, 0xcc
square_it:
        imul    eax, eax
        ret
        .org    square_it + FUNCTION, 0xcc
times_sixteen:
        shl     eax, 4
        ret
        .org    times_sixteen + FUNCTION, 0xcc
