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
        .global _start, driver, driver_pad, check, profile, rare, rewrite, poke_store, table_store
        .global is_busy, step_out, divide_error, invalid_opcode, landing, lost
        .global digest, digest_in, digest_out, digest_cold_in, digest_cold_body, digest_cold_out, digest_trap
        .global scale, scale_in, scale_out, scale_cold_in, scale_cold_body, scale_cold_out, scale_divide, scale_trap
        .global unwind_digest, unwind_scale, unwind_driver, saves_digest, saves_scale, idt

        .equ    VIEW, 0x40000000        # see guest.toml: VIEW + gpa is the writable view of the managed functions
        .equ    ENOUGH, 8               # calls that make a profile
        .equ    TOO_OFTEN, 3            # entries to a cold path after which its function saves everything again
        .equ    ALL, 3                  # rbx, r12, r13, saved in this order

# A register's bit in a set of clobbered ones.
        .equ    RBX_BIT, 1
        .equ    R12_BIT, 2
        .equ    R13_BIT, 4

# What an operand is made of: up to three items of 12 bits, the outermost call's first.
        .equ    RARE, 0x100             # takes the cold path of digest
        .equ    SCALE_RARE, 0x200       # takes that of scale
        .equ    TRAP, 0x400             # the cold path raises #UD
        .equ    VALUE, 0xff             # scale divides by it: #DE if it is 0

# An entry of the unwind table. Places are offsets from `start`.
        .struct 0
START:  .skip   4
UNTIL:  .skip   4
SAVES:  .skip   4                       # how many registers the prologue saves;
VERSION:
        .skip   4                       # with this one a quadword, so that one store changes both
PAD:    .skip   4                       # the landing pad, 0 if there is none
IN:     .skip   1
OUT:    .skip   1
COLD_IN:
        .skip   1
COLD_OUT:
        .skip   1
        .skip   8
ENTRY_SIZE:

# A function's profile.
        .struct 0
ENTRY:  .skip   8                       # its entry in the unwind table
CALLS:  .skip   4
RARES:  .skip   4                       # how often the cold path saved for itself
NOW:    .skip   4                       # how many registers the prologue saves
HOT:    .skip   8                       # of each path, how often it ran, and what it clobbers
COLD:   .skip   8
        .skip   4
PROFILE_SIZE:

# What the unwinder knows of a frame.
        .struct 0
AT_RIP:    .skip   8
AT_RSP:    .skip   8
AT_RBP:    .skip   8
AT_SAVED:
        .skip   3 * 8                   # rbx, r12, r13

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

# The runtime. `enter` saves all registers that it uses, and begins a walk at the function that called;
# `leave_runtime` restores them.
        .equ    KEPT, 13 * 8
        .macro  enter
        .irp    register, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13
        push    \register
        .endr
        mov     rax, [rsp + KEPT]
        mov     [context + AT_RIP], rax
        lea     rax, [rsp + KEPT + 8]
        mov     [context + AT_RSP], rax
        call    keep_registers
        .endm
        .macro  leave_runtime
        .irp    register, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax
        pop     \register
        .endr
        ret
        .endm
keep_registers:
        mov     [context + AT_RBP], rbp
        mov     [context + AT_SAVED], rbx
        mov     [context + AT_SAVED + 8], r12
        mov     [context + AT_SAVED + 16], r13
        ret

# profile: called first of all by a function that is being profiled.
profile:
        enter
        call    profile_of
        inc     dword ptr [rbx + CALLS]
        cmp     dword ptr [rbx + CALLS], ENOUGH
        jb      1f
        call    needs
        cmp     ecx, ALL
        je      2f
        call    is_busy
        jc      1f
        call    rewrite
1:      leave_runtime
2:      call    account                 # nothing to gain: profile anew
        leave_runtime

# rare: called by a cold path, which has saved what the prologue has not.
rare:   enter
        call    profile_of
        .if     !NO_FALLBACK
        cmp     dword ptr [rbx + NOW], ALL
        je      1f
        inc     dword ptr [rbx + RARES]
        cmp     dword ptr [rbx + RARES], TOO_OFTEN
        jb      1f
        call    is_busy
        jc      1f
        mov     ecx, ALL
        call    rewrite
        .endif
1:      leave_runtime

