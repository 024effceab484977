# Copy on write: two processes with a JIT compiler each, whose compiled code lies in a page that fork shares.
#
# The program calls three functions. It interprets a function at first, compiles it when it has been called
# TIER_1 times, and compiles it once more, with neighbouring additions folded into one, after TIER_2 calls.
# It has compiled the first one when it forks. From then on parent and child share the frame of compiled
# code, until one of them compiles: that store faults, the kernel copies the frame, and the two have code of
# their own. Each compiles the same hot functions for itself.
#
# Compiled code says in edx which process compiled it, and for which tier, so the results tell whose version
# ran. The page is read-write or read-execute, never both: the compiler has it flipped before and after.
#
# With DUAL this is the guest dual-mapping, where the same program needs no flips and no copy: the code lies
# in one frame with two mappings, read-execute at `jit`, read-write at `view`.

        .include "guest.inc"
        .include "cow-fork/kernel.inc"
        .global program_pages, program, call_function, interpret, compile, assemble, copy_code, writer
        .global stack, heap, jit, view, jit_frame, jit_copy

# The pages of a process.
        .equ    stack, 0x400000
        .equ    heap, 0x401000
        .equ    jit, 0x402000
        .equ    view, 0x410000

# Names for scripts.
        .equ    jit_frame, frames + 0x2000      # the third frame that the kernel gives out
        .equ    jit_copy, frames + 0x5000       # the sixth: the copy of it, after those of stack and heap

.ifndef DUAL
        .equ    HANDED_ON, 0            # fork makes stores to heap and code wait for a copy
        .equ    JIT_ACCESS, USER_R
        .equ    COMPILER_VIEW, jit
.else
        .equ    HANDED_ON, SHARED       # fork leaves both as they are
.ifndef WRONG
        .equ    JIT_ACCESS, USER_R
        .equ    COMPILER_VIEW, view
.else
        .equ    JIT_ACCESS, USER_RW     # one mapping for both purposes
        .equ    COMPILER_VIEW, jit
.endif
.endif

        .equ    TIER_1, 3               # calls
        .equ    TIER_2, 6
        .equ    ROUNDS, 6
        .equ    JIT_SLOT, 64            # bytes of the code page for each function

# Of each function the heap says, from rbp on:
        .equ    ENTRY, 0                # where its compiled version is, or 0
        .equ    CALLS, 8
        .equ    FUNCTION_INFO, 16

# What functions consist of: operations with a number each.
        .equ    OP_DONE, 0
        .equ    OP_ADD, 1
        .equ    OP_XOR, 2
        .equ    OP_MUL, 3
        .equ    OPERATION, 5            # bytes of one

        .macro  operation what, number = 0
        .byte   \what
        .long   \number
        .endm

        .macro  sys number
        mov     eax, \number
        int     0x80
        .endm

# print "text": like `say`, from ring 3. Changes rax and rdi.
        .macro  print text
        .pushsection .data
.Lprint\@: .asciz "\text"
        .popsection
        mov     edi, offset .Lprint\@
        sys     WRITE
        .endm

        .macro  print_number value
        mov     edi, \value
        sys     WRITE_NUMBER
        .endm

# program_pages: what the first process has to begin with. Part of the kernel.
program_pages:
        call    allocate
        map     stack, USER_RW, NX
        call    allocate
        map     heap, USER_RW|HANDED_ON, NX
        call    allocate
        map     jit, JIT_ACCESS|HANDED_ON, 0
.if COMPILER_VIEW - jit
        map     view, USER_RW|HANDED_ON, NX
.endif
        ret

        .data
        .balign 4096
constants:                              # from here on .data is the program's, read-only
        .text
        .balign 4096, 0xcc

# ---------------------------------------------------------------------------------------------------------
# The program: r12d functions compiled, r13d number of this process, r14d round, r15d all results, mixed

program:
        xor     r12d, r12d
        mov     r13d, 1
        xor     r15d, r15d
        mov     ebp, heap
        mov     r14d, TIER_1
1:      xor     ecx, ecx
        call    call_function
        dec     r14d
        jnz     1b

        print   "1 forks\n"
        sys     FORK
        test    eax, eax
        jnz     1f
        mov     r13d, 2                 # the child: what is done by now is not its own doing
        xor     r12d, r12d
        xor     r15d, r15d
1:
        mov     r14d, ROUNDS
round:  xor     ecx, ecx
        call    call_function
        mov     ecx, 1
        call    call_function
        mov     ecx, 2
        call    call_function
        mov     ecx, 2                  # the hottest
        call    call_function
        sys     YIELD
        dec     r14d
        jnz     round

        xor     ebx, ebx                # whose versions are these?
1:      print_number r13d
        print   " runs function "
        print_number ebx
        mov     ecx, ebx
        call    call_function
        push    rdx
        print   ", compiled by "
        pop     rdx
        and     edx, 15
        print_number edx
        print   "\n"
        inc     ebx
        cmp     ebx, 3
        jb      1b

        mov     edi, r15d
        mov     esi, r12d
        sys     EXIT

