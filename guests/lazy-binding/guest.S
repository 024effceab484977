# Lazy binding: call sites that bind themselves, on pages that are never writable and executable at once.
#
# Each call site is `call [table entry]`, six bytes, and all entries lead to `resolve`. That looks the function
# up by name and, when patching is on, turns the site into `nop; call rel32`, so that the next call goes there
# without table and resolver. The code is read-and-execute in the guest's own page tables; `patch` makes the
# page of a site (or both pages of a site over a boundary) read-and-write, no-execute, and back. So nobody may
# run there meanwhile: interrupts are off, and `patch` itself lies on another page.
#
# A clock interrupt whose handler calls through one of the sites comes as soon as `patch` lets interrupts in
# again: a patch must be complete by then. (The interrupt is raised by INT, so that runs repeat.)
#
# First 25 rounds without patching, then 25 with it. Then the guest tries whether the protection is real: stores
# to the pages of the sites, and a call to such a page while it is writable. Each must fault and do nothing.
#
# Wrong versions: OPEN leaves the pages writable and executable after the first patch. TORN patches in two
# stores, opcode first, and lets interrupts in between.

        .ifndef OPEN
        .set    OPEN, 0
        .endif
        .ifndef TORN
        .set    TORN, 0
        .endif

        .include "guest.inc"
        .global _start, round, resolve, look_up, patch, patch_store, protect, protect_store, tick, page_fault
        .global try_store, refuse_store, refuse_fetch, stray
        .global near_page, far_page, site_add, site_xor, site_add_again, site_rotate, site_multiply
        .global page_table, near_entry, far_entry, add, xor_constant, rotate, multiply, table, table_end

        .equ    ROUNDS, 25
        .equ    STACK_PAGE, 0x7f000
        .equ    CLOCK, 0x20             # the vector of the clock interrupt

# Page-table entries: present, writable, and no-execute; accessed and dirty are set from the start, so that the
# processor never writes here.
        .equ    PRESENT, 1
        .equ    WRITABLE, 2
        .equ    ACCESSED_DIRTY, 0x60
        .equ    NO_EXECUTE, 1 << 63
        .equ    RX, PRESENT | ACCESSED_DIRTY
        .equ    RW, PRESENT | WRITABLE | ACCESSED_DIRTY | NO_EXECUTE

# Bits of a page fault's error code.
        .equ    FAULT_PRESENT, 1
        .equ    FAULT_WRITE, 2
        .equ    FAULT_FETCH, 16

_start: mov     dword ptr [pml4], offset pdpt + PRESENT | WRITABLE | ACCESSED_DIRTY
        mov     dword ptr [pdpt], offset page_directory + PRESENT | WRITABLE | ACCESSED_DIRTY
        mov     dword ptr [page_directory], offset page_table + PRESENT | WRITABLE | ACCESSED_DIRTY
        mov     eax, offset pml4
        mov     cr3, rax                # from here on the guest's own tables
        lgdt    [gdt_register]
        lidt    [idt_register]

        say     "lazy-binding resolved "
        xor     r15d, r15d
        xor     r14d, r14d              # faults that were due, counted by page_fault
        xor     r13d, r13d              # what the clock's handler accumulates
        call    rounds
        call    put_resolutions
        say     "without patching, "
        inc     dword ptr [patching]
        sti
        call    rounds
        cli
        call    put_resolutions
        say     "with it, refused "

        mov     edi, offset near_page + 0x800
        call    try_store
        mov     edi, offset far_page + 0x800
        call    try_store
        mov     rsi, RW
        call    protect
        call    far_page                # not executable while it is writable
        mov     rsi, RX
        call    protect
        mov     eax, r14d
        call    put_decimal
        mix
        mov     eax, r13d
        mix
        jmp     finish

rounds: mov     ecx, ROUNDS
        mov     eax, 1
round:  call    near_page
        mix
        dec     ecx
        jnz     round
        ret

# put_resolutions: print how often `resolve` ran, fold it into the result, and count anew.
put_resolutions:
        xor     eax, eax
        xchg    eax, dword ptr [resolutions]
        call    put_decimal
        mix
        ret

