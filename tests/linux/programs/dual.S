# A W^X dual mapping: one page of a memfd, RW at one address and RX at two others, patched and run 10,000 times.
# Each version is called through both executable addresses, and has to be the one that was written last.

        .include "program.inc"

        .set RW, 0x10000000
        .set RX, 0x20000000
        .set RX_AGAIN, 0x30000000

        .globl  _start
_start:
        mov     edi, offset name
        xor     esi, esi
        system  SYS_memfd_create
        mov     ebp, eax
        system  SYS_ftruncate, rbp, PAGE
        map_page RW, PROT_READ|PROT_WRITE, MAP_SHARED, ebp
        map_page RX, PROT_READ|PROT_EXEC, MAP_SHARED, ebp
        map_page RX_AGAIN, PROT_READ|PROT_EXEC, MAP_SHARED, ebp

        mov     rax, MOV_EAX_RET
        mov     [RW], rax
        expect  RX, 0
        expect  RX_AGAIN, 0

        xor     ebx, ebx
again:  inc     ebx
        mov     [RW + 1], ebx
        expect  RX, ebx
        expect  RX_AGAIN, ebx
        cmp     ebx, COUNT
        jne     again
        leave   right, 0

stale:  leave   wrong, 1
failed: leave   refused, 2

name:   .asciz  "code"
        line    right, "dual 10000 ok"
        line    wrong, "dual: an old version has run"
        line    refused, "dual: a system call failed"
