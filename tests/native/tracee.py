"""A bare process as a processor: ptrace, and nothing of an operating system in the guest's way.

The tracee is an ELF file of one page, put together here, that does nothing but stop. Everything else is asked of
it from outside: system calls to map the guest's RAM, registers, and to run. Any exception comes back as a signal;
the tracee's handler stops again, with the vector, the error code and CR2 in the frame that the kernel gave it.
Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import struct
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from attrs import frozen

RUNNER: Final = 0x6FFF_0000_0000
_CODE: Final = RUNNER + 0x100
_SYSCALL: Final = _CODE + 11
_HANDLER: Final = _CODE + 14
_ACTION: Final = RUNNER + 0x200
_STACK: Final = RUNNER + 0x10000
_STACK_SIZE: Final = 0x10000

_TRACEME, _CONT, _GETREGS, _SETREGS, _GETFPREGS, _SETFPREGS = 0, 7, 12, 13, 14, 15
_SYS_MMAP, _SYS_MUNMAP, _SYS_SIGACTION, _SYS_SIGALTSTACK, _SYS_ALARM = 9, 11, 13, 131, 37
_SA_SIGINFO, _SA_RESTORER, _SA_ONSTACK, _SA_NODEFER = 0x4, 0x0400_0000, 0x0800_0000, 0x4000_0000
_MAP_SHARED, _MAP_FIXED_NOREPLACE, _MAP_POPULATE = 0x01, 0x10_0000, 0x8000

_REGS: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_WORDS: Final = struct.Struct("<27Q")
#: gregs of the signal frame's ucontext: ERR, TRAPNO, oldmask, CR2 (from <sys/ucontext.h>).
_GREGS: Final = 40
_ERR, _TRAPNO, _CR2 = 19, 20, 22

UNAVAILABLE: Final = (
    None
    if sys.platform == "linux" and platform.machine() == "x86_64"
    else "the judge is a Linux process on an x86-64 processor"
)


@frozen(slots=True)
class Trap:
    """An exception of the tracee. RIP in ``registers`` is what the exception saved."""

    vector: int
    error_code: int
    address: int
    registers: dict[str, int]


class Tracee:
    """One process with an empty address space below ``RUNNER`` (0x10000 and up can be mapped)."""

    def __init__(self) -> None:
        self._ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        self._ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
        self._ptrace.restype = ctypes.c_long
        self.pid = _spawn()
        self._wait(signal.SIGTRAP)
        self.memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR)
        self._set_up_signals()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        os.close(self.memory)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    # Registers

    def registers(self) -> dict[str, int]:
        """General registers and what else ptrace shows."""
        area = (ctypes.c_char * _WORDS.size)()
        self._call(_GETREGS, area)
        return dict(zip(_REGS, _WORDS.unpack(bytes(area)), strict=True))

    def set_registers(self, values: dict[str, int]) -> None:
        """Change some of them."""
        new = self.registers() | values | {"orig_rax": (1 << 64) - 1}
        self._call(_SETREGS, ctypes.create_string_buffer(_WORDS.pack(*(new[name] for name in _REGS)), _WORDS.size))

    def fpu(self) -> bytes:
        """x87, MXCSR and XMM in the format of FXSAVE64."""
        area = (ctypes.c_char * 512)()
        self._call(_GETFPREGS, area)
        return bytes(area)

    def set_fpu(self, image: bytes) -> None:
        """Load them."""
        self._call(_SETFPREGS, ctypes.create_string_buffer(image, 512))

    # Memory

    def map(self, gva: int, length: int, access: str, fd: int, offset: int) -> None:
        """Map a part of a file, shared; whatever was there goes."""
        protection = mmap.PROT_READ
        protection |= mmap.PROT_WRITE if "w" in access else 0
        protection |= mmap.PROT_EXEC if "x" in access else 0
        self.system_call(_SYS_MUNMAP, gva, length)
        flags = _MAP_SHARED | _MAP_FIXED_NOREPLACE | _MAP_POPULATE
        found = self.system_call(_SYS_MMAP, gva, length, protection, flags, fd, offset)
        if found != gva:
            raise OSError(f"mmap of {gva:#x} gives {found:#x}")

    def system_call(self, number: int, *arguments: int) -> int:
        """Have the tracee make a system call; its raw result."""
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        before = self.registers()
        self.set_registers(dict(zip(names, arguments, strict=False)) | {"rip": _SYSCALL, "rax": number, "rflags": 2})
        self._call(_CONT, None)
        self._wait(signal.SIGTRAP)
        result = self.registers()["rax"]
        self.set_registers(before)
        return result

    # Running

    def run(self, seconds: int) -> Trap | None:
        """Run to the next exception; None if there is none in time. Registers are then those of the exception."""
        self.system_call(_SYS_ALARM, seconds)
        self._call(_CONT, None)
        number = self._wait_any()
        if number == signal.SIGALRM:
            return None
        saved, fpu = self.registers(), self.fpu()
        self._call(_CONT, number)
        self._wait(signal.SIGTRAP)
        frame = os.pread(self.memory, 8 * 23, self.registers()["rdx"] + _GREGS)
        words = struct.unpack("<23Q", frame)
        self.set_registers(saved)
        self.set_fpu(fpu)
        return Trap(words[_TRAPNO], words[_ERR], words[_CR2], saved)

    # Details

    def _set_up_signals(self) -> None:
        flags = _SA_SIGINFO | _SA_RESTORER | _SA_ONSTACK | _SA_NODEFER
        os.pwrite(self.memory, struct.pack("<QQQQ", _HANDLER, flags, _HANDLER, 0), _ACTION)
        os.pwrite(self.memory, struct.pack("<QQQ", _STACK, 0, _STACK_SIZE), _ACTION + 0x40)
        for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP):
            self.system_call(_SYS_SIGACTION, number, _ACTION, 0, 8)
        self.system_call(_SYS_SIGALTSTACK, _ACTION + 0x40, 0)

    def _call(self, request: int, data: object) -> None:
        pointer = ctypes.cast(data, ctypes.c_void_p) if isinstance(data, ctypes.Array) else data
        if self._ptrace(request, self.pid, None, pointer) == -1:
            error = ctypes.get_errno()
            raise OSError(error, f"ptrace {request}: {os.strerror(error)}")

    def _wait_any(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSTOPPED(status):
            raise OSError(f"the tracee ended: status {status:#x}")
        return os.WSTOPSIG(status)

    def _wait(self, wanted: int) -> None:
        number = self._wait_any()
        if number != wanted:
            raise OSError(f"the tracee stopped with signal {number}, not {wanted}")


def _spawn() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runner"
        path.write_bytes(_elf())
        path.chmod(0o700)
        # The file stays open as long as it is mapped; the descriptors of the guests' RAM are inheritable.
        return os.posix_spawn(path, [str(path)], {})


def _elf() -> bytes:
    """ptrace(PTRACE_TRACEME); int3. Then two places to be used from outside: syscall; int3, and int3."""
    code = bytes.fromhex("31ffb8650000000f05cc900f05cccc")
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, _CODE, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, RUNNER, RUNNER, 0x1000, _STACK - RUNNER + _STACK_SIZE, 0x1000)
    return ((header + segment).ljust(_CODE - RUNNER, b"\0") + code).ljust(0x1000, b"\0")
