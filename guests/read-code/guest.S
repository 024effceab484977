# Read code: the guest takes a checksum of its own code, patches it, and takes it again.
#
# As tamper checks, licence checks and unpackers do. Under the VMM a read of an execute-only frame is a VM
# exit of its own and must give the true bytes. The second checksum differs from the first in exactly the
# way that the patch says, and the page is read at its own address and through a read-only view.

        .include "guest.inc"
        .global _start, writer, patch_site, reader, code_end

        .equ    VIEW, 0x40000000        # a read-only view
        .equ    WRITE, 0x50000000       # a writable one

_start: xor     r15d, r15d
        say     "read-code "
        call    check_both
        call    patch_site

        mov     edi, offset patch_site + 1 + WRITE
writer: mov     dword ptr [rdi], 0x10203040
        call    check_both
        call    patch_site
        jmp     finish

patch_site:
        mov     eax, 0x01020304
        mix
        ret

# check_both: the checksum of [_start, code_end) at both addresses; says whether they agree.
check_both:
        mov     esi, offset _start
        call    checksum
        mov     edx, eax
        mov     esi, offset _start + VIEW
        call    checksum
        sub     edx, eax
        jnz     differ                  # the two views show different bytes
        call    put_decimal
        ret
differ: say     "two views of one frame differ "
        mov     eax, edx
        mix
        ret

# checksum: eax = the checksum of as many bytes from rsi as the code has; also mixed into r15d.
checksum:
        xor     eax, eax
        mov     ecx, offset code_end - _start
1:      rol     eax, 3
reader: xor     al, byte ptr [rsi]
        inc     rsi
        dec     ecx
        jnz     1b
        mix
        ret
code_end:
