# Page-modification logging: which pages has a guest written?
#
# The guest writes to each of 1100 pages, first to those with even numbers, then to those with odd ones, reads sixteen
# others, and writes to all of the 1100 once more. The processor logs a page when its dirty flag is set, hence at the
# first of the two writes. The log has 512 entries: a write that meets a full one does not happen before the VMM has
# drained it.

        .include "guest.inc"
        .global _start, first_write, second_write, read

        .equ    PAGE, 0x1000
        .equ    WRITTEN, 0x100000       # 1100 pages
        .equ    COUNT, 1100
        .equ    READ_ONLY, 0x560000     # 16 pages

_start: xor     r15d, r15d
        mov     edi, WRITTEN
        call    write_every_other
        mov     edi, WRITTEN + PAGE
        call    write_every_other

        mov     esi, READ_ONLY
        mov     ecx, 16
read:   mov     eax, dword ptr [rsi]
        mix
        add     esi, PAGE
        dec     ecx
        jnz     read

        mov     edi, WRITTEN            # all of them once more: nothing new
        mov     ecx, COUNT
second_write:
        add     dword ptr [rdi], ecx
        mov     eax, dword ptr [rdi]    # both writes have happened
        mix
        add     edi, PAGE
        dec     ecx
        jnz     second_write

        say     "pml-dirty wrote "
        mov     eax, COUNT
        call    put_decimal
        jmp     finish

write_every_other:
        mov     ecx, COUNT / 2
first_write:
        mov     dword ptr [rdi], edi
        add     edi, 2 * PAGE
        dec     ecx
        jnz     first_write
        ret