# call_function: function ecx of r14d, in whatever version there is; eax = result, edx = who compiled it.
# Changes rcx, rsi, rdi and r8 to r11.
call_function:
        imul    r8d, ecx, FUNCTION_INFO
        add     r8, rbp
        inc     dword ptr [r8 + CALLS]
        mov     esi, 1
        cmp     dword ptr [r8 + CALLS], TIER_1
        je      1f
        mov     esi, 2
        cmp     dword ptr [r8 + CALLS], TIER_2
        jne     2f
1:      call    compile
2:      mov     eax, r14d
        cmp     qword ptr [r8 + ENTRY], 0
        je      3f
        call    [r8 + ENTRY]
        jmp     4f
3:      call    interpret
4:      mix
        imul    r15d, r15d, 31
        add     r15d, edx
        ret

# interpret: function ecx of eax, step by step; edx = 0: nobody has compiled it.
interpret:
        mov     rsi, [functions + rcx * 8]
1:      movzx   edi, byte ptr [rsi]
        mov     edx, [rsi + 1]
        add     rsi, OPERATION
        cmp     edi, OP_XOR
        ja      3f
        je      2f
        cmp     edi, OP_DONE
        je      4f
        add     eax, edx
        jmp     1b
2:      xor     eax, edx
        jmp     1b
3:      imul    eax, edx
        jmp     1b
4:      xor     edx, edx
        ret

# compile: function ecx, known at r8, for tier esi. The code is assembled on the stack and copied to its place
# in one go; a new version goes over the old one. Keeps rcx and r8.
compile:
        push    rcx
        inc     r12d
        print_number r13d
        print   " compiles function "
        print_number [rsp]
        print   " for tier "
        print_number esi
        print   "\n"
        mov     rcx, [rsp]
        imul    r10d, ecx, JIT_SLOT
        add     r10d, jit               # where it will run
        mov     r9, [functions + rcx * 8]
        sub     rsp, JIT_SLOT
        mov     rdi, rsp
        call    assemble
        mov     rcx, rdi
        sub     rcx, rsp
        shr     ecx, 3
        mov     rsi, rsp
        call    copy_code
        mov     [r8 + ENTRY], r10
        add     rsp, JIT_SLOT
        pop     rcx
        ret

# assemble: the function at r9 for tier esi, to rdi, in whole quadwords. Changes rax, rcx, rdx, rdi and r9.
assemble:
        mov     al, 0xba                # mov edx, 16 * tier + process
        stosb
        mov     eax, esi
        shl     eax, 4
        or      eax, r13d
        stosd
1:      movzx   ecx, byte ptr [r9]
        mov     edx, [r9 + 1]
        add     r9, OPERATION
        cmp     ecx, OP_DONE
        je      5f
        cmp     ecx, OP_ADD
        jne     3f
2:      cmp     esi, 2                  # tier 2 folds additions
        jne     3f
        cmp     byte ptr [r9], OP_ADD
        jne     3f
        add     edx, [r9 + 1]
        add     r9, OPERATION
        jmp     2b
3:      mov     eax, [opcodes + rcx * 4]
        stosb
        cmp     ecx, OP_MUL
        jne     4f
        mov     al, ah                  # imul has a ModRM byte
        stosb
4:      mov     eax, edx
        stosd
        jmp     1b
5:      mov     al, 0xc3                # ret
        stosb
        mov     al, 0xcc
6:      test    edi, 7
        jz      7f
        stosb
        jmp     6b
7:      ret

# copy_code: ecx quadwords from rsi to where r10 runs. Changes rax, rcx, rsi and rdi.
copy_code:
.ifndef DUAL
        push    rsi
        mov     edi, jit
        mov     esi, 1
        sys     PROTECT                 # read-write
        pop     rsi
.endif
        lea     rdi, [r10 + COMPILER_VIEW - jit]
writer: rep movsq                       # the first one after fork faults, if the page waits for its copy
.ifndef DUAL
        mov     edi, jit
        xor     esi, esi
        sys     PROTECT                 # read-execute
.endif
        ret

        .balign 4096, 0xcc
program_end:

        .data
opcodes:                                # of `OP eax, imm32`
        .long   0, 0x05, 0x35, 0xc069
functions:
        .quad   function_0, function_1, function_2
function_0:
        operation OP_ADD, 5
        operation OP_ADD, 7
        operation OP_MUL, 31
        operation OP_XOR, 0x5bd1e995
        operation OP_DONE
function_1:
        operation OP_MUL, 0x01000193
        operation OP_ADD, 1
        operation OP_ADD, 2
        operation OP_ADD, 3
        operation OP_DONE
function_2:
        operation OP_XOR, 0x1234567
        operation OP_ADD, 100
        operation OP_ADD, 1
        operation OP_MUL, 17
        operation OP_DONE
        .balign 4096
constants_end:
        .text
