# Shrink-wrap: a profiling JIT drops the saves of callee-saved registers that a function's hot path does not need.
#
# A managed function saves rbx, r12 and r13 in its prologue, all of them at first, and counts which of its paths
# run. When it has been called often enough, the runtime keeps only the saves that those paths need (the hot path of
# `digest` clobbers rbx, that of `scale` nothing), by rewriting four places of five bytes:
#
#   NAME_in, NAME_out            the pushes of the prologue, the pops of the epilogue
#   NAME_cold_in, NAME_cold_out  the same around the cold path; NOPs as long as the prologue saves everything
#
# A save that leaves the prologue moves to the entry of the cold path: that is the fallback for the calls that do
# clobber the register, and what compilers call shrink-wrapping. The body of the cold path finds the same frame in
# every version, all registers saved, so that a call which is in there may see its function rewritten. When the
# cold path has run too often, the runtime gives the prologue its saves back, and profiles anew.
#
# The unwind table lies behind the functions. An entry says how many registers the prologue saves, in this
# version; with the places it tells for each instruction what is on the stack. Exceptions (#DE, #UD) go by it: the
# handler takes the registers back, frame by frame, to the landing pad of `driver`, which relies on them.
#
# No order of four stores makes a function that could be called in between, or returned to. So the runtime rewrites
# one with interrupts off, and only when no frame on the stack lies in its prologue, hot path or epilogue (it
# walks the stack by the table to know); otherwise it tries again at the next call. All frames that there may be
# (at the entry, in the cold path) have the same meaning by the old entry and the new one, so whoever unwinds in the
# middle, a non-maskable interrupt for one, finds the truth.
#
# Code runs where it is read-and-execute and is written through VIEW, which is read-and-write.
#
# Wrong versions: NO_TABLE does not touch the unwind table; NO_FALLBACK does not touch the cold path, and never gives
# the prologue its saves back.

        .ifndef NO_TABLE
        .set    NO_TABLE, 0
        .endif
        .ifndef NO_FALLBACK
        .set    NO_FALLBACK, 0
        .endif

        .include "guest.inc"
        .global _start, driver, driver_pad, check, idt
        .global digest, digest_in, digest_out, digest_cold_in, digest_cold_body, digest_cold_out, digest_trap
        .global scale, scale_in, scale_out, scale_cold_in, scale_cold_body, scale_cold_out, scale_divide, scale_trap
        .global unwind_digest, unwind_scale, unwind_driver, saves_digest, saves_scale

# What an operand is made of: up to three items of 12 bits, the outermost call's first.
        .equ    RARE, 0x100             # takes the cold path of digest
        .equ    SCALE_RARE, 0x200       # takes that of scale
        .equ    TRAP, 0x400             # the cold path raises #UD
        .equ    VALUE, 0xff             # scale divides by it: #DE if it is 0

        .data                           # first of all: guest.toml gives its address
idt:    .word   divide_error - 0x10000, 0x08, 0x8e00, 0x0001    # vector 0: interrupt gate, offset 0x1xxxx
        .long   0, 0
        .fill   5 * 16, 1, 0
        .word   invalid_opcode - 0x10000, 0x08, 0x8e00, 0x0001  # vector 6
        .long   0, 0

        .text
_start: xor     r15d, r15d
        say     "shrink-wrap pushes "
        call    driver
        mov     ebx, offset profile_digest
        call    account
        mov     ebx, offset profile_scale
        call    account
        mov     eax, [pushes]
        call    put_decimal
        mix
        say     "saved "
        mov     eax, [saved]
        call    put_decimal
        mix
        say     "postponed "
        mov     eax, [postponed]
        call    put_decimal
        mix
        say     "unwound "
        mov     eax, [unwound]
        call    put_decimal
        mix
        say     "damaged "
        mov     eax, [damaged]
        call    put_decimal
        mix
        jmp     finish

# driver: calls digest with one operand after the other and relies on what a callee must keep.
driver: .byte   0x0f, 0x1f, 0x44, 0, 0  # not profiled
        push    rbp
        mov     rbp, rsp
driver_in:
        push    rbx
        push    r12
        push    r13
        mov     ebx, offset operands
