# A contract: a ledger of four accounts whose code can never change, and that depends on its transactions alone.
#
# All code is sealed (`code = "seal"`). Each transaction is four bytes at the input port: the account that pays, the
# one that gets, and the amount, 16 bits. A transfer also costs a fee, which goes to account 0. Where the account that
# gets is 0xff the transaction is an amendment: it asks for another fee, an immediate in the code of `transfer`. The
# contract tries that at the address that runs, and through VIEW, a writable mapping of the same frame. Both stores
# are refused with #GP; the handler counts them and goes on behind the store. A transaction that an account cannot
# pay is turned down. In the end balances and counts go into a digest: nodes that were given the same have the same.
#
# The wrong version asks the clock as well: a transfer in an odd second costs twice the fee.

        .include "guest.inc"
        .global _start, next, transfer, fee, amend, amend_view, handler, done, idt

        .equ    INPUT, 0xe0             # the next byte; the port after it: how many are left
        .equ    CLOCK, 0xe4             # seconds since 1970
        .equ    VIEW, 0x40000000        # see guest.toml: VIEW + gpa is the writable view
        .equ    ACCOUNTS, 4
        .equ    SETTLED, 0x51

_start: xor     r15d, r15d
        xor     r14d, r14d              # stores that were refused; counted by the handler
        xor     r13d, r13d              # transactions that were turned down
        say     "contract "

next:   in      al, INPUT + 1
        test    al, al
        jz      settle
        in      al, INPUT
        movzx   ebx, al                 # pays
        in      al, INPUT
        movzx   ecx, al                 # gets
        in      al, INPUT
        movzx   ebp, al
        in      al, INPUT
        movzx   eax, al
        shl     eax, 8
        or      ebp, eax                # the amount
        cmp     ecx, 0xff
        je      amendment
        call    transfer
        jmp     next

transfer:
        cmp     ebx, ACCOUNTS
        jae     turn_down
        cmp     ecx, ACCOUNTS
        jae     turn_down
fee:    mov     edx, 3                  # the fee: an amendment would have it otherwise
.ifdef WRONG
        in      eax, CLOCK
        test    al, 1
        jz      1f
        add     edx, edx
1:
.endif
        lea     eax, [rbp + rdx]
        cmp     dword ptr [balances + rbx * 4], eax
        jb      turn_down
        sub     dword ptr [balances + rbx * 4], eax
        add     dword ptr [balances + rcx * 4], ebp
        add     dword ptr [balances], edx
        ret

turn_down:
        inc     r13d
        ret

amendment:
        lea     r12, [rip + 1f]
amend:  mov     dword ptr [rip + fee + 1], ebp
1:      lea     r12, [rip + 1f]
amend_view:
        mov     dword ptr [VIEW + fee + 1], ebp
1:      jmp     next

settle: xor     ebx, ebx
1:      mov     eax, dword ptr [balances + rbx * 4]
        call    put_decimal
        mix
        inc     ebx
        cmp     ebx, ACCOUNTS
        jb      1b
        say     "turned down "
        mov     eax, r13d
        call    put_decimal
        mix
        say     "refused "
        mov     eax, r14d
        call    put_decimal
        mix
        say     "digest "
        mov     eax, r15d
        call    put_decimal
        mov     al, '\n'
        out     CONSOLE, al
        mov     al, SETTLED
        out     END, al

handler:                                # #GP: its error code, rip, cs, rflags, rsp, ss
        inc     r14d
        mov     [rsp + 8], r12
        add     rsp, 8
done:   iretq

        .data
        .balign 16
idt:    .fill   13 * 16, 1, 0           # vectors 0 to 12: not present
        .word   handler - 0x10000, 0x08, 0x8e00, 0x0001 # vector 13: interrupt gate, offset 0x1xxxx
        .long   0, 0
balances:
        .long   0, 1000, 1000, 1000