# resolve: where all entries of the table lead. Binds the site that called, and goes on to its function as if
# the site had called that. Changes r11 only, as such stubs may by the ABI.
resolve:
        push    rax
        push    rdx
        push    rsi
        push    rdi
        mov     rdi, [rsp + 4 * 8]      # the return address: the site ends there
        inc     dword ptr [resolutions]
        call    look_up
        sub     rdi, 6
        cmp     dword ptr [patching], 0
        je      1f
        call    patch
1:      pop     rdi
        pop     rsi
        pop     rdx
        pop     rax
        jmp     r11                     # the return address on the stack is still the site's

# look_up: r11 = the function that the site which ends at rdi names. Changes rax and rsi. It asks the table of
# sites, not the bytes of the site: those may be bound by now, if an interrupt came in between.
look_up:
        mov     esi, offset sites
1:      cmp     [rsi], rdi
        lea     rsi, [rsi + 16]
        jne     1b
        mov     rax, [rsi - 8]          # the name
        mov     esi, offset exports
2:      cmp     [rsi], rax
        lea     rsi, [rsi + 16]
        jne     2b
        mov     r11, [rsi - 8]
        ret

# patch: make the site at rdi `nop; call r11`. The NOP stands in front, so that the call ends where the old one
# ended. Changes rax, rdx and rsi.
patch:  pushfq
        cli
        mov     rsi, RW
        call    protect
        mov     edx, r11d
        sub     edx, edi
        sub     edx, 6                  # rel32 counts from the end of the call
        .if TORN
patch_store:
        mov     word ptr [rdi], 0xe890  # the new opcode with the old displacement: that of the table entry
        call    close_site
        popfq
        int     CLOCK
        pushfq
        cli
        mov     rsi, RW
        call    protect
        mov     dword ptr [rdi + 2], edx
        .else
        mov     rax, [rdi]
        shr     rax, 48                 # the two bytes behind the site stay
        shl     rax, 32
        or      rax, rdx
        shl     rax, 16
        mov     ax, 0xe890
patch_store:
        mov     [rdi], rax              # one store: the site is the old call or the new one, never half of each
        .endif
        call    close_site
        popfq
        int     CLOCK                   # pending since CLI
        ret

# close_site: write the lines of the site back, and protect its page again; the INVLPG serialises. One x86 processor
# needs neither to run its new code, others do.
close_site:
        clflush [rdi]
        clflush [rdi + 7]
        mov     rsi, RX
        .if OPEN
        mov     rsi, RW & ~NO_EXECUTE
        .endif

# protect: give the pages of the eight bytes at rdi the access rsi. Changes rax.
protect:
        mov     eax, edi
        call    protect_page
        lea     eax, [rdi + 7]
        xor     eax, edi
        test    eax, 0x1000
        jz      protected               # both ends on one page
        lea     eax, [rdi + 7]
protect_page:
        and     eax, -0x1000
        bt      rsi, 63
        jc      1f
        vmcall                          # the page in RAX is to be executed: for a monitor that wants to see it first
1:      push    rsi
        or      rsi, rax
        push    rax
        shr     eax, 12
protect_store:
        mov     [page_table + rax * 8], rsi
        pop     rax
        invlpg  [rax]
        pop     rsi
protected:
        ret

# tick: the clock's handler. It uses the same function as the program, through the same site.
tick:   push    rax
        push    r11                     # a call may go by way of `resolve`
        mov     eax, r13d
        call    accumulate
        mov     r13d, eax
        pop     r11
        pop     rax
        iretq

# try_store: a store to [rdi], which must fault.
try_store:
        mov     byte ptr [rdi], 0x5a
try_store_end:
        ret

# page_fault: lets a store of try_store, and a call to a page that is not executable, come to nothing.
page_fault:                             # the stack: error code, rip, cs, rflags, rsp, ss
        push    rax
        cmp     qword ptr [rsp + 8], FAULT_PRESENT | FAULT_WRITE
        je      refuse_store
        cmp     qword ptr [rsp + 8], FAULT_PRESENT | FAULT_FETCH
        jne     stray