# profile_of: rbx = the profile, rsi = the unwind entry of the function that the context is in.
profile_of:
        mov     eax, [context + AT_RIP]
        call    find_entry
        mov     ebx, offset profile_digest
        cmp     rsi, [rbx + ENTRY]
        je      1f
        mov     ebx, offset profile_scale
1:      ret

# needs: ecx = how many saves the paths of profile rbx need that have run: up to the last register that one of
# them clobbers.
needs:  mov     eax, 1
        cmp     dword ptr [rbx + HOT], 0
        je      1f
        mov     ecx, [rbx + HOT + 4]
        lea     eax, [rax + rcx * 2]
1:      cmp     dword ptr [rbx + COLD], 0
        je      2f
        mov     ecx, [rbx + COLD + 4]
        shl     ecx, 1
        or      eax, ecx
2:      bsr     ecx, eax
        ret

# is_busy: carry if a frame on the stack lies in a part of profile rbx's function that is to be rewritten.
is_busy:
        push    rcx
        mov     rdi, [rbx + ENTRY]
1:      call    step_out
        test    esi, esi
        jz      2f                      # all frames are behind us; carry is clear
        cmp     rsi, rdi
        jne     1b
        movzx   edx, byte ptr [rsi + IN]
        cmp     eax, edx
        jb      1b                      # at the entry
        movzx   edx, byte ptr [rsi + OUT]
        add     edx, 7
        cmp     eax, edx
        jae     1b                      # in the cold path
        inc     dword ptr [postponed]
        stc
2:      pop     rcx
        ret

# rewrite: have the prologue of profile rbx's function save ecx registers, and the cold path the others. Saves appear
# before others disappear.
rewrite:
        call    account
        mov     rsi, [rbx + ENTRY]
        cmp     ecx, [rbx + NOW]
        mov     [rbx + NOW], ecx
        ja      1f
        call    set_cold
        call    set_table
        call    set_main
        jmp     hook_off                # the profile is taken
1:      call    set_main
        call    set_table
        call    set_cold
        jmp     hook_on

set_main:
        movzx   edi, byte ptr [rsi + IN]
        mov     rax, [pushes_of + rcx * 8]
        call    poke
        movzx   edi, byte ptr [rsi + OUT]
        mov     rax, [pops_of + rcx * 8]
        jmp     poke

set_cold:
        .if     !NO_FALLBACK
        movzx   edi, byte ptr [rsi + COLD_IN]
        mov     rax, [cold_pushes_of + rcx * 8]
        call    poke
        movzx   edi, byte ptr [rsi + COLD_OUT]
        mov     rax, [cold_pops_of + rcx * 8]
        jmp     poke
        .endif
        ret

set_table:
        mov     eax, [rsi + VERSION]
        inc     eax
        shl     rax, 32
        or      rax, rcx
table_store:
        .if     !NO_TABLE
        mov     [rsi + SAVES + VIEW], rax
        .endif
        ret

hook_off:
        mov     eax, 0x00441f0f         # a NOP of five bytes
        xor     edi, edi
        jmp     poke
hook_on:
        mov     eax, offset profile - 5
        sub     eax, [rsi + START]
        shl     rax, 8
        mov     al, 0xe8                # call profile
        xor     edi, edi

# poke: write the low five bytes of rax at offset rdi of the function of entry rsi, in one store. Changes rdx, rdi.
poke:   add     edi, [rsi + START]
        mov     rdx, [rdi]
        shr     rdx, 40                 # the three bytes behind them stay
        shl     rdx, 40
        or      rdx, rax
poke_store:
        mov     [rdi + VIEW], rdx
        ret

# account: add up what the function of profile rbx has saved since it was last rewritten, and count anew. A cold
# path that saves for itself makes the pushes that its prologue has not made.
account:
        mov     eax, ALL
        sub     eax, [rbx + NOW]
        mov     edx, [rbx + HOT]
        sub     edx, [rbx + COLD]
        imul    eax, edx
        add     [saved], eax
        imul    eax, dword ptr [rbx + HOT], ALL
        add     [pushes], eax
        xor     eax, eax
        mov     [rbx + HOT], eax
        mov     [rbx + COLD], eax
        mov     [rbx + CALLS], eax
        mov     [rbx + RARES], eax
        ret

# The unwinder.

# find_entry: rsi = the entry of the unwind table for the address eax, or 0. Changes nothing else.
find_entry:
        mov     esi, offset unwind_table
1:      cmp     eax, [rsi + START]
        jb      2f
        cmp     eax, [rsi + UNTIL]
        jb      3f
2:      add     esi, ENTRY_SIZE
        cmp     esi, offset unwind_table_end
        jb      1b
        xor     esi, esi
3:      ret

# step_out: take the context from a function to its caller. rsi = the function's entry, eax = where in the function it
# was; rsi = 0 if the function has no entry: the context stays. Changes rcx, rdx, r8 and r9.
step_out:
        mov     eax, [context + AT_RIP]
        call    find_entry
        test    esi, esi
        jz      5f
        sub     eax, [rsi + START]
        xor     ecx, ecx
1:      call    is_saved
        jnc     2f
        mov     rdx, [context + AT_RBP]
        mov     r8, rcx
        not     r8                      # -1 - rcx: rbx lies right below the saved rbp, then r12, r13
        mov     rdx, [rdx + r8 * 8]
        mov     [context + AT_SAVED + rcx * 8], rdx
2:      inc     ecx
        cmp     ecx, ALL
        jb      1b

        mov     rdx, [context + AT_RSP]
        cmp     eax, 6
        jb      4f                      # before `push rbp`: the return address is on top
        je      3f                      # before `mov rbp, rsp`: the saved rbp is
        movzx   r8d, byte ptr [rsi + OUT]
        add     r8d, 6
        cmp     eax, r8d
        je      4f                      # at the RET
        mov     rdx, [context + AT_RBP]
3:      mov     r8, [rdx]
        mov     [context + AT_RBP], r8
        add     rdx, 8
4:      mov     r8, [rdx]
        mov     [context + AT_RIP], r8
        add     rdx, 8
        mov     [context + AT_RSP], rdx
5:      ret

# is_saved: carry if register ecx (0 rbx, 1 r12, 2 r13) is on the stack at offset eax of the function of entry rsi.
is_saved:
        movzx   r8d, byte ptr [rsi + IN]
        movzx   r9d, byte ptr [rsi + OUT]
        cmp     ecx, [rsi + SAVES]
        jb      1f
        movzx   r8d, byte ptr [rsi + COLD_IN]   # saved by the cold path, for itself
        movzx   r9d, byte ptr [rsi + COLD_OUT]
        jmp     2f
1:      lea     edx, [r9 + 6]
        cmp     edx, eax
        jc      3f                      # behind the RET: the cold path, within the prologue's saves
2:      movzx   edx, byte ptr [pushed_at + rcx]
        add     edx, r8d
        cmp     eax, edx
        cmc
        jnc     3f
        movzx   edx, byte ptr [popped_at + rcx]
        add     edx, r9d
        cmp     eax, edx
3:      ret

# The exceptions. The stack: rip, cs, rflags, rsp, ss.
divide_error:
        push    0
        jmp     raise
invalid_opcode:
        push    6
raise:  mov     rax, [rsp + 8]
        mov     [context + AT_RIP], rax
        mov     rax, [rsp + 32]
        mov     [context + AT_RSP], rax
        call    keep_registers
1:      call    step_out
        test    esi, esi
        jz      lost
        mov     eax, [context + AT_RIP]
        call    find_entry
        test    esi, esi
        jz      lost
        mov     eax, [rsi + PAD]
        test    eax, eax
        jz      1b
        mov     [rsp + 8], rax
        mov     rax, [context + AT_RSP]
        mov     [rsp + 32], rax
        mov     rbp, [context + AT_RBP]
        mov     rbx, [context + AT_SAVED]
        mov     r12, [context + AT_SAVED + 8]
        mov     r13, [context + AT_SAVED + 16]
        pop     rax                     # the vector
landing:
        iretq

lost:   say     "nothing, lost in an unwind "
        mov     r15d, 0xdead
        jmp     finish

# The managed functions.

# prologue, epilogue, cold_in, cold_out: the parts of function `name` that are rewritten, in their first version.
        .macro  prologue name
        .balign 16, 0xcc
\name:  call    profile
        push    rbp
        mov     rbp, rsp
