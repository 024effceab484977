# Implicit stores: code written by instructions that do not look like stores.
#
# PUSH and CALL write below RSP, ENTER makes a stack frame, FXSAVE dumps the SSE registers, FSTP and FISTP
# round-trip a number, MASKMOVDQU writes through RDI. Here RSP, RDI or the operand point into a code frame,
# and what lands there is executed: either a whole function, or the 64-bit constant of `mov rax, imm64;
# ret`.

        .include "guest.inc"
        .global _start, fxsave_store, movups_store, maskmov_store, push_store, push_memory_store, pop_store
        .global call_store, enter_store, enter_nested_store, fstp_store, fstp_tbyte_store, fistp_store
        .global fnstcw_store, stmxcsr_store, setcc_store, stos_store
        .global slot, constant, constant_imm, area, area_function

# run: call `where` and count what it returns, both halves.
        .macro  run where
        xor     eax, eax
        call    \where
        mix
        shr     rax, 32
        mix
        inc     r13d
        .endm

_start: xor     r15d, r15d
        xor     r13d, r13d              # how many ran
        mov     r14, rsp
        say     "implicit-stores ran "

        movups  xmm1, xmmword ptr [rip + function_16]
fxsave_store:
        fxsave  [rip + area]            # 512 bytes; xmm1 lands at area_function
        run     area_function

movups_store:
        movups  xmmword ptr [rip + slot], xmm1
        run     slot

        movups  xmm2, xmmword ptr [rip + mask_16]
        movups  xmm3, xmmword ptr [rip + other_16]
        mov     edi, offset slot
maskmov_store:
        maskmovdqu xmm3, xmm2           # only the bytes of the immediate
        run     slot

        mov     rax, 0x9090c300000111b8 # mov eax, 0x111; ret
        mov     esp, offset slot + 8
push_store:
        push    rax
        mov     rsp, r14
        run     slot

        mov     esp, offset slot + 8
push_memory_store:
        push    qword ptr [rip + function_8]
        mov     rsp, r14
        run     slot

        mov     rax, 0x9090c300000444b8
        push    rax
pop_store:
        pop     qword ptr [rip + slot]
        run     slot

        mov     esp, offset constant_imm + 8
call_store:
        call    1f                      # pushes the address of the next instruction
1:      mov     rsp, r14
        run     constant

        mov     rbp, 0x0123456789abcdef
        mov     esp, offset constant_imm + 8
enter_store:
        enter   16, 0                   # pushes rbp
        mov     rsp, r14
        run     constant

        mov     rbp, 0x77665544332211c3 # its lowest byte is a `ret`, and that is where it goes
        mov     esp, offset constant_imm + 16
enter_nested_store:
        enter   0, 1                    # pushes rbp and the new frame pointer: two stores
        mov     rsp, r14
        run     constant                # the frame pointer is its constant now

        fld     qword ptr [rip + double]
fstp_store:
        fstp    qword ptr [rip + constant_imm]
        run     constant

        fld     tbyte ptr [rip + function_10]
fstp_tbyte_store:
        fstp    tbyte ptr [rip + slot]  # ten bytes
        run     slot

        fild    qword ptr [rip + function_8]
fistp_store:
        fistp   qword ptr [rip + slot]
        run     slot

fnstcw_store:
        fnstcw  word ptr [rip + constant_imm]
        run     constant
stmxcsr_store:
        stmxcsr dword ptr [rip + constant_imm + 4]
        run     constant

        cmp     esp, esp
setcc_store:
        sete    byte ptr [rip + constant_imm]
        run     constant

        mov     edi, offset constant_imm
        mov     rax, 0x5566778811223344
stos_store:
        stosq
        run     constant

        mov     eax, r13d
        call    put_decimal
        jmp     finish

        .balign 4096, 0xcc
slot:   ret
        .balign 64, 0xcc
constant:
        .byte   0x48, 0xb8              # mov rax, imm64
constant_imm:
        .quad   0
        ret
        .balign 64, 0xcc
area:   .fill   160 + 16, 1, 0xcc       # xmm0 is 160 bytes into an FXSAVE area, xmm1 behind it
area_function:
        .fill   512 - 160 - 16, 1, 0xcc
        .balign 64, 0xcc

        .data
        .balign 16
function_16:
        .byte   0xb8, 0x55, 0x05, 0, 0  # mov eax, 0x555
        .byte   0x69, 0xc0              # imul eax, eax, 3001
        .long   3001
        .byte   0xc3                    # ret
        .fill   4, 1, 0x90
mask_16:
        .byte   0, 0x80, 0x80           # the sign bit of each byte says whether it is written
        .fill   13, 1, 0
other_16:
        .fill   16, 1, 0x66
function_8:
        .quad   0x1090c300000333b8      # mov eax, 0x333; ret: a positive number, for FILD
function_10:
        .byte   0xb8, 0x22, 0x03, 0, 0, 0xc3, 0x90, 0x90, 0x90, 0x40    # a normal 80-bit number
double: .double 3.14159
