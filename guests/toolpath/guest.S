# Toolpath: a controller executes its path as code, and patches it ahead of the cutter.
#
# The path is compiled: 64 steps of `mov eax, target; call tool`, one after the other. A sensor looks ahead of the
# cutter and interrupts when it sees a flaw in the material; the handler notes where. After its move, still several
# steps away, the tool replans: it lifts the depth of the three steps around the flaw, which are instructions on
# the page that it is about to return to, through the writable view of that page.
#
# Then it has to synchronise, or the cutter follows a path fetched before: write, synchronise, execute. It flushes
# the lines that it has changed, for machines whose instruction caches software keeps coherent, and executes a
# serialising instruction, for processors that may have fetched ahead. WRONG does neither.

        .include "guest.inc"
        .global _start, path, path_end, tool, replan, writer, synchronise, sensed

        .equ    VIEW, 0x40000000        # see guest.toml: VIEW + gpa is the writable view
        .equ    WORKPIECE, 0x300        # see guest.toml: the ports of cutter and sensor
        .equ    STEPS, 64
        .equ    STEP, 10                # bytes of a step
        .equ    DETOUR, 30              # how much deeper the cutter must go around a flaw

_start: lidt    [idt_register]
        xor     r15d, r15d
        sti
        call    path
        cli
        say     "toolpath "
        mov     eax, STEPS
        call    put_decimal
        say     "steps, flaws hit: "
        mov     dx, WORKPIECE + 4
        in      eax, dx
        call    put_decimal
        mix
        jmp     finish

# tool: move the cutter to eax (31:16 position, 15:0 depth), then replan if the sensor has seen something.
tool:   mix
        mov     dx, WORKPIECE
        out     dx, eax                 # the sensor may interrupt here
        cmp     byte ptr [seen], 0
        jne     replan
        ret

# replan: go around the flaw.
replan: mov     byte ptr [seen], 0
        movzx   esi, word ptr [flaw + 2]
        dec     esi                     # the step before the flaw, the flaw, and the one behind it
        imul    esi, esi, STEP
        add     esi, offset path + 1    # the depth is the lower half of the immediate
        mov     edi, VIEW
        mov     ecx, 3
1:
writer: add     word ptr [rsi + rdi], DETOUR
        add     esi, STEP
        dec     ecx
        jnz     1b
        .ifndef WRONG
synchronise:
        clflush [rsi - 3 * STEP]        # the patched bytes lie within two lines of 64
        clflush [rsi]
        xor     eax, eax
        cpuid                           # changes eax, ebx, ecx, edx: the path keeps nothing there
        .else
synchronise:
        .endif
        ret                             # to the path

# sensed: the sensor's interrupt. What is ahead is not patched here: the cutter is moving.
sensed: push    rax
        push    rdx
        mov     dx, WORKPIECE
        in      eax, dx
        mov     [flaw], eax
        mov     byte ptr [seen], 1
        pop     rdx
        pop     rax
        iretq

        .data
flaw:   .long   0
seen:   .byte   0
        .balign 16
idt:    .fill   2 * 0x40, 8, 0          # no gates below the sensor's
        .word   sensed - 0x10000, 0x08, 0x8e00, 0x0001
        .long   0, 0
idt_end:
idt_register:
        .word   idt_end - idt - 1
        .quad   idt

        .text
        .balign 4096, 0xcc              # a frame of its own: the controller is not on it
path:
        .set    x, 0
        .rept   STEPS
        mov     eax, x << 16 | (100 + x * (STEPS - x) / 16)
        call    tool
        .set    x, x + 1
        .endr
        ret
path_end:
        .balign 64, 0xcc
