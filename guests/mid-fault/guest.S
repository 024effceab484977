# Fault in the middle: a store over two pages of which the second is not there. Nothing of it may happen
# before the fault.
#
# FIRST is mapped and its code has run; SECOND is not mapped. The eight-byte store patches the last two
# bytes of FIRST and the first six of SECOND. The processor reports #PF for SECOND, and the ring-0 handler
# looks at FIRST: the old bytes must still be there. It maps SECOND and returns, the store runs again as a
# whole, and then the instruction that lies over both pages runs. Four rounds; in the even ones the handler
# meets SECOND again when the instruction is fetched.

        .include "guest.inc"
        .include "ring0.inc"
        .global _start, round, writer, page_fault, check_first, map_second, system_call, first_page, second_page

        .equ    FIRST, PAGES + 0x20000
        .equ    SECOND, FIRST + 0x1000
        .equ    FIRST_ENTRY, page_table + (FIRST >> 12) * 8
        .equ    SECOND_ENTRY, FIRST_ENTRY + 8
        .equ    SITE, SECOND - 3        # mov eax, imm32: b8 and two bytes | two bytes and ret

_start: mov     dword ptr [FIRST_ENTRY], offset first_page + ALL
        call    start_user              # and from here on in ring 3

        xor     r15d, r15d
        xor     r14d, r14d              # faults
        xor     r13d, r13d              # faults that found something written already
        mov     r12d, 0x1111            # what the last two bytes of FIRST must be: checked by the handler
        mov     ebp, SITE
        mov     rbx, 0x909090c300000000 # ret and NOPs behind the immediate
        mov     ecx, 4
        say     "mid-fault ran "
round:
        call    first_function          # FIRST is code, and runs
        imul    edx, ecx, 0x01010203
        or      rdx, rbx
writer: mov     qword ptr [rbp + 1], rdx        # faults; the handler checks, maps and returns
        movzx   r12d, dx
        test    cl, 1
        jnz     1f
        int     0x80                    # even rounds: take SECOND away again, so that the fetch faults
1:      call    rbp
        call    put_decimal
        mix
        int     0x80
        dec     ecx
        jnz     round

        mov     eax, r14d               # 4 + 2
        mix
        mov     eax, r13d               # 0
        mix
        jmp     finish

first_function:
        mov     eax, FIRST
        call    rax
        mix
        ret

page_fault:                             # may change rax: the program keeps nothing there
        inc     r14d
        mov     rax, cr2
        shr     rax, 12
        cmp     eax, SECOND >> 12
        jne     stray
check_first:
        movzx   eax, word ptr [first_page + 0xffe]
        cmp     eax, r12d
        je      map_second
        inc     r13d
map_second:
        mov     dword ptr [SECOND_ENTRY], offset second_page + ALL
        invlpg  [SECOND]
        add     rsp, 8                  # the error code
        iretq

stray:  mov     r15d, 0xdead            # a fault that this guest does not know
        jmp     finish

system_call:                            # take SECOND away
        mov     dword ptr [SECOND_ENTRY], 0
        invlpg  [SECOND]
        iretq

        .balign 4096, 0xcc
second_page:                            # in front of FIRST in the frames: linear order is not frame order
        .byte   0x11, 0x11
        ret
        .balign 4096, 0xcc
first_page:
        mov     eax, 0x7e57
        ret
        .org    first_page + 0xffd, 0xcc
        .byte   0xb8, 0x11, 0x11        # mov eax, imm32, its first half
        .balign 4096, 0xcc
