# A compiler under W^X, in ring 0 with page tables of its own: the page that its code is in is either writable or
# executable, never both, and nothing runs that the monitor has not approved.
#
# A program of a few operations is compiled, run, and its first number patched three times. Each time the page is
# flipped to read-and-write, written, shown to the monitor by a VMCALL with its address in RAX, flipped to
# read-and-execute, and called. If the monitor does not approve, the call faults, and the program is interpreted
# instead: the result is the same.
#
# Then four attempts that must fail, each by a page fault that the handler survives: a store to a page that is both,
# a fetch from it, a store through a writable alias of the code that runs, and a fetch of code that nobody approved.
        .include "guest.inc"
        .global _start, emit, ask, patcher, both_store, alias_store, page_fault, jit_page, both_page, fresh_page
        .ifndef WRONG
        .set    WRONG, 0                # 1: the page is writable and executable all the time, and nobody is asked
        .endif

        .equ    PRESENT, 1
        .equ    WRITABLE, 2
        .equ    NO_EXECUTE, 0x8000000000000000
        .equ    ALIAS, 0x40000          # linear pages that are mapped for the attempts
        .equ    BOTH, 0x41000
        .equ    FRESH, 0x42000

        .equ    OP_ADD, 0x05               # the operations of a program are x86 opcodes: op eax, imm32
        .equ    OP_XOR, 0x35
        .equ    OP_MUL, 0x69

# map: let a linear page lead to a frame.
        .macro  map linear, frame, flags
        movabs  rax, offset \frame + \flags
        mov     qword ptr [page_table + (\linear >> 12) * 8], rax
        invlpg  [\linear]
        .endm

# flip: give the page of the code other rights.
        .macro  flip flags
        .if     !WRONG
        movabs  rax, offset jit_page + \flags
        mov     qword ptr [jit_entry], rax
        invlpg  [jit_page]
        .endif
        .endm

# approve: ask the monitor to let the page be executed.
        .macro  approve
        .if     !WRONG
        call    ask
        .endif
        .endm

# attempt: do what must fault, and take the fault's error code and address into the result.
        .macro  attempt instructions:vararg
        lea     r13, [rip + 8f]
        mov     rbp, rsp
        \instructions
        jmp     stray                   # nothing has refused it
8:      inc     r14d
        mov     eax, dword ptr [fault_code]
        mix
        mov     eax, dword ptr [fault_address]
        mix
        .endm

_start: lgdt    [gdt_register]
        lidt    [idt_register]
        lea     r13, [rip + stray]
        xor     r15d, r15d
        xor     r14d, r14d              # attempts that were refused
        xor     r12d, r12d              # runs of compiled code
        xor     ebx, ebx                # runs of the interpreter
        say     "w-xor-x "
        .if     WRONG
        movabs  rax, offset jit_page + PRESENT + WRITABLE
        mov     qword ptr [jit_entry], rax
        invlpg  [jit_page]
        .endif

        call    compile
        approve
        flip    PRESENT
        call    evaluate
        mov     ecx, 3
next_patch:
        imul    edx, ecx, 0x01020304
        call    patch
        call    evaluate
        dec     ecx
        jnz     next_patch

        map     BOTH, both_page, PRESENT + WRITABLE
        attempt both_store: mov dword ptr [BOTH], 0xc3
        mov     edx, BOTH
        attempt call rdx
        map     ALIAS, jit_page, PRESENT + WRITABLE + NO_EXECUTE
        mov     edx, ALIAS + 3
        attempt alias_store: mov dword ptr [rdx], 0
        call    evaluate                # what runs is as it was
        map     FRESH, fresh_page, PRESENT + WRITABLE + NO_EXECUTE
        mov     byte ptr [FRESH], 0xc3  # ret: writing is allowed
        map     FRESH, fresh_page, PRESENT
        mov     edx, FRESH
        attempt call rdx

        say     "compiled "
        mov     eax, r12d
        call    put_decimal
        say     "interpreted "
        mov     eax, ebx
        call    put_decimal
        say     "refused "
        mov     eax, r14d
        call    put_decimal
        jmp     finish

