# Real mode: 16-bit code that patches itself, through two segments that name the same bytes.
#
# A boot sector's world: no paging, no protection; linear = segment * 16 + offset. The code runs in segment
# 0; FS names the same bytes with another base, so a store through FS patches code under another address:
# the oldest kind of alias. Two patches a round: one through DS, right ahead, and one through FS into a
# function.

        .intel_syntax noprefix
        .code16
        .global _start, writer_ds, patch_site, writer_fs, target

        .equ    FS_BASE, 0x400          # segment 0x40
        .equ    CONSOLE, 0xe9
        .equ    END, 0xf4

        .text
_start: jmp     0, offset 1f            # CS = 0, whatever it was
1:      xor     ax, ax
        mov     ds, ax
        mov     ss, ax
        mov     sp, 0x7c00
        mov     ax, FS_BASE / 16
        mov     fs, ax
        cld

        mov     si, offset title
1:      lodsb
        test    al, al
        jz      2f
        out     CONSOLE, al
        jmp     1b

2:      mov     cx, 9
        xor     bx, bx                  # what ran, mixed
round:
writer_ds:
        mov     byte ptr [patch_site + 1], cl
        jmp     1f
1:
patch_site:
        mov     al, 0x7f
        call    mix_al
        mov     ax, cx
        imul    ax, ax, 0x0307
writer_fs:
        mov     word ptr fs:[target + 1 - FS_BASE], ax
        call    target
        call    mix_al
        mov     al, cl
        add     al, '0'
        out     CONSOLE, al
        loop    round

        mov     al, '\n'
        out     CONSOLE, al
        mov     al, bl
        xor     al, bh
        out     END, al
        ud2                             # not reached

mix_al: xor     ah, ah
        imul    bx, bx, 31
        add     bx, ax
        ret

        .balign 64, 0xcc
target: mov     ax, 0x7fff              # b8 imm16
        xor     al, ah
        ret

title:  .asciz  "real-mode rounds "
