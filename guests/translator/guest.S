# A translator inside of the guest: bytecode that modifies itself, translated to x86 block by block.
#
# The frame of the bytecode has two linear addresses, `bytecode` and ALIAS higher up, and so has the frame of
# the translations: `cache`, where they run, and VIEW higher up, where they are written. The bytecode stores
# into itself by either address, the program around it patches it by either, and it runs at both. So this
# guest has the problem of the VMM below it, one level up: which translations are stale? Its answer is the
# same: translations are found, and dropped, by the physical address of what they were made from, whatever
# address a store or a jump came by.
#
# An interpreter runs the same bytecode first. Result and final bytecode must be equal.
#
# An instruction is two double words, operation and operand. It works on an accumulator (eax), a counter
# (ecx) and the address of the next instruction (edx):
#
#   ADD n, XOR n, MUL n   on the accumulator
#   SET n                 the counter
#   STORE address         the accumulator, to bytecode
#   LOOP distance         count down; go there, as seen from this instruction, unless zero
#   YIELD                 let the program around it patch the bytecode
#   HALT
#
# A block ends with any of the last four: behind a STORE the rest of the block may be another.

        .include "guest.inc"
        .global _start, pass, interpret, run, find, translate, writer, store, patch, invalidate, drop
        .global physical_of, cache, bytecode, program, made, dropped, executed

        .equ    VIEW, 0x40000000        # see guest.toml
        .equ    ALIAS, 0x50000000
        .equ    INSTRUCTION, 8
        .equ    OPERAND, 4

        .equ    OP_ADD, 0
        .equ    OP_XOR, 1
        .equ    OP_MUL, 2
        .equ    OP_SET, 3
        .equ    OP_STORE, 4
        .equ    OP_LOOP, 5
        .equ    OP_YIELD, 6
        .equ    OP_HALT, 7

# Why a translation or the interpreter came back, in ebx.
        .equ    GO_ON, 0
        .equ    YIELDED, 1
        .equ    HALTED, 2

        .equ    SLOTS, 16
        .equ    SLOT_SIZE, 128          # 8 instructions of at most 6 bytes, and an exit of at most 28
        .equ    BLOCK_LIMIT, 8

_start: xor     r15d, r15d
        say     "translator interpreted "
        mov     r14d, offset interpret  # what runs a block
        call    both_passes
        call    tell_result
        mov     ebp, eax                # the oracle's
        mov     r13d, edx
        say     "translated "
        mov     r14d, offset run
        call    both_passes
        call    tell_result

        cmp     eax, ebp
        jne     different
        cmp     edx, r13d
        jne     different
        say     "made "
        mov     eax, [made]
        call    put_decimal
        mix
        say     "dropped "
        mov     eax, [dropped]
        call    put_decimal
        mix
        say     "executed "
        mov     eax, [executed]
        call    put_decimal
        mix
        jmp     finish
different:
        say     "different "
        jmp     finish

# tell_result: print and mix the accumulator; edx = a checksum of the bytecode.
tell_result:
        call    put_decimal
        mix
        push    rax
        xor     eax, eax
        xor     edx, edx
1:      imul    edx, edx, 31
        add     edx, [bytecode + rax * 4]
        inc     eax
        cmp     eax, (program_end - program) / 4
        jb      1b
        pop     rax
        ret

# both_passes: load the program and run it, at one address of its frame and then, as it has left itself, at the other.
both_passes:                            # (no bytecode has been translated when it is loaded)
        mov     esi, offset program
        mov     edi, offset bytecode
        mov     ecx, (program_end - program) / 8
        rep movsq
        mov     eax, 1
        mov     edx, offset bytecode
        call    pass
        mov     edx, offset bytecode + ALIAS
pass:   call    r14
        cmp     ebx, YIELDED
        jb      pass
        ja      1f
        call    patch
        jmp     pass
1:      ret

# patch: the program's own change of the bytecode: an operand, by the one address and by the other in turn.
patch:  mov     esi, offset patched_operand
        test    ecx, 1
        jz      1f
        add     esi, ALIAS
