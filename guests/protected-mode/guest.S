# Protected mode: 32-bit code that patches itself, first with paging off, then through an alias that it
# makes itself.
#
# The guest starts in ring 0 with flat segments and no paging. After the first patches it builds a page
# directory and a page table (two-level paging, 4 KiB pages) that map the first MiB twice, at 0 and at
# ALIAS, turns paging on, and patches the function at its own address through ALIAS.

        .intel_syntax noprefix
        .code32
        .global _start, patch_flat, writer_flat, paging_on, patch_alias, writer_alias, target

        .equ    ALIAS, 0x400000         # the second entry of the page directory
        .equ    DIRECTORY, 0x30000
        .equ    TABLE, 0x31000
        .equ    CONSOLE, 0xe9
        .equ    END, 0xf4

        .text
_start: xor     ebp, ebp                # what ran, mixed
        mov     esi, offset title
        call    puts

        mov     edi, offset target + 1
        mov     ecx, 6
patch_flat:
        imul    edx, ecx, 0x01030507
writer_flat:
        mov     dword ptr [edi], edx
        call    use_target
        dec     ecx
        jnz     patch_flat

        mov     edi, TABLE              # present, writable
        mov     eax, 3
        mov     ecx, 256
1:      mov     dword ptr [edi], eax
        add     edi, 4
        add     eax, 0x1000
        dec     ecx
        jnz     1b
        mov     dword ptr [DIRECTORY], TABLE + 3
        mov     dword ptr [DIRECTORY + 4], TABLE + 3
        mov     eax, DIRECTORY
        mov     cr3, eax
        mov     eax, cr0
        or      eax, 0x80000000
paging_on:
        mov     cr0, eax
        jmp     1f
1:
        mov     edi, offset target + 1 + ALIAS
        mov     ecx, 6
patch_alias:
        imul    edx, ecx, 0x07050301
writer_alias:
        mov     dword ptr [edi], edx
        call    use_target
        dec     ecx
        jnz     patch_alias

        mov     esi, offset newline
        call    puts
        mov     eax, ebp
        shr     eax, 16
        xor     eax, ebp
        xor     al, ah
        out     END, al
        ud2                             # not reached

use_target:
        call    target
        imul    ebp, ebp, 31
        add     ebp, eax
        mov     al, cl
        add     al, '0'
        out     CONSOLE, al
        ret

1:      out     CONSOLE, al
puts:   lodsb
        test    al, al
        jnz     1b
        ret

        .balign 4096, 0xcc
target: mov     eax, 0x7fffffff
        ret

        .balign 16, 0xcc
title:  .asciz  "protected-mode rounds "
newline:
        .asciz  "\n"
