# A page that is RW while it is written and RX while it runs: mprotect forth, a patch, mprotect back, 10,000 times.

        .include "program.inc"

        .set CODE, 0x40000000

        .globl  _start
_start:
        map_page CODE, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1
        mov     rax, MOV_EAX_RET
        mov     [CODE], rax
        system  SYS_mprotect, CODE, PAGE, PROT_READ|PROT_EXEC
        expect  CODE, 0

        xor     ebx, ebx
again:  inc     ebx
        system  SYS_mprotect, CODE, PAGE, PROT_READ|PROT_WRITE
        mov     [CODE + 1], ebx
        system  SYS_mprotect, CODE, PAGE, PROT_READ|PROT_EXEC
        expect  CODE, ebx
        cmp     ebx, COUNT
        jne     again
        leave   right, 0

stale:  leave   wrong, 1
failed: leave   refused, 2

        line    right, "mprotect 10000 ok"
        line    wrong, "mprotect: an old version has run"
        line    refused, "mprotect: a system call failed"
