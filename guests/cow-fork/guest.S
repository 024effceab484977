# Copy on write: two processes with a JIT compiler each, whose compiled code lies in a page that fork shares.
#
# The program interprets three functions, and compiles a function when it has been called HOT times, and once more,
# with folded additions, after HOTTER calls. It has compiled the first one when it forks. From then on parent and
# child share the page of compiled code, until one of them compiles: the write faults, the kernel copies the frame,
# and the two have separate code. Each compiles the same hot functions for itself.
#
# Compiled code says in edx which process made it and how hot it was, so the results tell whose version ran. The
# page is read-write or read-execute, never both: PROTECT flips it before and after.
#
# With DUAL this is the guest dual-mapping: see there.

        .include "guest.inc"
        .global program, call_function, interpret, compile, copy_code, writer
        .global stack, heap, jit, view, jit_frame, jit_copy

# What a process has, from PRIVATE on. Page `jit` runs; the compiler writes to COMPILER_VIEW.
        .equ    stack, 0x400000
        .equ    heap, 0x401000
        .equ    jit, 0x402000
        .equ    view, 0x410000
        .equ    jit_frame, frames + 0x2000      # the third frame that the kernel gives out
        .equ    jit_copy, frames + 0x5000       # the sixth: its copy, after those of stack and heap
        .equ    JIT_SLOT, 64            # bytes for each function

        .equ    HOT, 3
        .equ    HOTTER, 6
        .equ    ROUNDS, 6

.ifdef DUAL
        # One frame at two addresses, both handed on by fork as they are; so is the heap, where the compiler notes
        # what there is.
        .macro  PROGRAM_PAGES
        call    allocate
        map     stack, USER_RW, NX
        call    allocate
        map     heap, USER_RW|SHARED, NX
        call    allocate
.ifdef WRONG
        map     jit, USER_RW|SHARED, 0         # one mapping for both purposes
        .equ    COMPILER_VIEW, jit
.else
        map     jit, USER_R|SHARED, 0
        map     view, USER_RW|SHARED, NX
        .equ    COMPILER_VIEW, view
.endif
        .endm
.else
        .macro  PROGRAM_PAGES
        call    allocate
        map     stack, USER_RW, NX
        call    allocate
        map     heap, USER_RW, NX
        call    allocate
        map     jit, USER_R, 0
        .equ    COMPILER_VIEW, jit
        .endm
.endif

        .include "cow-fork/kernel.inc"

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

# What the functions consist of.
        .equ    OP_DONE, 0
        .equ    OP_ADD, 1
        .equ    OP_XOR, 2
        .equ    OP_MUL, 3

# On the heap, from rbp on, for each function:
        .equ    ENTRY, 0                # where its compiled version is, or 0
        .equ    CALLS, 8
        .equ    FUNCTION_SIZE, 16

        .data
        .balign 4096
constants:                              # all that follows in .data is the program's, and read-only
        .text
        .balign 4096, 0xcc
# r12d: functions compiled, r13d: this process, r14d: the round, r15d: all results, mixed
program:
        xor     r12d, r12d
        mov     r13d, 1
        xor     r15d, r15d
        mov     ebp, heap
        mov     r14d, HOT
1:      xor     ecx, ecx
        call    call_function
        dec     r14d
        jnz     1b

        print   "1 forks\n"
        sys     FORK
        test    eax, eax
        jnz     1f
        mov     r13d, 2                 # the child: nothing of all that is its own doing
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

        xor     ebx, ebx                # who made what runs here
1:      print_number r13d
        print   " runs function "
        print_number ebx
        mov     ecx, ebx
        call    call_function
        push    rdx
        print   " made by "
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

# call_function: call function ecx for r14d, compiled or not; eax = its result, edx = who made it.
call_function:
        mov     r8d, ecx
        shl     r8d, 4
        add     r8, rbp                 # what is known of it
        inc     dword ptr [r8 + CALLS]
        mov     esi, 1
        cmp     dword ptr [r8 + CALLS], HOT
        je      1f
        mov     esi, 2
        cmp     dword ptr [r8 + CALLS], HOTTER
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

# interpret: function ecx, step by step; edx = 0, nobody has made anything.
interpret:
        mov     rsi, [functions + rcx * 8]
1:      movzx   edi, byte ptr [rsi]
        mov     edx, [rsi + 1]
        add     rsi, 5
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

# compile: function ecx, known at r8, for the heat esi (1 or 2); the new version goes over the old one.
compile:
        push    rcx
        inc     r12d
        print_number r13d
        print   " compiles function "
        print_number [rsp]
        print   " for heat "
        print_number esi
        print   "\n"
        mov     rcx, [rsp]
        mov     r9, [functions + rcx * 8]
        sub     rsp, JIT_SLOT           # assembled on the stack, then copied as a whole
        mov     rdi, rsp
        mov     ecx, JIT_SLOT
        mov     al, 0xcc
        rep stosb
        mov     rdi, rsp

        mov     al, 0xba                # mov edx, heat and maker
        stosb
        mov     eax, esi
        shl     eax, 4
        or      eax, r13d
        stosd
1:      movzx   ecx, byte ptr [r9]
        mov     edx, [r9 + 1]
        add     r9, 5
        cmp     ecx, OP_DONE
        je      5f
        cmp     ecx, OP_ADD
        jne     3f
2:      cmp     esi, 2                  # hotter: neighbouring additions become one
        jne     3f
        cmp     byte ptr [r9], OP_ADD
        jne     3f
        add     edx, [r9 + 1]
        add     r9, 5
        jmp     2b
3:      mov     eax, [opcodes + rcx * 4]
        cmp     ecx, OP_MUL
        je      4f
        stosb                           # add eax, imm32; xor eax, imm32
        mov     eax, edx
        stosd
        jmp     1b
4:      stosw                           # imul eax, eax, imm32
        mov     eax, edx
        stosd
        jmp     1b
5:      mov     al, 0xc3                # ret
        stosb

        mov     rcx, rdi
        sub     rcx, rsp
        add     ecx, 7
        shr     ecx, 3                  # in quadwords
        mov     r10, [rsp + JIT_SLOT]
        shl     r10d, 6
        add     r10d, jit               # its place
        call    copy_code
        mov     [r8 + ENTRY], r10
        add     rsp, JIT_SLOT
        pop     rcx
        ret

# copy_code: put ecx quadwords from the caller's stack to where r10 runs.
copy_code:
.ifndef DUAL
        mov     edi, jit
        mov     esi, 1
        sys     PROTECT
.endif
        lea     rsi, [rsp + 8]
        lea     rdi, [r10 + COMPILER_VIEW - jit]
writer: rep movsq                       # COW: the first write after fork faults
.ifndef DUAL
        mov     edi, jit
        xor     esi, esi
        sys     PROTECT
.endif
        ret

        .balign 4096, 0xcc
program_end:

# The functions, as the interpreter reads them: an operation and a number each.

        .macro  operation what, number = 0
        .byte   \what
        .long   \number
        .endm

        .data
opcodes:
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
