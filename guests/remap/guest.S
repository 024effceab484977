# Remap: ring-3 code whose page moves to another frame under its feet, by the guest's own ring-0 page-fault
# handler.
#
# WORKER is one linear page; three frames of the image hold three versions of its code. The first call
# faults, and the handler maps the current version there, read-only. The program then patches it: that
# faults too, and the handler does what fork() does: it copies the page into a private frame and maps that
# one there, writable. The linear address and the bytes around the patch stay the same; the frame that the
# code runs from does not. System call 0 goes on to the next version. At the end the three versions must be
# as the image has them.

        .include "guest.inc"
        .include "ring0.inc"
        .global _start, round, writer, page_fault, map_version, copy_on_write, system_call
        .global version_1, version_2, version_3

        .equ    WORKER, PAGES + 0x40000
        .equ    WORKER_ENTRY, page_table + (WORKER >> 12) * 8
        .equ    PRIVATE, 0x70000        # the frame for copies

_start: call    start_user              # and from here on in ring 3

        xor     r15d, r15d
        xor     r14d, r14d              # page faults, counted by the handler
        mov     r13d, offset version_1  # the version to map
        mov     ebp, WORKER
        mov     ecx, 3
        say     "remap ran "
round:
        call    rbp                     # fault: not present; then the version that the image has
        call    put_decimal
        mix
writer: add     dword ptr [rbp + 1], 5  # fault: read-only; then into the copy
        call    rbp                     # the copy, patched
        call    put_decimal
        mix
        int     0x80
        dec     ecx
        jnz     round

        mov     esi, offset version_1   # the originals are untouched: 100 + 200 + 300
        mov     ecx, 3
        xor     eax, eax
1:      add     eax, dword ptr [rsi + 1]
        add     esi, 0x1000
        dec     ecx
        jnz     1b
        mix
        mov     eax, r14d
        mix
        jmp     finish

page_fault:                             # may change rax, rsi and rdi: the program keeps nothing there
        inc     r14d
        mov     rax, cr2
        shr     rax, 12
        cmp     eax, WORKER >> 12
        jne     stray
        test    byte ptr [rsp], PRESENT # bit 0 of the error code: the page was there
        jnz     copy_on_write
map_version:
        lea     eax, [r13 + PRESENT + USER]
        jmp     install

copy_on_write:
        push    rcx
        mov     esi, r13d
        mov     edi, PRIVATE
        mov     ecx, 4096 / 8
        rep movsq
        pop     rcx
        mov     eax, PRIVATE + ALL
install:
        mov     dword ptr [WORKER_ENTRY], eax
        invlpg  [WORKER]
        add     rsp, 8                  # the error code
        iretq                           # the instruction that faulted runs again

stray:  mov     r15d, 0xdead            # a fault that this guest does not know
        jmp     finish

system_call:                            # on to the next version: unmap; the next call faults
        add     r13d, 0x1000
        mov     dword ptr [WORKER_ENTRY], 0
        invlpg  [WORKER]
        iretq

        .balign 4096, 0xcc
version_1:
        mov     eax, 100
        ret
        .balign 4096, 0xcc
version_2:
        mov     eax, 200
        imul    eax, eax, 3
        ret
        .balign 4096, 0xcc
version_3:
        mov     eax, 300
        neg     eax
        neg     eax
        add     eax, 7
        ret
        .balign 4096, 0xcc
