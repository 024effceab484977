# Hidden hook: a function is hooked, and a check of its own bytes finds nothing.
#
# `licence` is hooked by a detour as debuggers and cheats place it: a jump over its first five bytes to
# `detour`, which logs the argument, does what the five bytes did, and goes back behind them. The jump is
# nowhere in memory that the guest can read: the VMM executes it in place of the five bytes (see [[hidden]]
# in guest.toml). The guest compares its function with a copy, byte by byte; then it patches it, through a
# writable view, first behind the jump and then under it, and compares again. The hook stays, and what the
# guest wrote behind it is what runs.

        .include "guest.inc"
        .global _start, check, reader, verdict, licence, behind, limit, licence_end, detour, logged
        .global patch_behind, patch_under

        .equ    VIEW, 0x40000000        # a writable view of the code
        .equ    VERDICT, 0x80           # 1: the function is as the guest knows it, 0: it is not
        .equ    LOG, 0x81               # the argument of each call that the hook sees

_start: xor     r15d, r15d
        say     "hidden-hook "
        call    check
        mov     edi, 5
        call    licence
        mix

        mov     edi, offset limit + VIEW
patch_behind:
        mov     dword ptr [rdi], 0x00000102     # in the function, and in the guest's copy of it
        mov     dword ptr [rip + copy + (limit - licence)], 0x00000102
        call    check
        mov     edi, 6
        call    licence
        mix

        mov     edi, offset licence + VIEW
patch_under:
        mov     dword ptr [rdi], 0xc06bc78b     # mov eax, edi in its other encoding; imul eax, eax, 5
        mov     byte ptr [rdi + 4], 5
        mov     dword ptr [rip + copy], 0xc06bc78b
        mov     byte ptr [rip + copy + 4], 5
        call    check
        mov     edi, 7
        call    licence
        mix
        jmp     finish

# check: compare the function with the copy; says what it finds.
check:  mov     esi, offset licence
        mov     edi, offset copy
        mov     ecx, offset licence_end - licence
        xor     eax, eax
reader: mov     dl, byte ptr [rsi]
        xor     dl, byte ptr [rdi]
        or      al, dl
        inc     rsi
        inc     rdi
        dec     ecx
        jnz     reader
        cmp     al, 1
        sbb     eax, eax
        and     eax, 1                  # 1 if there is no difference
verdict:
        out     VERDICT, al
        test    al, al
        jz      1f
        say     "intact "
        ret
1:      say     "tampered "
        ret

# detour: what is executed in place of the first five bytes of `licence`.
detour: mov     eax, edi
logged: out     LOG, al
        mov     eax, edi
        imul    eax, eax, 3
        jmp     behind

        .balign 4096, 0xcc              # a frame of its own
        .macro  body
        mov     eax, edi                # 89 f8
        imul    eax, eax, 3             # 6b c0 03
        .endm
        .ifdef  WRONG
licence:
        .byte   0xe9                    # the same hook, there for everybody to see
        .long   detour - (licence + 5)
        .else
licence:
        body
        .endif
behind: .byte   0x05                    # add eax, limit
limit:  .long   0x00000101
        ret
licence_end:
        .balign 64, 0xcc

        .data
copy:   body
        .byte   0x05
        .long   0x00000101
        .byte   0xc3
        .balign 8