# compile: translate the program to machine code.
compile:
        mov     esi, offset program
        mov     edi, offset jit_page
emit:   mov     word ptr [rdi], 0xf889  # mov eax, edi
        add     rdi, 2
1:      lodsb
        test    al, al
        jz      3f
        stosb
        cmp     al, OP_MUL
        jne     2f
        mov     byte ptr [rdi], 0xc0    # of eax
        inc     rdi
2:      movsd
        jmp     1b
3:      mov     byte ptr [rdi], 0xc3    # ret
        ret

# patch: the first number of the program becomes edx, in the program and in its code.
patch:  mov     dword ptr [program + 1], edx
        flip    PRESENT + WRITABLE + NO_EXECUTE
patcher:
        mov     dword ptr [jit_page + 3], edx
        approve
        flip    PRESENT
        ret

ask:    mov     eax, offset jit_page
        vmcall
        ret

# evaluate: run the program on 7, compiled if that is allowed, and take what it gives into the result.
evaluate:
        mov     edi, 7
        lea     r13, [rip + interpret]
        mov     rbp, rsp
        call    jit_page
        inc     r12d
        jmp     4f
interpret:
        inc     ebx
        mov     edx, edi
        mov     esi, offset program
1:      lodsb
        test    al, al
        jz      3f
        mov     r8d, eax
        lodsd
        cmp     r8b, OP_ADD
        jne     2f
        add     edx, eax
        jmp     1b
2:      cmp     r8b, OP_XOR
        jne     2f
        xor     edx, eax
        jmp     1b
2:      imul    edx, eax
        jmp     1b
3:      mov     eax, edx
4:      mix
        lea     r13, [rip + stray]
        ret

# A fault goes on at r13 with the stack at rbp.
page_fault:
        push    rax
        mov     rax, cr2
        mov     qword ptr [fault_address], rax
        mov     eax, dword ptr [rsp + 8]
        mov     dword ptr [fault_code], eax
        pop     rax
        add     rsp, 8                  # the error code
        mov     qword ptr [rsp], r13
        mov     qword ptr [rsp + 24], rbp
        iretq
stray:  lea     rsp, [stack_top]
        say     "a fault, or none, that this guest did not want "
        mov     r15d, 0xdead
        jmp     finish

        .data
        .balign 16
gdt:    .quad   0
        .quad   0x00af9b000000ffff      # 0x08 ring-0 code, 64-bit
        .quad   0x00cf93000000ffff      # 0x10 ring-0 data
gdt_end:
idt:    .org    idt + 16 * 14
        .word   page_fault - 0x10000, 0x08, 0x8e00, 0x0001
        .long   0, 0
idt_end:
gdt_register:
        .word   gdt_end - gdt - 1
        .quad   gdt
idt_register:
        .word   idt_end - idt - 1
        .quad   idt
program:
        .byte   OP_ADD
        .long   0x11111111
        .byte   OP_MUL
        .long   0x01000193
        .byte   OP_XOR
        .long   0x5eed5eed
        .byte   0
        .balign 8
fault_address:
        .quad   0
fault_code:
        .quad   0

# The page tables: the code is read-and-execute, everything else read-and-write and not executable.
        .balign 4096
        .global pml4
pml4:   .quad   pdpt + PRESENT + WRITABLE
        .balign 4096
pdpt:   .quad   page_directory + PRESENT + WRITABLE
        .balign 4096
page_directory:
        .quad   page_table + PRESENT + WRITABLE
        .balign 4096
page_table:
        .fill   0x10, 8, 0
        .quad   0x10000 + PRESENT       # the code is one page
        .set    page, 0x11000
        .rept   0xf
        .quad   page + PRESENT + WRITABLE + NO_EXECUTE
        .set    page, page + 0x1000
        .endr
        .org    page_table + 4096
        .equ    jit_entry, page_table + 8 * 0x17 # that of jit_page

        .bss
        .balign 4096
        .skip   4096
stack_top:
        .balign 4096
jit_page:
        .skip   4096
both_page:
        .skip   4096
fresh_page:
        .skip   4096
