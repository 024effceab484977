"""Unicorn's C interface, as thin as ctypes allows.

The VMM calls the library that the ``unicorn`` package loads, not its Python classes, where a call is on the way
of a VM exit: the class wrappers cost several times the call itself. Callbacks registered here must not raise
(ctypes would print and forget the exception); the engines catch in their callbacks and raise after the stop.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from typing import Any, Final

from unicorn import unicorn_const as uc
from unicorn import x86_const as x86
from unicorn.unicorn_py3 import unicorn as _binding

from vmm.errors import EngineError

#: The only release whose behaviour and layout the VMM knows (see docs/unicorn-quirks.md).
KNOWN_RELEASE: Final = "2.1.4"

u64 = ctypes.c_uint64
_ptr = ctypes.c_void_p
_int = ctypes.c_int
_size = ctypes.c_size_t


def require_known_release() -> None:
    """Raise ``EngineError`` unless the installed Unicorn is the release that the VMM was measured on."""
    release = version("unicorn")
    if release != KNOWN_RELEASE:
        raise EngineError(
            f"Unicorn {release} is installed, but the VMM relies on behaviour and on a context layout "
            f"that are only known of {KNOWN_RELEASE}; run: pip install unicorn=={KNOWN_RELEASE}"
        )


# Two more handles on the library already loaded, so that prototypes are ours alone. Calls that return at once keep
# Python's lock (giving it up and taking it again costs more than they do); only free running lets other threads in.
_path = _binding.uclib._name  # noqa: SLF001 - the path of the library that the package chose
_unlocked = ctypes.CDLL(_path)
_locked = ctypes.PyDLL(_path)


def _prototype(name: str, *arguments: Any, library: ctypes.CDLL = _locked) -> Any:
    function = getattr(library, name)
    function.argtypes = arguments
    function.restype = _int
    return function


open_engine = _prototype("uc_open", _int, _int, ctypes.POINTER(_ptr))
close_engine = _prototype("uc_close", _ptr)
emu_start = _prototype("uc_emu_start", _ptr, u64, u64, u64, _size, library=_unlocked)
emu_step = _prototype("uc_emu_start", _ptr, u64, u64, u64, _size)
emu_stop = _prototype("uc_emu_stop", _ptr)
mem_map_ptr = _prototype("uc_mem_map_ptr", _ptr, u64, u64, ctypes.c_uint32, _ptr)
mmio_map = _prototype("uc_mmio_map", _ptr, u64, _size, _ptr, _ptr, _ptr, _ptr)
reg_read = _prototype("uc_reg_read", _ptr, _int, _ptr)
reg_write = _prototype("uc_reg_write", _ptr, _int, _ptr)
context_alloc = _prototype("uc_context_alloc", _ptr, ctypes.POINTER(_ptr))
context_free = _prototype("uc_context_free", _ptr)
context_save = _prototype("uc_context_save", _ptr, _ptr)
context_restore = _prototype("uc_context_restore", _ptr, _ptr)
context_reg_read = _prototype("uc_context_reg_read", _ptr, _int, _ptr)
context_reg_write = _prototype("uc_context_reg_write", _ptr, _int, _ptr)
context_size = _prototype("uc_context_size", _ptr)
context_size.restype = _size
hook_add = _locked.uc_hook_add  # variadic: the last argument is the instruction of UC_HOOK_INSN
hook_add.restype = _int
ctl = _locked.uc_ctl  # variadic
ctl.restype = _int


def _ctl_code(name: int, arguments: int, direction: int) -> ctypes.c_int:
    code = name | arguments << 26 | direction << 30
    return ctypes.c_int(code - (1 << 32) if code >> 31 else code)


CTL_TLB_VIRTUAL: Final = _ctl_code(uc.UC_CTL_TLB_TYPE, 1, uc.UC_CTL_IO_WRITE)
CTL_USE_EXITS: Final = _ctl_code(uc.UC_CTL_UC_USE_EXITS, 1, uc.UC_CTL_IO_WRITE)
CTL_CODE_BUFFER: Final = _ctl_code(uc.UC_CTL_TCG_BUFFER_SIZE, 1, uc.UC_CTL_IO_WRITE)
CTL_FLUSH_TLB: Final = _ctl_code(uc.UC_CTL_TLB_FLUSH, 0, uc.UC_CTL_IO_WRITE)
CTL_REMOVE_CACHE: Final = _ctl_code(uc.UC_CTL_TB_REMOVE_CACHE, 2, uc.UC_CTL_IO_WRITE)

#: bool (engine, linear page, access, &(host page, permissions), user data)
TlbFill = ctypes.CFUNCTYPE(ctypes.c_bool, _ptr, u64, _int, ctypes.POINTER(u64), _ptr)
#: void (engine, vector, user data)
Interrupt = ctypes.CFUNCTYPE(None, _ptr, ctypes.c_uint32, _ptr)
#: bool (engine, user data)
InvalidInstruction = ctypes.CFUNCTYPE(ctypes.c_bool, _ptr, _ptr)
#: void (engine, access, host address, size, value, user data)
MemoryAccess = ctypes.CFUNCTYPE(None, _ptr, _int, u64, _int, ctypes.c_int64, _ptr)
#: void (engine, &(pc, icount|size<<16), &previous, user data)
EdgeGenerated = ctypes.CFUNCTYPE(None, _ptr, ctypes.POINTER(u64), _ptr, _ptr)
#: void (engine, linear address, size, user data)
BlockEntry = ctypes.CFUNCTYPE(None, _ptr, u64, ctypes.c_uint32, _ptr)
#: uint32 (engine, port, size, user data)
PortIn = ctypes.CFUNCTYPE(ctypes.c_uint32, _ptr, ctypes.c_uint32, _int, _ptr)
#: void (engine, port, size, value, user data)
PortOut = ctypes.CFUNCTYPE(None, _ptr, ctypes.c_uint32, _int, ctypes.c_uint32, _ptr)
#: uint64 (engine, offset, size, user data)
DeviceRead = ctypes.CFUNCTYPE(u64, _ptr, u64, ctypes.c_uint32, _ptr)
#: void (engine, offset, size, value, user data)
DeviceWrite = ctypes.CFUNCTYPE(None, _ptr, u64, ctypes.c_uint32, u64, _ptr)
#: int (engine, user data): 1 means that the instruction is done
Instruction = ctypes.CFUNCTYPE(_int, _ptr, _ptr)

ACCESS_READ: Final = uc.UC_MEM_READ
ACCESS_WRITE: Final = uc.UC_MEM_WRITE
ACCESS_FETCH: Final = uc.UC_MEM_FETCH

HOOK_TLB_FILL: Final = uc.UC_HOOK_TLB_FILL
HOOK_INTERRUPT: Final = uc.UC_HOOK_INTR
HOOK_INVALID_INSTRUCTION: Final = uc.UC_HOOK_INSN_INVALID
HOOK_INSTRUCTION: Final = uc.UC_HOOK_INSN
HOOK_EDGE_GENERATED: Final = uc.UC_HOOK_EDGE_GENERATED
HOOK_BLOCK: Final = uc.UC_HOOK_BLOCK
HOOK_MEMORY_READ: Final = uc.UC_HOOK_MEM_READ
HOOK_MEMORY_WRITE: Final = uc.UC_HOOK_MEM_WRITE

INSN_IN: Final = x86.UC_X86_INS_IN
INSN_OUT: Final = x86.UC_X86_INS_OUT
INSN_CPUID: Final = x86.UC_X86_INS_CPUID
INSN_RDTSC: Final = x86.UC_X86_INS_RDTSC
INSN_RDTSCP: Final = x86.UC_X86_INS_RDTSCP
INSN_SYSCALL: Final = x86.UC_X86_INS_SYSCALL
INSN_SYSENTER: Final = x86.UC_X86_INS_SYSENTER

REG_RIP: Final = x86.UC_X86_REG_RIP
REG_RAX: Final = x86.UC_X86_REG_RAX
REG_RBX: Final = x86.UC_X86_REG_RBX
REG_RCX: Final = x86.UC_X86_REG_RCX
REG_RDX: Final = x86.UC_X86_REG_RDX
REG_RSP: Final = x86.UC_X86_REG_RSP
REG_RFLAGS: Final = x86.UC_X86_REG_RFLAGS
REG_MSR: Final = x86.UC_X86_REG_MSR
REG_MXCSR: Final = x86.UC_X86_REG_MXCSR
REG_FCW: Final = x86.UC_X86_REG_FPCW
REG_FSW: Final = x86.UC_X86_REG_FPSW
REG_XMM0: Final = x86.UC_X86_REG_XMM0


PERM_READ: Final = uc.UC_PROT_READ
PERM_WRITE: Final = uc.UC_PROT_WRITE
PERM_EXEC: Final = uc.UC_PROT_EXEC
PERM_ALL: Final = uc.UC_PROT_ALL

ARCH_X86: Final = uc.UC_ARCH_X86
MODE_64: Final = uc.UC_MODE_64
TLB_VIRTUAL: Final = uc.UC_TLB_VIRTUAL


class Msr(ctypes.Structure):
    """The value that the MSR pseudo register takes: index in, contents out."""

    _fields_ = (("index", ctypes.c_uint32), ("value", u64))


def check(status: int, call: str) -> None:
    """Raise ``EngineError`` for a status other than success."""
    if status:
        text = _binding.uclib.uc_strerror(status).decode()
        raise EngineError(f"{call} failed: {text}")
