"""Guests of a few bytes of machine code, and where the project is."""

from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Guests in machine code.
END_0X2A = bytes.fromhex("b02a e6f4")  # mov al, 0x2a; out 0xf4, al
SPIN = bytes.fromhex("ebfe")  # jmp $
HALT = bytes.fromhex("f4")
EXITS_FOR_EVER = bytes.fromhex("e680 ebfc")  # out 0x80, al; jmp back
INVALID = bytes.fromhex("0f0b")  # ud2, and no IDT: a triple fault
READ_PORT = bytes.fromhex("e460 e6f4")  # in al, 0x60; out 0xf4, al

MANIFEST = """
schema = "vmm-guest/1"
name = "{name}"
summary = "A guest of a test"
[image]
format = "flat"
file = "image.bin"
load = 0x10000
[machine]
memory = {memory:#x}
mode = "{mode}"
[cpu]
entry = 0x10000
registers = {{ rsp = 0x80000 }}
{more}
"""

#: Goes into ``more``: another vCPU, which executes the same.
TWO_VCPUS = """
[[vcpu]]
entry = 0x10000
"""