1:      imul    r12d, ebx, 0x01000193   # two values that a wrong save or restore would replace
        mov     r13d, r12d
        not     r13d
        mov     edi, [rbx]
        call    digest
        jmp     check
driver_pad:                             # exceptions of the call land here, with eax = the vector
        inc     dword ptr [unwound]
        add     eax, 0x7000
check:  mix
        imul    eax, ebx, 0x01000193
        cmp     r12, rax
        jne     2f
        not     eax
        cmp     r13, rax
        je      3f
2:      inc     dword ptr [damaged]
3:      add     ebx, 4
        cmp     ebx, offset operands_end
        jb      1b
driver_out:
        pop     r13
        pop     r12
        pop     rbx
        pop     rbp
        ret
driver_end:

        .include "shrink-wrap/unwind.inc"
        .include "shrink-wrap/runtime.inc"

# The managed functions, on a page of their own: the view is of this page.
        .balign 4096, 0xcc

# digest: eax = a number made of the items of operand edi, one call an item.
        prologue digest                 # hot path: clobbers rbx
        inc     dword ptr [rip + profile_digest + HOT]
        mov     ebx, edi
        test    edi, RARE
        jnz     digest_cold_in
1:      mov     edi, ebx
        and     edi, 0xfff
        call    scale
        shr     ebx, 12
        jz      digest_out
        mov     edi, ebx
        mov     ebx, eax
        call    digest
        imul    eax, eax, 7
        add     eax, ebx
        epilogue digest
        cold_in digest                  # clobbers r12 and r13
        movzx   r12d, dil
        imul    r13d, r12d, 0x55
        and     r13d, VALUE
        test    edi, TRAP
        jz      2f
digest_trap:
        ud2
2:      or      r13d, 1
        xor     bl, bl
        add     ebx, r13d
        cold_out digest
        jmp     1b
digest_end:

# scale: eax = a number made of the item edi.
        prologue scale                  # hot path: clobbers none
        inc     dword ptr [rip + profile_scale + HOT]
        movzx   ecx, dil
        mov     eax, 1000003
        xor     edx, edx
scale_divide:
        div     ecx
        test    edi, SCALE_RARE
        jnz     scale_cold_in
        epilogue scale
        cold_in scale                   # clobbers rbx, r12 and r13
        mov     ebx, eax
        imul    r12d, ebx, 3
        lea     r13d, [r12 + rbx]
        test    edi, TRAP
        jz      2f
scale_trap:
        ud2
2:      mov     eax, r13d
        cold_out scale
        jmp     scale_out
scale_end:

        .balign 32, 0xcc
unwind_table:
        entry   digest, 0, digest_cold_in-digest, digest_cold_out-digest
        entry   scale, 0, scale_cold_in-scale, scale_cold_out-scale
        entry   driver, driver_pad, 0xff, 0xff
unwind_table_end:
        .balign 4096, 0xcc

        .data
        profile_data digest, RBX_BIT, R12_BIT|R13_BIT
        profile_data scale, 0, RBX_BIT|R12_BIT|R13_BIT

        .balign 4
damaged:                                # calls after which driver missed a register
        .long   0

operands:
        .long   1, 2, 3, 4, 5, 6, 7 | 8 << 12           # the eighth call is an inner one: postponed
        .long   9, 10 | 11 << 12 | 12 << 24, 13         # rewritten: version 2
        .long   0, 14 | 0 << 12 | 15 << 24, 16          # #DE, through two functions and through three
        .long   17 | RARE, 18 | SCALE_RARE              # the fallback
        .long   19 | RARE | TRAP, 20 | SCALE_RARE | TRAP        # #UD behind it
        .long   21 | (22 | RARE) << 12                  # digest's third, an inner one: postponed
        .long   23 | RARE, 24 | SCALE_RARE              # everything is saved again: version 3
        .long   25, 0, 26 | RARE, 27 | SCALE_RARE, 28 | RARE | TRAP     # and nothing to gain from this profile
        .long   29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40
        .rept   20                                      # but from this one: version 4
        .long   41 | 42 << 12, 43
        .endr
        .long   48, 0, 49 | RARE, 50 | RARE | TRAP, 51 | SCALE_RARE, 52 | SCALE_RARE | TRAP, 53
operands_end:
