# Unmap: a kernel takes a page of code away from a ring-3 program and uses its frame itself.
#
# The program calls PLUGIN. Nothing is mapped there: the kernel takes the next frame, puts a function into it that
# returns the number of the load, and maps it. System call 0 gives the plug-in back: the kernel clears the entry of
# the page table, invalidates what the processor has cached of it (INVLPG), and changes the code in the frame, which
# is its own from now on. When the program calls PLUGIN again, that must fault, and find another frame; what the
# kernel keeps in the old one is not the program's to run.

        .include "guest.inc"
        .include "ring0.inc"
        .global _start, use, page_fault, load, system_call, clear, invalidate, reuse

        .equ    PLUGIN, PAGES + 0x40000
        .equ    PLUGIN_ENTRY, page_table + (PLUGIN >> 12) * 8
        .equ    FIRST_FRAME, 0x70000
        .equ    KERNELS, 1492           # what the kernel's function returns

_start: call    start_user              # and from here on in ring 3

        xor     r15d, r15d
        xor     r14d, r14d              # loads, counted by the kernel
        mov     r13d, FIRST_FRAME       # the next one to map
        mov     ebp, PLUGIN
        mov     ecx, 5
        say     "unmap ran "
use:    call    rbp                     # fault: nothing is mapped there; then the new function
        call    put_decimal
        mix
        int     0x80
        dec     ecx
        jnz     use
        mov     eax, r14d
        mix
        jmp     finish

page_fault:                             # may change rax: the program keeps nothing there
        inc     r14d
        mov     rax, cr2
        shr     rax, 12
        cmp     eax, PLUGIN >> 12
        jne     stray
load:   mov     byte ptr [r13], 0xb8    # mov eax, r14d; ret
        mov     dword ptr [r13 + 1], r14d
        mov     byte ptr [r13 + 5], 0xc3
        lea     eax, [r13 + PRESENT + USER]
        mov     dword ptr [PLUGIN_ENTRY], eax
        add     r13d, 0x1000
        add     rsp, 8                  # the error code
        iretq                           # the instruction that faulted runs again

stray:  mov     r15d, 0xdead            # a fault that this guest does not know
        jmp     finish

system_call:                            # take PLUGIN away, and use its frame
        mov     eax, dword ptr [PLUGIN_ENTRY]
clear:  mov     dword ptr [PLUGIN_ENTRY], 0
.ifndef WRONG
invalidate:
        invlpg  [PLUGIN]
.endif
        and     eax, 0xfffff000
        jz      1f
reuse:  mov     dword ptr [rax + 1], KERNELS
1:      iretq
