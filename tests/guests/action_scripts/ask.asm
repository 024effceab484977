xor ebx, ebx
read:
in al, 0x60
test al, al
jz done
out 0xe9, al
inc ebx
jmp read
done:
mov al, bl
out 0xf4, al
