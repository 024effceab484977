# Two views of one guest: in the normal one a secret and the code that may use it do not exist, in the trusted one
# nothing but that code, and the gate to it, can be executed. The gate switches by VMFUNC, without a VM exit.
#
# The program calls through the gate three times. Then it tries what an attacker would: to read the secret, to jump to
# the trusted code, to switch by a VMFUNC of its own, and VMFUNCs with numbers that are none. Each of these ends in a
# handler, which goes back to the normal view and on at r13. The handler lies on the page of the gate: an exception
# comes in either view.

        .include "guest.inc"
        .global _start, round, gate, enter, leave, trusted, secret, handle, restore, idt
        .global steal, intrude, rogue, rogue_next, unlisted, beyond, unknown, undefined

        .macro  vmfunc_0 index          # EPTP switching
        xor     eax, eax
        mov     ecx, \index
        .endm
        .macro  vmfunc
        .byte   0x0f, 0x01, 0xd4
        .endm

# attempt: what follows, up to the label 9, must end in the handler.
        .macro  attempt
        lea     r13, [rip + 9f]
        .endm

_start: xor     r15d, r15d
        xor     r14d, r14d              # attempts that were stopped; kept by the handler
        say     "vmfunc-views stopped "
        mov     ebp, 3
round:  mov     edi, ebp
        call    gate
        mix
        dec     ebp
        jnz     round

        attempt
steal:  mov     eax, [secret]
        mix                             # not reached, as everything in front of a 9
9:      attempt
intrude:
        jmp     trusted
9:      attempt
        vmfunc_0 1
rogue:  vmfunc                          # does what it says, and there is no next instruction in that view
rogue_next:
        mov     eax, [secret]
        mix
9:      attempt
        vmfunc_0 2
unlisted:
        vmfunc                          # entry 2 of the list is 0, which is no EPTP
        mix
9:      attempt
        vmfunc_0 512
beyond: vmfunc
        mix
9:      attempt
        mov     eax, 1
        xor     ecx, ecx
unknown:
        vmfunc                          # a function that is not enabled
        mix
9:      attempt
        mov     eax, 64
undefined:
        vmfunc                          # no function: #UD without a VM exit for VMFUNC
        mix
9:
        mov     eax, r14d
        call    put_decimal
        mix
        jmp     finish

        .balign 4096, 0xcc
gate:                                   # executable in both views; changes eax, ecx, edx
        vmfunc_0 1
enter:  vmfunc
        call    trusted
        mov     edx, eax
        vmfunc_0 0
leave:  vmfunc
        mov     eax, edx
        ret

handle_with_error_code:
        add     rsp, 8
handle:                                 # ring 0; the frame is rip, cs, rflags, rsp, ss
        inc     r14d
        vmfunc_0 0
restore:
        vmfunc
        mov     [rsp], r13
        iretq

        .balign 4096, 0xcc
trusted:                                # executable in the trusted view only; eax = a function of edi and the secret
        mov     eax, [secret]
        imul    eax, edi
        inc     dword ptr [secret]
        ret
        .balign 4096, 0xcc

        .data
        .balign 16
idt:    .org    idt + 16 * 6            # #UD and #GP: interrupt gates to 0x1xxxx
        .word   handle - 0x10000, 0x08, 0x8e00, 0x0001
        .long   0, 0
        .org    idt + 16 * 13
        .word   handle_with_error_code - 0x10000, 0x08, 0x8e00, 0x0001
        .long   0, 0
        .balign 4096
secret: .long   0x5ec2e7                # alone on its page
