# LOCK and read-modify-write: each instruction reads code bytes, changes them and reports what it saw,
# exactly once.
#
# The sixteen bytes at `target` are a function of two constants. After each instruction the function runs;
# what it returned, the old value that the instruction gave back and its flag all count. An instruction that
# is started over after half of it was done (added twice, compared with its own result) gives another value.

        .include "guest.inc"
        .global _start, target, constant_1, constant_2, check

# seen: count what is in `register`, then run the function and count what it returns.
        .macro  seen register
        mov     eax, \register
        mix
        call    check
        .endm

# flag: edx = 1 if the condition holds, else 0.
        .macro  flag condition
        set\condition dl
        movzx   edx, dl
        .endm

_start: xor     r15d, r15d
        xor     r14d, r14d              # how many checks
        mov     edi, offset target
        say     "lock-rmw checked "     # changes rsi
        mov     esi, offset constant_1
        mov     ebp, offset constant_2
        mov     r13d, 3                 # rounds: each starts from what the one before left
round:
        lock inc byte ptr [rsi]
        flag    z
        seen    edx
        lock dec word ptr [rsi + 1]
        flag    z
        seen    edx
        mov     edx, 0x01000001
        lock xadd dword ptr [rsi], edx
        seen    edx
        mov     edx, 0x00ff00ff
        xchg    dword ptr [rbp], edx    # locked without the prefix
        seen    edx
        lock add dword ptr [rsi], 0x7fffffff
        flag    o
        seen    edx
        lock sub dword ptr [rbp], 0x12345
        flag    c
        seen    edx
        lock not dword ptr [rsi]
        lock neg dword ptr [rbp]
        flag    c
        seen    edx
        lock xor byte ptr [rsi + 3], 0x5a
        lock or dword ptr [rbp], 0x10101010
        lock and dword ptr [rbp], 0x7fefefef
        flag    p
        seen    edx
        adc     dword ptr [rsi], 3
        rol     dword ptr [rbp], 5
        flag    c
        seen    edx

        lock bts dword ptr [rsi], 9
        flag    c
        seen    edx
        mov     edx, 64 + 17            # bit 17 of the dword eight bytes on: constant_2
        lock btc dword ptr [rsi], edx
        flag    c
        seen    edx
        lock btr dword ptr [rbp], 30
        flag    c
        seen    edx

        mov     eax, dword ptr [rsi]    # cmpxchg that succeeds ...
        mov     edx, 0x2468ace0
        lock cmpxchg dword ptr [rsi], edx
        flag    z
        seen    edx
        mov     eax, 0x11111111         # ... and one that fails: writes the old bytes back, returns them
        mov     edx, 0x22222222
        lock cmpxchg dword ptr [rsi], edx
        mov     edx, eax
        seen    edx

        mov     eax, dword ptr [rdi]    # cmpxchg8b over the opcode and its constant
        mov     edx, dword ptr [rdi + 4]
        mov     ebx, eax
        lea     ecx, [rdx + 0x01020304]
        lock cmpxchg8b qword ptr [rdi]
        flag    z
        seen    edx
        xor     eax, eax                # fails: edx:eax = what is there
        xor     edx, edx
        lock cmpxchg8b qword ptr [rdi]
        seen    edx

        mov     rax, qword ptr [rdi]    # cmpxchg16b over the whole function
        mov     rdx, qword ptr [rdi + 8]
        mov     rbx, rax
        mov     rcx, rdx
        btc     rcx, 63
        lock cmpxchg16b xmmword ptr [rdi]
        flag    z
        seen    edx

        dec     r13d
        jnz     round

        mov     eax, r14d
        call    put_decimal
        jmp     finish

check:  call    target
        inc     r14d
        mix
        ret

        .balign 4096, 0xcc
target: nop
        nop
        nop
        .byte   0xb8                    # mov eax, imm32
constant_1:
        .long   0x10203040
        nop
        nop
        nop
        .byte   0x35                    # xor eax, imm32
constant_2:
        .long   0x55667788
        ret
        .balign 64, 0xcc