1:      push    rax
        lea     eax, [rcx * 8 + rcx]
        call    store
        pop     rax
        ret

# store: eax to bytecode at the linear address rsi. Running bytecode changes in no other way. Changes rbx, rsi, rdi.
store:  mov     [rsi], eax
        call    invalidate
        xor     ebx, ebx                # GO_ON
        ret

# ---------------------------------------------------------------------------------------------------------
# The interpreter: one instruction

interpret:
        mov     edi, [rdx]
        mov     esi, [rdx + OPERAND]
        add     edx, INSTRUCTION
        xor     ebx, ebx                # GO_ON
        jmp     [operations + rdi * 8]

do_add: add     eax, esi
        ret
do_xor: xor     eax, esi
        ret
do_mul: imul    eax, esi
        ret
do_set: mov     ecx, esi
        ret
do_loop:
        dec     ecx
        jz      1f
        lea     edx, [rdx + rsi - INSTRUCTION]
1:      ret
do_yield:
        mov     ebx, YIELDED
        ret
do_halt:
        mov     ebx, HALTED
        ret

# ---------------------------------------------------------------------------------------------------------
# The translator. A translation changes eax and ecx as the bytecode says, and moves edx by a distance: it holds no
# address of its own bytecode, so that one serves both.

# run: the translation of the block at edx.
run:    call    find
        inc     dword ptr [executed]
        jmp     rdi

# find: rdi = where the translation of the block at edx runs; it is made if there is none.
find:   mov     esi, edx
        call    physical_of
        mov     ebx, edi
        shr     ebx, 3
        and     ebx, SLOTS - 1          # the block's slot
        cmp     [slots + rbx * 8], edi
        je      1f
        call    translate
1:      mov     edi, ebx
        shl     edi, 7
        add     edi, offset cache
        ret

# translate: the block at edx, physical edi, into slot ebx. Changes rsi, rdi and r8 to r11.
translate:
        push    rax
        push    rcx
        push    rbx
        inc     dword ptr [made]
        cmp     dword ptr [slots + rbx * 8], 0
        je      1f
        inc     dword ptr [dropped]     # another block's translation gives way
1:      mov     [slots + rbx * 8], edi
        mov     r8d, edx                # the instruction
        mov     edi, offset buffer
        mov     r11d, BLOCK_LIMIT
next_instruction:
        mov     ebx, [r8]
        mov     r9d, [r8 + OPERAND]
        add     r8d, INSTRUCTION
        mov     r10d, r8d
        sub     r10d, edx               # the distance of the next one
        jmp     [emitters + rbx * 8]

emit_mul:
        mov     ax, 0xc069              # imul eax, eax, operand
        stosw
        jmp     emit_operand
emit_add:
        mov     al, 0x05                # add eax, operand
        jmp     emit_short
emit_xor:
        mov     al, 0x35                # xor eax, operand
        jmp     emit_short
emit_set:
        mov     al, 0xb9                # mov ecx, operand
emit_short:
        stosb
emit_operand:
        mov     eax, r9d
        stosd
        dec     r11d
        jnz     next_instruction
        mov     ebx, GO_ON
        jmp     last_exit

emit_store:
        mov     ax, 0xc281              # add edx, distance
        stosw
        mov     eax, r10d
        stosd
        mov     al, 0xbe                # mov esi, operand
        stosb
        mov     eax, r9d
        stosd
        mov     al, 0xbf                # mov edi, store
        stosb
        mov     eax, offset store
        stosd
        mov     ax, 0xe7ff              # jmp rdi: back from there to who called the translation
        stosw
        jmp     finished
emit_loop:
        mov     eax, 0x0c74c9ff         # dec ecx; jz over the exit that follows
        stosd
        push    r10
        lea     r10d, [r10d + r9d - INSTRUCTION]
        mov     ebx, GO_ON
        call    emit_exit
        pop     r10
        jmp     last_exit
emit_yield:
        mov     ebx, YIELDED
        jmp     last_exit
emit_halt:
        mov     ebx, HALTED
last_exit:
        call    emit_exit

finished:                               # into the cache: by its writable address, in quadwords
        mov     al, 0xcc
