# Cross-modifying code: vCPU 0 patches an instruction that vCPU 1 executes all the time.
#
# The instruction has five bytes, which lie on two cache lines: no store changes all of them at once. So vCPU 0
# first puts an int3 over the first byte. Whoever runs into it goes to the #BP handler, which does what the new
# instruction will do. Then the other bytes follow, and at last the first one. After each of the three stores an
# interprocessor interrupt makes vCPU 1 serialise (SDM vol. 3, 9.1.3), and vCPU 0 waits until it has. What counts as
# wrong is a mixture, and a version older than the last one that was complete when the round began.
#
# Version n is `mov eax, imm32` if n is odd and `mov ecx, imm32` if it is even; its four immediate bytes are all n.
# So a mixture of two versions shows: in an immediate of unequal bytes, or in the wrong register.

        .include "guest.inc"
        .global _start, patch, breakpoint_store, tail_store, opcode_store, first_store, last_store, synchronise, send
        .global executor, site, mixture, stale, breakpoint, serialise, idt

        .equ    VIEW, 0x40000000        # see guest.toml: VIEW + gpa is the writable view
        .equ    IPI, 0xb0               # OUT of 16 bits: vector, and whom to interrupt (0xff: all others)
        .equ    SERIALISE, 0x40         # the vector
        .equ    LAST, 21                # versions 2 to LAST are patched in

        # wait_until: until a doubleword in memory equals a register.
        .macro  wait_until place, register
1:      pause
        cmp     dword ptr [\place], \register
        jne     1b
        .endm

_start: xor     r15d, r15d
        say     "cross-modify patches "
        mov     ebx, 2                  # the version that is coming
patch:
        call    wait_for_rounds
        mov     eax, ebx
        and     eax, 1
        mov     al, byte ptr [opcodes + rax]
        mov     byte ptr [coming], al
        imul    eax, ebx, 0x01010101
        mov     dword ptr [coming + 1], eax
        mov     [begun], ebx
        mov     edi, offset site + VIEW
.ifdef TORN                             # as a memcpy copies five bytes: four, and one
        mov     edx, dword ptr [coming]
first_store:
        mov     dword ptr [rdi], edx
        mov     dl, byte ptr [coming + 4]
last_store:
        mov     byte ptr [rdi + 4], dl
.else
breakpoint_store:
        mov     byte ptr [rdi], 0xcc
        call    synchronise
tail_store:
        mov     dword ptr [rdi + 1], eax
        call    synchronise
        mov     al, byte ptr [coming]
opcode_store:
        mov     byte ptr [rdi], al
        call    synchronise
.endif
        mov     [completed], ebx
        inc     ebx
        cmp     ebx, LAST
        jbe     patch

        call    wait_for_rounds
        mov     dword ptr [stop], 1
        mov     edx, 1
        wait_until stopped, edx

        mov     eax, LAST - 1
        call    put_decimal
        say     "last seen "
        mov     eax, [seen]
        call    put_decimal
        say     "wrong "
        mov     eax, [wrong]
        call    put_decimal
        add     eax, [digest]
        mov     r15d, eax
        jmp     finish

# synchronise: have all other processors serialise, and wait until they have. Changes edx and esi.
synchronise:
.ifndef UNSYNCHRONISED
        clflush [rdi]                   # nothing on x86; elsewhere the instruction caches must be told, too
        clflush [rdi + 4]
        push    rax
        mov     esi, [acknowledged]
        inc     esi
        mov     eax, 0xff00 | SERIALISE
        mov     edx, IPI
send:   out     dx, ax
        wait_until acknowledged, esi
        pop     rax
.endif
        ret

# wait_for_rounds: until vCPU 1 has gone round twice, so that it has executed what is there now. Changes edx.
wait_for_rounds:
        mov     edx, [rounds]
        add     edx, 2
1:      pause
        cmp     dword ptr [rounds], edx
        jb      1b
        ret

# vCPU 1: execute the instruction, and see that what it did is what one version does, a possible one, in order.
        .balign 64, 0xcc
        .skip   64 - 2 - 11, 0xcc       # the site's first two bytes end a cache line
executor:
        mov     ebp, dword ptr [completed]      # older versions than this must be gone
        xor     eax, eax
        xor     ecx, ecx
site:   mov     eax, 0x01010101         # version 1; executed by vCPU 1 alone
        mov     edx, [begun]            # newer versions than this cannot be there
        mov     esi, eax
        or      esi, ecx
        movzx   edi, sil                # the version
        imul    ebx, edi, 0x01010101
        cmp     ebx, esi
        jne     .Lmixture
        mov     ebx, eax                # odd versions are in eax, even ones in ecx
        test    edi, 1
        jnz     2f
        mov     ebx, ecx
2:      cmp     ebx, esi
        jne     .Lmixture
        cmp     edi, edx
        ja      .Lmixture
        cmp     edi, ebp
        jb      .Lstale
        cmp     edi, [seen]
        jb      .Lstale
        je      .Lround
        mov     [seen], edi             # each version once, in order
        imul    ebx, [digest], 31
        add     ebx, esi
        mov     [digest], ebx
.Lround:
        lock inc dword ptr [rounds]
        cmp     dword ptr [stop], 1
        jne     executor
        mov     dword ptr [stopped], 1
        cli
        hlt

.Lmixture:
        mov     eax, esi
        inc     dword ptr [wrong]
mixture:
        vmcall                          # a hypercall with the value that no version gives
        jmp     .Lround
.Lstale:
        mov     eax, edi
        inc     dword ptr [wrong]
stale:  vmcall                          # a hypercall with the version that should have been gone
        jmp     .Lround

# #BP: do what the instruction that is coming does, and go on behind it.
        .balign 64, 0xcc
breakpoint:
        cmp     qword ptr [rsp], offset site + 1
        jne     .Lforeign
        add     qword ptr [rsp], 4
        cmp     byte ptr [coming], 0xb9
        je      1f
        mov     eax, dword ptr [coming + 1]
        iretq
1:      mov     ecx, dword ptr [coming + 1]
        iretq
.Lforeign:
        ud2

# The interprocessor interrupt: serialise, and say so.
serialise:
        push    rax
        push    rbx
        push    rcx
        push    rdx
        xor     eax, eax
        cpuid                           # nothing that was fetched before it is executed after it
        lock inc dword ptr [acknowledged]
        pop     rdx
        pop     rcx
        pop     rbx
        pop     rax
        iretq

        .data
        .balign 16
idt:    .fill   3 * 16, 1, 0            # vectors 0 to 2: not present
        .word   breakpoint - 0x10000, 0x08, 0x8e00, 0x0001
        .long   0, 0
        .fill   (SERIALISE - 4) * 16, 1, 0
        .word   serialise - 0x10000, 0x08, 0x8e00, 0x0001
        .long   0, 0

begun:  .long   1                       # the version that vCPU 0 patches in, or has last patched in
completed:
        .long   1                       # the last version that is complete, and known to vCPU 1
coming: .skip   5                       # the instruction that is patched in
opcodes:
        .byte   0xb9, 0xb8              # `mov ecx, imm32` of even versions, `mov eax, imm32` of odd ones
        .balign 4
acknowledged:
        .long   0
rounds: .long   0
seen:   .long   0
digest: .long   0
wrong:
        .long   0
stop:   .long   0
stopped:
        .long   0