refuse_fetch:
        cmp     qword ptr [rsp + 16], offset far_page
        jne     stray
        mov     rax, [rsp + 40]         # go on where the call would have returned
        mov     rax, [rax]
        mov     [rsp + 16], rax
        add     qword ptr [rsp + 40], 8
        jmp     refused
refuse_store:
        cmp     qword ptr [rsp + 16], offset try_store
        jne     stray
        mov     qword ptr [rsp + 16], offset try_store_end
refused:
        inc     r14d
        pop     rax
        add     rsp, 8                  # the error code
        iretq

stray:  say     "and ran into a page fault "
        mov     r15d, 0xdead
        jmp     finish

        .data   1                       # behind the rest of .data: filled by `import`
        .balign 8
sites:                                  # where a site ends, and the name of its function
        .text

# import name: a call site of the function `name`.
        .macro  import name
        call    qword ptr [rip + table_\name]
        .pushsection .data, 1
        .quad   1f
2:      .ascii  "\name"
        .org    2b + 8
        .popsection
1:
        .endm

        .balign 4096, 0xcc
near_page:                              # eax = what the functions make of eax and ecx
        call    accumulate
site_xor:
        import  xor
site_add_again:
        import  add
        jmp     site_rotate
accumulate:                             # called by the program and by the clock's handler
site_add:
        import  add
        ret
        .org    near_page + 0xffd, 0xcc
site_rotate:                            # three bytes on this page, three on the next
        import  rotate
        .equ    far_page, near_page + 0x1000
site_multiply:
        import  multiply
        ret

# The lowest table of the guest's own page tables. It is linked in here so that the VMM has its stores on record:
# what lies among the code is execute-only to the EPT. To the guest it is data: read-and-write, no-execute.
        .balign 4096, 0xcc
page_table:
        .fill   0x10, 8, 0
        .set    page, 0x10000
        .rept   3                       # this file's code
        .quad   page + RX
        .set    page, page + 0x1000
        .endr
        .quad   0x13000 + RW            # this table
        .quad   0x14000 + RX            # library and console
        .quad   0x15000 + RW            # data, descriptor tables
        .equ    near_entry, page_table + (0x11000 >> 12) * 8
        .equ    far_entry, near_entry + 8
        .type   near_entry, @object
        .type   far_entry, @object
        .org    page_table + (STACK_PAGE >> 12) * 8
        .quad   STACK_PAGE + RW
        .org    page_table + 0x1000

        .section .text.console, "ax"    # the library: on the page of the console routines
add:    add     eax, ecx
        ret
        .balign 16, 0xcc
xor_constant:
        xor     eax, 0x5bd1e995
        ret
        .balign 16, 0xcc
rotate: rol     eax, 7
        ret
        .balign 16, 0xcc
multiply:
        imul    eax, eax, 0x01000193
        ret

        .data
        .balign 16
table:                                  # stays as it is: every site comes by once
table_add:
        .quad   resolve
table_xor:
        .quad   resolve
table_rotate:
        .quad   resolve
table_multiply:
        .quad   resolve
table_end:

# export name, function: what the library offers.
        .macro  export name, function
1:      .ascii  "\name"
        .org    1b + 8
        .quad   \function
        .endm
exports:
        export  add, add
        export  xor, xor_constant
        export  rotate, rotate
        export  multiply, multiply

patching:
        .long   0
resolutions:
        .long   0

        .balign 16
gdt:    .quad   0
        .quad   0x00af9b000000ffff      # 0x08 ring-0 code, 64-bit
        .quad   0x00cf93000000ffff      # 0x10 ring-0 data
gdt_end:
# gate: an interrupt gate; the handlers lie in 0x10000-0x1ffff.
        .macro  gate vector, handler
        .org    idt + 16 * \vector
        .word   \handler - 0x10000, 0x08, 0x8e00, 0x0001
        .long   0, 0
        .endm
idt:    gate    14, page_fault
        gate    CLOCK, tick
idt_end:
gdt_register:
        .word   gdt_end - gdt - 1
        .quad   gdt
idt_register:
        .word   idt_end - idt - 1
        .quad   idt

        .bss
        .balign 4096
pml4:   .skip   4096
pdpt:   .skip   4096
page_directory:
        .skip   4096