1:      test    edi, 7
        jz      2f
        stosb
        jmp     1b
2:      pop     rbx
        mov     [slots + rbx * 8 + 4], r10d     # the length of the bytecode
        mov     ecx, edi
        sub     ecx, offset buffer
        shr     ecx, 3
        mov     esi, offset buffer
        mov     edi, ebx
        shl     edi, 7
        add     edi, offset cache + VIEW
writer: rep movsq
        pop     rcx
        pop     rax
        ret

# emit_exit: go to the distance r10d and come back with ebx; 12 bytes.
emit_exit:
        mov     ax, 0xc281              # add edx, distance
        stosw
        mov     eax, r10d
        stosd
        mov     al, 0xbb                # mov ebx, reason
        stosb
        mov     eax, ebx
        stosd
        mov     al, 0xc3                # ret
        stosb
        ret

# invalidate: drop the translations of the four bytes at the linear address rsi. Changes rbx, rsi, rdi.
invalidate:
        call    physical_of
        mov     ebx, SLOTS - 1
1:      mov     esi, [slots + rbx * 8]
        test    esi, esi
        jz      3f
        add     esi, [slots + rbx * 8 + 4]
        cmp     edi, esi                # behind it?
        jae     3f
        lea     esi, [rdi + 4]
        cmp     esi, [slots + rbx * 8]  # in front of it?
        jbe     3f
drop:   mov     dword ptr [slots + rbx * 8], 0
        inc     dword ptr [dropped]
3:      dec     ebx
        jns     1b
        ret

# physical_of: edi = what translations are known by, of the linear address esi. Changes rbx.
physical_of:
        mov     edi, esi
.ifndef WRONG
        and     edi, -0x1000
        mov     ebx, offset mappings
1:      cmp     [rbx], edi
        je      2f
        add     ebx, 8
        cmp     ebx, offset mappings_end
        jb      1b
        mov     r15d, 0xdead            # no page of bytecode
        jmp     finish
2:      mov     edi, esi
        and     edi, 0xfff
        add     edi, [rbx + 4]
.endif
        ret

        .balign 4096, 0xcc
cache:  .fill   4096, 1, 0xcc           # a frame of translations; it starts as code, of which none has run

        .data
        .balign 8
operations:
        .quad   do_add, do_xor, do_mul, do_set, store, do_loop, do_yield, do_halt
emitters:
        .quad   emit_add, emit_xor, emit_mul, emit_set, emit_store, emit_loop, emit_yield, emit_halt
mappings:                               # linear page, physical page: what guest.toml says of the bytecode
        .long   bytecode, bytecode
        .long   bytecode + ALIAS, bytecode
mappings_end:

        .macro  operation what, operand = 0
        .long   \what, \operand
        .endm

        .equ    ROUNDS, 4

program:
        operation OP_SET, ROUNDS
again:  operation OP_ADD, 0x9e3779b9
        operation OP_MUL, 0x01000193
mixed:  operation OP_XOR, 0             # the operand is stored below, for the next round, by the other address
        operation OP_STORE, mixed_operand+ALIAS
        operation OP_MUL, 33
patched:
        operation OP_ADD, 7             # the operand is patched from outside
        operation OP_STORE, ahead_operand
ahead:  operation OP_ADD, 0             # the operand has been stored just before it runs
        operation OP_YIELD
        operation OP_MUL, 5             # nobody changes this block: it is translated once
        operation OP_ADD, 3
back:   operation OP_LOOP, again-back
        operation OP_HALT
program_end:
        .equ    mixed_operand, bytecode + (mixed - program) + OPERAND
        .equ    patched_operand, bytecode + (patched - program) + OPERAND
        .equ    ahead_operand, bytecode + (ahead - program) + OPERAND

        .bss
        .balign 4096
bytecode:
        .skip   4096
slots:  .skip   SLOTS * 8               # for each: physical address (0: free) and length of the bytecode
made:   .skip   4
dropped:
        .skip   4
executed:
        .skip   4
        .balign 8
buffer: .skip   SLOT_SIZE
