# Decrypt: an onion of code. Each layer is plain only after the layer around it has run.
#
# layer_1 is plain; it takes KEY off everything behind it and calls layer_2, which until then was noise.
# layer_2 takes the second cipher (each byte xor its number) off layer_3 and runs into it. In the image the
# inner layers are ciphertext, so their instructions are written here as bytes, with what they mean beside
# them; the loops patch forwards on the page that they run from, a byte at a time.

        .include "guest.inc"
        .global _start, layer_1, writer_1, layer_2, writer_2, layer_3, onion_end

        .equ    KEY, 0xa7

        .macro  once bytes:vararg       # ciphertext of layer_2
        .irp    plain, \bytes
        .byte   (\plain) ^ KEY
        .endr
        .endm

        .macro  twice bytes:vararg      # ciphertext of layer_3: byte n of it, counted from 1, xor n, then KEY
        .irp    plain, \bytes
        .byte   (\plain) ^ (. - layer_3 + 1) ^ KEY
        .endr
        .endm

_start: xor     r15d, r15d
        say     "decrypt found "
layer_1:
        mov     esi, offset layer_2
        mov     ecx, offset onion_end - layer_2
writer_1:
        xor     byte ptr [rsi + rcx - 1], KEY
        dec     ecx
        jnz     writer_1
        call    layer_2
        call    put_decimal
        mix
        jmp     finish

        .balign 32, 0xcc
layer_2:
        once    0xb9, LAYER_3_LENGTH, 0, 0, 0           # mov     ecx, LAYER_3_LENGTH
        once    0x48, 0x8d, 0x35, 8, 0, 0, 0            # lea     rsi, [rip + layer_3]
writer_2:
        once    0x30, 0x4c, 0x0e, 0xff                  # xor     byte ptr [rsi + rcx - 1], cl
        once    0xff, 0xc9                              # dec     ecx
        once    0x75, 0xf8                              # jnz     writer_2
layer_3:
        twice   0xb8, 0x2a, 0x00, 0x00, 0x00            # mov     eax, 42
        twice   0x69, 0xc0, 0x3d, 0x1f, 0x00, 0x00      # imul    eax, eax, 7997
        twice   0x35, 0x5a, 0xa5, 0x00, 0x00            # xor     eax, 0xa55a
        twice   0xc3                                    # ret
onion_end:
        .equ    LAYER_3_LENGTH, 17
        .if     onion_end - layer_3 - LAYER_3_LENGTH
        .error  "LAYER_3_LENGTH is not the length of layer_3"
        .endif
