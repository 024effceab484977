# Mode-based execute control: the EPT tells fetches from user-mode addresses from those from supervisor-mode
# ones.
#
# Which of the two a linear address is, the guest's page tables say, not the ring. The guest maps two frames
# twice each: for everybody where they lie, and for the supervisor only in the second MiB. The EPT lets
# user_function be fetched by user-mode addresses only, kernel_function by supervisor-mode ones only. Each is
# called by both of its addresses; ring 0 calls user_function by the user-mode one, too, which is allowed. The
# VMM hears of what is not, and lets it through.

        .include "guest.inc"
        .include "ring0.inc"
        .global _start, user_function, kernel_function, system_call, page_fault

        .equ    SUPERVISOR_USER_FUNCTION, PAGES
        .equ    SUPERVISOR_KERNEL_FUNCTION, PAGES + 0x1000
        .equ    ENTRIES, page_table + (PAGES >> 12) * 8

_start: mov     dword ptr [ENTRIES], offset user_function + PRESENT | WRITABLE
        mov     dword ptr [ENTRIES + 8], offset kernel_function + PRESENT | WRITABLE
        call    start_user              # and from here on in ring 3

        xor     r15d, r15d
        xor     r14d, r14d
        say     "mbec called "

        mov     eax, offset user_function
        call    rax
        mix
        mov     ebp, offset user_function
        int     0x80                            # ring 0, a user-mode address: allowed
        mov     ebp, SUPERVISOR_KERNEL_FUNCTION
        int     0x80                            # allowed

        mov     ebp, SUPERVISOR_USER_FUNCTION
        int     0x80                            # an EPT violation
        int     0x80                            # none any more: the VMM has let it through

        mov     eax, offset kernel_function
        call    rax                             # an EPT violation
        mix
        mov     eax, offset kernel_function
        call    rax
        mix

        mov     eax, r14d
        call    put_decimal
        jmp     finish

system_call:                            # ring 0 calls what rbp names
        call    rbp
        mix
        iretq

page_fault:
        mov     r15d, 0xdead            # this guest knows none
        jmp     finish

        .balign 4096, 0xcc
user_function:
        inc     r14d
        mov     eax, 0x05e3
        ret
        .balign 4096, 0xcc
kernel_function:
        inc     r14d
        mov     eax, 0x4e41
        ret
        .balign 4096, 0xcc
