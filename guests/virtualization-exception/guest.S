# The guest tracks its own writes: two pages are read-only in the first view of memory, and a store to one is a
# virtualization exception, #VE, which the processor delivers without a VM exit. The handler writes down which page it
# was, frees the information area and switches to the view in which all is writable, by VMFUNC. The program switches
# back behind each store.
#
# While the area is busy there is no #VE: the same store is an EPT violation, and the VMM answers with #GP. So it is
# for a third page, whose entry suppresses #VE.

        .include "guest.inc"
        .global _start, store, store_busy, store_kept, back, tracked, kept, area, idt
        .global virtualization_exception, switch, general_protection

        .equ    BUSY, 4                 # in the information area
        .equ    QUALIFICATION, 8
        .equ    LINEAR, 16
        .equ    PHYSICAL, 24
        .equ    INDEX, 32

        .macro  vmfunc
        .byte   0x0f, 0x01, 0xd4
        .endm

_start: xor     r15d, r15d
        xor     r14d, r14d              # the pages that were written, a decimal digit each
        xor     r12d, r12d              # stores that the VMM has refused
        say     "virtualization-exception tracked "
        mov     ebp, 4
again:  mov     ebx, ebp                # pages 0, 1, 0, 1
        and     ebx, 1
        xor     ebx, 1
        shl     ebx, 12
        mov     esi, offset tracked
        add     esi, ebx
store:  mov     [rsi + rbp * 4], ebp    # the first time in this view: #VE
        xor     eax, eax
        xor     ecx, ecx
back:   vmfunc
        dec     ebp
        jnz     again
        mov     eax, r14d
        call    put_decimal
        mix

        mov     dword ptr [area + BUSY], -1
        lea     r13, [rip + 1f]
        mov     esi, offset tracked
store_busy:
        mov     [rsi], ebp
1:      mov     dword ptr [area + BUSY], 0
        lea     r13, [rip + 1f]
        mov     esi, offset kept
store_kept:
        mov     [rsi], ebp
1:      mov     eax, r12d
        call    put_decimal
        mix
        mov     eax, [tracked + 16]     # what was stored
        mix
        mov     eax, [tracked + 0x1000 + 12]
        mix
        jmp     finish

        .balign 64, 0xcc
virtualization_exception:               # ring 0; the frame is rip, cs, rflags, rsp, ss
        mov     eax, [area]             # the exit reason
        mix
        mov     eax, [area + QUALIFICATION]
        mix
        mov     eax, [area + LINEAR]
        mix
        movzx   eax, word ptr [area + INDEX]
        mix
        mov     eax, [area + PHYSICAL]
        mix
        sub     eax, offset tracked
        shr     eax, 12
        inc     eax
        imul    r14d, r14d, 10
        add     r14d, eax
        mov     dword ptr [area + BUSY], 0
        xor     eax, eax
        mov     ecx, 1
switch: vmfunc
        iretq

        .balign 64, 0xcc
general_protection:
        inc     r12d
        mov     [rsp + 8], r13
        add     rsp, 8
        iretq

        .data
        .balign 16
idt:    .org    idt + 16 * 13           # interrupt gates to 0x1xxxx
        .word   general_protection - 0x10000, 0x08, 0x8e00, 0x0001
        .long   0, 0
        .org    idt + 16 * 20
        .word   virtualization_exception - 0x10000, 0x08, 0x8e00, 0x0001
        .long   0, 0
        .bss
        .balign 4096
area:   .skip   4096
tracked:
        .skip   2 * 4096
kept:   .skip   4096
