# Call site: an indirect call through a table is patched into a direct call when it is first used.
#
# What dynamic linkers of JIT code and kernels (static calls, alternatives) do. Each site starts as the six
# bytes of `call [rip + table entry]`; all entries point to `resolve`, which finds the site from its return
# address, overwrites it with a NOP and `call rel32`, and goes on to the function. Three sites run twenty
# times each: `resolve` must run three times in all, and stale sites would run it sixty times.

        .include "guest.inc"
        .global _start, round, site_add, site_xor, site_shift, resolve, writer
        .global function_add, function_xor, function_shift

_start: xor     r15d, r15d
        xor     r14d, r14d              # how often `resolve` ran
        mov     ecx, 20
        mov     eax, 1
round:
site_add:
        call    qword ptr [rip + table]
site_xor:
        call    qword ptr [rip + table + 8]
site_shift:
        call    qword ptr [rip + table + 16]
        mix
        dec     ecx
        jnz     round

        say     "call-site resolved "
        mov     eax, r14d
        call    put_decimal
        imul    eax, eax, 0x01000193
        xor     r15d, eax
        jmp     finish

# resolve: patch the site that called, then run its function as if the site had called it.
resolve:
        inc     r14d
        mov     rdi, [rsp]
        sub     rdi, 6                  # the site
        movsxd  rsi, dword ptr [rdi + 2]
        lea     rsi, [rdi + rsi + 6]    # its table entry ...
        mov     rsi, [rsi + functions - table]  # ... and the function that belongs to it
        mov     rdx, rsi
        sub     rdx, rdi
        sub     rdx, 6                  # rel32 counts from the end of the call
writer: mov     dword ptr [rdi + 2], edx
        mov     word ptr [rdi], 0xe890  # a NOP in front: the call ends, and returns, where the old one did
        jmp     rsi                     # returns behind the site's six bytes

        .balign 64, 0xcc
function_add:
        add     eax, ecx
        ret
        .balign 16, 0xcc
function_xor:
        xor     eax, 0x5bd1e995
        ret
        .balign 16, 0xcc
function_shift:
        rol     eax, 7
        ret

        .data
        .balign 8
table:  .quad   resolve, resolve, resolve
functions:
        .quad   function_add, function_xor, function_shift