\name\()_in:
        push    rbx
        push    r12
        push    r13
        .endm
        .macro  epilogue name
\name\()_out:
        pop     r13
        pop     r12
        pop     rbx
        pop     rbp
        ret
        .endm
        .macro  cold_in name
\name\()_cold_in:
        .byte   0x90, 0x66, 0x90, 0x66, 0x90
\name\()_cold_body:
        inc     dword ptr [rip + profile_\name + COLD]
        call    rare
        .endm
        .macro  cold_out name
\name\()_cold_out:
        .byte   0x66, 0x90, 0x66, 0x90, 0x90
        .endm

        .balign 4096, 0xcc              # the view of them is of this page

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

# entry name: an entry of the unwind table.
        .macro  entry name, pad, cold_in, cold_out
unwind_\name:
        .long   \name, \name\()_end
saves_\name:
        .long   ALL, 1, \pad
        .byte   \name\()_in - \name, \name\()_out - \name, \cold_in, \cold_out
        .long   0, 0
        .endm
        .balign 32, 0xcc
unwind_table:
        entry   digest, 0, digest_cold_in-digest, digest_cold_out-digest
        entry   scale, 0, scale_cold_in-scale, scale_cold_out-scale
        entry   driver, driver_pad, 0xff, 0xff
unwind_table_end:
        .balign 4096, 0xcc

        .data
        .balign 16
idt:    .word   divide_error - 0x10000, 0x08, 0x8e00, 0x0001    # vector 0: interrupt gate, offset 0x1xxxx
        .long   0, 0
        .fill   5 * 16, 1, 0
        .word   invalid_opcode - 0x10000, 0x08, 0x8e00, 0x0001  # vector 6
        .long   0, 0

        .macro  profile_data name, hot, cold
        .balign 8
profile_\name:
        .quad   unwind_\name
        .long   0, 0, ALL
        .long   0, \hot, 0, \cold
        .long   0
        .endm
        profile_data digest, RBX_BIT, R12_BIT|R13_BIT
        profile_data scale, 0, RBX_BIT|R12_BIT|R13_BIT

# What the four places hold, by how many registers the prologue saves.
        .macro  place first:vararg
        .byte   \first, 0, 0, 0
        .endm
        .balign 8
pushes_of:
        place   0x90, 0x66, 0x90, 0x66, 0x90
        place   0x53, 0x66, 0x90, 0x66, 0x90
        place   0x53, 0x41, 0x54, 0x66, 0x90
        place   0x53, 0x41, 0x54, 0x41, 0x55
pops_of:
        place   0x66, 0x90, 0x66, 0x90, 0x90
        place   0x66, 0x90, 0x66, 0x90, 0x5b
        place   0x66, 0x90, 0x41, 0x5c, 0x5b
        place   0x41, 0x5d, 0x41, 0x5c, 0x5b
cold_pushes_of:
        place   0x53, 0x41, 0x54, 0x41, 0x55
        place   0x90, 0x41, 0x54, 0x41, 0x55
        place   0x90, 0x66, 0x90, 0x41, 0x55
        place   0x90, 0x66, 0x90, 0x66, 0x90
cold_pops_of:
        place   0x41, 0x5d, 0x41, 0x5c, 0x5b
        place   0x41, 0x5d, 0x41, 0x5c, 0x90
        place   0x41, 0x5d, 0x66, 0x90, 0x90
        place   0x66, 0x90, 0x66, 0x90, 0x90
pushed_at:                              # where in NAME_in each register is on the stack
        .byte   1, 3, 5
popped_at:                              # where in NAME_out it is no longer
        .byte   5, 4, 2

        .balign 4
saved:  .long   0                       # pushes that were not made
pushes: .long   0                       # pushes that would have been made without rewriting
postponed:
        .long   0
unwound:
        .long   0
damaged:                                # calls after which driver missed a register
        .long   0

operands:
        .long   1, 2, 3, 4, 5, 6, 7 | 8 << 12           # the eighth call is an inner one: postponed
        .long   9, 10 | 11 << 12 | 12 << 24, 13         # rewritten: version 2
        .long   0, 14 | 0 << 12 | 15 << 24, 16          # #DE, through two functions and through four
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

        .bss
        .balign 16
context:
        .skip   6 * 8
