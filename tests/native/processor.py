"""The judge: a program's outcome on the processor that the tests run on.

Guest RAM is one memory file, each mapping of the manifest a shared mapping of it. What needs ring 0 or a manifest's
privileges is done here, between two runs of the process: the end port, delivery through the program's IDT, IRETQ,
``mov r64, cr2``, INT n. IF and IOPL are the operating system's in the process; the flags that exceptions save
carry those of the manifest.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from attrs import define, field

from vmm.guest.manifest import GPRS

from .program import BASE, END_PORT, Fault, Outcome, Program
from .tracee import Tracee, Trap

_GP, _PF, _DB, _BP = 13, 14, 1, 3
_WITH_ERROR_CODE: Final = frozenset({8, 10, 11, 12, 13, 14, 17})
_IF, _TF, _IOPL, _RF, _NT, _AC = 1 << 9, 1 << 8, 3 << 12, 1 << 16, 1 << 14, 1 << 18
_USER_CS, _USER_SS = 0x23, 0x1B
_KERNEL_CS = 0x08
_MOST_FAULTS: Final = 1000
_ENCODED: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
#: IN, OUT, INS, OUTS, CLI, STI, HLT.
_PORT_OPCODES: Final = frozenset(b"\xe4\xe5\xe6\xe7\xec\xed\xee\xef\x6c\x6d\x6e\x6f\xfa\xfb\xf4")
_PREFIXES: Final = bytes([*range(0x40, 0x50), 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3])
_CONTEXT_SWITCHED: Final = frozenset(GPRS) | {"rip", "rflags", "fs_base", "gs_base"}


class Unjudgeable(Exception):
    """The program does something that this judge cannot decide."""


def run_on_processor(program: Program, *, seconds: int = 5) -> Outcome:
    """Run the program; raises ``Unjudgeable``."""
    ram = os.memfd_create("guest")
    try:
        os.set_inheritable(ram, True)
        os.ftruncate(ram, program.memory)
        for gpa, data in program.code.items():
            os.pwrite(ram, data, gpa)
        with Tracee() as tracee:
            run = _Run(program, tracee, ram)
            run.load()
            return run.to_end(seconds)
    finally:
        os.close(ram)


@define
class _Run:
    program: Program
    tracee: Tracee
    ram: int
    cpl: int = 3
    cr2: int = 0
    stack_selector: int = _USER_SS
    flags: int = 0
    faults: list[Fault] = field(factory=list)

    def load(self) -> None:
        for area in self.program.mappings():
            self.tracee.map(area.gva, area.length, area.access, self.ram, area.gpa)
        given = dict(self.program.initial)
        self.flags = given["rflags"] & _IF | _IOPL
        self.tracee.set_fpu(_fpu_image(given))
        zero = dict.fromkeys(GPRS, 0)
        known = {name: value for name, value in given.items() if name in _CONTEXT_SWITCHED}
        self.tracee.set_registers(zero | known | {"rip": self.program.entry})

    def to_end(self, seconds: int) -> Outcome:
        while True:
            trap = self.tracee.run(seconds)
            if trap is None:
                raise Unjudgeable("no end in time")
            code = self._bytes_at(trap.registers["rip"])
            if trap.vector == _GP and code[:2] == bytes([0xE6, END_PORT]):
                return self._outcome(trap.registers["rax"] & 0xFF, rip_after=2)
            if trap.vector == _GP and self._privileged(code, trap):
                continue
            if trap.vector == _GP and set(_opcode(code)) & _PORT_OPCODES:
                raise Unjudgeable("port I/O, which the process may not do")
            fault = self._fault(trap, code)
            if code[0] != 0xCD or trap.vector != _GP:  # what the delivery of INT n meets is no exception exit
                self.faults.append(fault)
            if len(self.faults) > _MOST_FAULTS:
                raise Unjudgeable("more exceptions than anybody wants to see")
            if self.program.idt is None:
                return self._outcome(None, rip_after=0)
            if fault.vector == _PF:
                assert fault.address is not None
                self.cr2 = fault.address
            self._deliver(fault.vector, fault.error_code, self.tracee.registers())

    # Instructions that the process may not execute

    def _privileged(self, code: bytes, trap: Trap) -> bool:
        registers = trap.registers
        if code[0] == 0xCD and self.program.idt is not None and (self.cpl == 0 or self._gate(code[1])[1] == 3):
            registers["rip"] += 2
            registers["rflags"] &= ~_RF
            self._deliver(code[1], None, registers)
            return True
        if self.cpl == 0 and code[:2] == b"\x48\xcf":
            self._return(registers)
            return True
        prefix = code[0] in (0x0F, 0x41) and code.startswith((b"\x0f\x20", b"\x41\x0f\x20"))
        if self.cpl == 0 and prefix:
            modrm = code[2 + (code[0] == 0x41)]
            if modrm & 0xF8 != 0xD0:
                raise Unjudgeable(f"control register in {code[:4].hex()}")
            name = _ENCODED[modrm & 7 | (8 if code[0] == 0x41 else 0)]
            self.tracee.set_registers({name: self.cr2, "rip": registers["rip"] + 3 + (code[0] == 0x41)})
            return True
        return False

    def _return(self, registers: dict[str, int]) -> None:
        rip, cs, flags, rsp, ss = struct.unpack("<5Q", self._linear(registers["rsp"], 40))
        if (cs & 3, ss & 3) not in ((3, 3), (0, 0)):
            raise Unjudgeable(f"iretq to {cs:#x}:{ss:#x}")
        self.cpl, self.stack_selector = cs & 3, ss
        self.flags = flags & (_IF | _IOPL)
        self.tracee.set_registers({"rip": rip, "rsp": rsp, "rflags": flags & ~(_IOPL | _RF) | _IF})

    # Exceptions

    def _fault(self, trap: Trap, code: bytes) -> Fault:
        vector, error, rip = trap.vector, trap.error_code, trap.registers["rip"]
        if vector == _PF and self.cpl == 0:
            error &= ~4
        if vector == _PF and trap.address >> 47:
            error &= ~1  # Linux says "present" of every address of the kernel's half
        if vector == _GP and code[0] == 0xCD:
            error = (code[1] << 3) | 2
        if vector == _BP:
            rip -= 1
        if trap.registers["cs"] != 0x33:
            raise Unjudgeable("left 64-bit code")
        return Fault(
            vector, error if vector in _WITH_ERROR_CODE else None, trap.address if vector == _PF else None, rip
        )

    def _gate(self, vector: int) -> tuple[int, int, int, bool]:
        """(handler, DPL, IST, interrupt gate)."""
        assert self.program.idt is not None
        low, high = struct.unpack("<QQ", self._linear(self.program.idt + 16 * vector, 16))
        if not low >> 47 & 1 or low >> 40 & 0x1F not in (0xE, 0xF) or low >> 16 & 0xFFFF != _KERNEL_CS:
            raise Unjudgeable(f"no plain gate for vector {vector}")
        offset = low & 0xFFFF | low >> 32 & 0xFFFF_0000 | high << 32
        return offset, low >> 45 & 3, low >> 32 & 7, not low >> 40 & 1

    def _deliver(self, vector: int, error_code: int | None, registers: dict[str, int]) -> None:
        handler, _, ist, interrupt = self._gate(vector)
        if ist:
            raise Unjudgeable("an IST stack: the manifest's TSS has none")
        rsp = self.program.rsp0 if self.cpl == 3 else registers["rsp"]
        flags = registers["rflags"] & ~(_IF | _IOPL) | self.flags
        selectors = (_USER_CS, _USER_SS) if self.cpl == 3 else (_KERNEL_CS, self.stack_selector)
        frame = struct.pack("<5Q", registers["rip"], selectors[0], flags, registers["rsp"], selectors[1])
        if error_code is not None:
            frame = struct.pack("<Q", error_code) + frame
        rsp = (rsp & -16) - len(frame)
        self._write(rsp, frame)
        self.stack_selector = 0 if self.cpl == 3 else self.stack_selector
        self.cpl = 0
        if interrupt:
            self.flags &= ~_IF
        cleared = registers["rflags"] & ~(_TF | _NT | _RF)
        self.tracee.set_registers({"rip": handler, "rsp": rsp, "rflags": cleared})

    # Looking

    def _outcome(self, end: int | None, *, rip_after: int) -> Outcome:
        registers = self.tracee.registers()
        registers["rip"] += rip_after
        if end is None:
            registers["rip"] = self.faults[-1].rip
        fpu = self.tracee.fpu()
        registers["fcw"], registers["fsw"] = struct.unpack_from("<HH", fpu)
        registers["mxcsr"] = struct.unpack_from("<I", fpu, 24)[0]
        for index in range(16):
            registers[f"xmm{index}"] = int.from_bytes(fpu[160 + 16 * index : 176 + 16 * index], "little")
        ram = os.pread(self.ram, self.program.memory, 0)[BASE:]
        return Outcome(end, registers, ram, tuple(self.faults))

    def _physical(self, linear: int) -> int | None:
        for area in reversed(self.program.mappings()):
            if area.gva <= linear < area.gva + area.length:
                return area.gpa + linear - area.gva
        return None

    def _bytes_at(self, linear: int) -> bytes:
        out = bytearray()
        for address in range(linear, linear + 15):
            gpa = self._physical(address)
            if gpa is None:
                break
            out += os.pread(self.ram, 1, gpa)
        return bytes(out) or b"\0"

    def _linear(self, linear: int, size: int) -> bytes:
        places = [self._physical(address) for address in range(linear, linear + size)]
        if None in places:
            raise Unjudgeable(f"a fault while an event is delivered, at {linear:#x}")
        return b"".join(os.pread(self.ram, 1, place) for place in places if place is not None)

    def _write(self, linear: int, data: bytes) -> None:
        self._linear(linear, len(data))
        for index, byte in enumerate(data):
            place = self._physical(linear + index)
            assert place is not None
            os.pwrite(self.ram, bytes([byte]), place)


def _opcode(code: bytes) -> bytes:
    """The first byte after the prefixes, if there is one."""
    return code.lstrip(_PREFIXES)[:1]


def _fpu_image(given: dict[str, int]) -> bytes:
    image = bytearray(512)
    struct.pack_into("<H", image, 0, given["fcw"])
    struct.pack_into("<I", image, 24, given["mxcsr"])
    for index in range(16):
        image[160 + 16 * index : 176 + 16 * index] = given.get(f"xmm{index}", 0).to_bytes(16, "little")
    return bytes(image)
