"""Where Unicorn keeps in a saved context what its interface does not show.

A context holds a copy of QEMU's ``CPUX86State``. The interface can neither load the hidden part of a segment
register (so it cannot change the privilege level) nor tell the error code of an exception; both are in there.
This is the one place that knows offsets. ``verify`` checks all of them against a live engine before anything
relies on them, and refuses to go on if one is not where it should be.

Offsets are in bytes from the start of the context buffer.
"""

from __future__ import annotations

import ctypes
import io
from typing import Final

from vmm.cpu import binding as b
from vmm.errors import EngineError

CONTEXT_SIZE: Final = 5608
_ENV: Final = 40  # the header of struct uc_context

GPRS: Final = _ENV  # rax rcx rdx rbx rsp rbp rsi rdi r8-r15, 8 bytes each
RIP: Final = _ENV + 128
EFLAGS: Final = _ENV + 136  # the arithmetic flags are kept elsewhere, lazily
CC_SRC: Final = _ENV + 152  # CC_DST, CC_SRC, CC_SRC2: operands of the last arithmetic operation
CC_OP: Final = _ENV + 168  # which one that was; then DF, in a form of its own
HFLAGS: Final = _ENV + 176
SEGMENTS: Final = _ENV + 184  # es cs ss ds fs gs ldtr tr gdtr idtr, SEGMENT_SIZE each
SEGMENT_SIZE: Final = 24  # selector u32, pad, base u64, limit u32, flags u32
CONTROL: Final = _ENV + 424  # cr0-cr4, 8 bytes each
EFER: Final = _ENV + 592
STAR: Final = _ENV + 4824
LSTAR: Final = _ENV + 4840
CSTAR: Final = _ENV + 4848
FMASK: Final = _ENV + 4856
ERROR_CODE: Final = _ENV + 5384
EXCEPTION_IS_INT: Final = _ENV + 5388
DEBUG: Final = _ENV + 5400  # dr0-dr7, 8 bytes each
OLD_EXCEPTION: Final = _ENV + 5496

SEGMENT_ORDER: Final = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr", "gdtr", "idtr")

# hflags: QEMU's digest of the state that translation depends on.
#: Where ``struct uc_struct`` and ``CPUState`` lead to the live ``CPUX86State``, in the wheel for x86-64 Linux.
_CPU_POINTER: Final = 440
_ENV_POINTER: Final = 296

HF_CPL: Final = 3
HF_INHIBIT_IRQ: Final = 1 << 3
HF_CS32: Final = 1 << 4
HF_SS32: Final = 1 << 5
HF_ADDSEG: Final = 1 << 6
HF_PE: Final = 1 << 7
HF_LMA: Final = 1 << 14
HF_CS64: Final = 1 << 15

_LONG_MODE: Final = HF_PE | HF_LMA | HF_CS64
_MSRS: Final = {0xC0000081: STAR, 0xC0000082: LSTAR, 0xC0000083: CSTAR, 0xC0000084: FMASK}
#: Where the page of a probe is, and behind it another.
PROBE_PAGE: Final = 0x1000


class Probe:
    """A scratch engine with one page of memory, for looking at its contexts."""

    def __init__(self) -> None:
        handle = ctypes.c_void_p()
        b.check(b.open_engine(b.ARCH_X86, b.MODE_64, ctypes.byref(handle)), "uc_open")
        assert handle.value is not None
        self.engine = handle.value
        self.page = ctypes.create_string_buffer(3 * 4096)
        start = -ctypes.addressof(self.page) % 4096
        self.code = (ctypes.c_uint8 * 8192).from_buffer(self.page, start)
        self._keep: list[object] = []
        b.check(b.ctl(handle, b.CTL_TLB_VIRTUAL, b.TLB_VIRTUAL), "uc_ctl")
        b.check(b.ctl(handle, b.CTL_USE_EXITS, 1), "uc_ctl")
        status = b.mem_map_ptr(self.engine, PROBE_PAGE, 8192, b.PERM_ALL, ctypes.addressof(self.code))
        b.check(status, "uc_mem_map_ptr")
        self._hook(b.HOOK_TLB_FILL, b.TlbFill(self._fill))
        self._hook(b.HOOK_INTERRUPT, b.Interrupt(lambda *_: b.emu_stop(self.engine)))
        self.context = ctypes.c_void_p()
        b.check(b.context_alloc(self.engine, ctypes.byref(self.context)), "uc_context_alloc")

    def close(self) -> None:
        """Give the engine back."""
        b.context_free(self.context)
        b.close_engine(self.engine)

    def _hook(self, kind: int, callback: object) -> None:
        self._keep.append(callback)
        handle = ctypes.c_size_t()
        status = b.hook_add(
            ctypes.c_void_p(self.engine), ctypes.byref(handle), kind, callback, None, b.u64(1), b.u64(0)
        )
        b.check(status, "uc_hook_add")

    def _fill(self, _engine: int, page: int, _access: int, entry: ctypes.Array[b.u64], _data: int) -> bool:
        entry[0], entry[1] = page, b.PERM_ALL
        return PROBE_PAGE <= page < PROBE_PAGE + 8192

    def stop_at_stores(self) -> None:
        """Ask the engine to stop whenever it has stored something."""
        self._hook(b.HOOK_MEMORY_WRITE, b.MemoryAccess(lambda *_: b.emu_stop(self.engine)))

    def write(self, register: int, value: int) -> None:
        """Set a register."""
        b.check(b.reg_write(self.engine, register, ctypes.byref(b.u64(value))), "uc_reg_write")

    def read(self, register: int) -> int:
        """A register."""
        value = b.u64()
        b.check(b.reg_read(self.engine, register, ctypes.addressof(value)), "uc_reg_read")
        return value.value

    def run(self, code: bytes, at: int) -> None:
        """Put code at an address and run it."""
        ctypes.memmove(ctypes.addressof(self.code) + at - PROBE_PAGE, code, len(code))
        b.emu_start(self.engine, at, 0, 0, 0)

    def save(self) -> None:
        """Save the engine into the context."""
        b.check(b.context_save(self.engine, self.context), "uc_context_save")

    def at(self, offset: int, kind: type[ctypes.c_uint64 | ctypes.c_uint32 | ctypes.c_int32] = b.u64) -> int:
        """A field of the context."""
        assert self.context.value is not None
        return int(kind.from_address(self.context.value + offset).value)


def verify() -> None:
    """Check every offset against a live engine; raises ``EngineError`` that names what is out of place.

    Takes about 15 ms. Called once a process, before the first vCPU is made.
    """
    b.require_known_release()
    probe = Probe()
    try:
        size = b.context_size(probe.engine)
        if size != CONTEXT_SIZE:
            raise EngineError(f"a Unicorn context has {size} bytes here, not {CONTEXT_SIZE}: unknown build")
        wrong = [name for name, good in _observations(probe) if not good]
    finally:
        probe.close()
    if wrong:
        raise EngineError(f"Unicorn's context keeps {', '.join(wrong)} elsewhere than known: unknown build")


def _observations(probe: Probe) -> list[tuple[str, bool]]:
    """(what, found where it should be) for each field."""
    marks = {b.REG_RSP: 0x1111_2222_3333_0008, b.REG_RDX: 0x5555_6666_7777_0010}
    for register, value in marks.items():
        probe.write(register, value)
    probe.write(b.REG_RFLAGS, 0x8D7)
    for index, offset in _MSRS.items():
        msr = b.Msr(index, 0x0123_4500 + offset)
        b.check(b.reg_write(probe.engine, b.REG_MSR, ctypes.byref(msr)), "uc_reg_write")
    probe.save()
    seen = [
        ("RSP", probe.at(GPRS + 32) == marks[b.REG_RSP]),
        ("RDX", probe.at(GPRS + 16) == marks[b.REG_RDX]),
        ("the SYSCALL MSRs", all(probe.at(o) & 0xFFFF_FFFF == 0x0123_4500 + o for o in _MSRS.values())),
        ("CR0", probe.at(CONTROL) & 1 == 1),
        ("EFER", probe.at(EFER) & 0x500 == 0x500),
        ("the lazy flags", (probe.at(CC_SRC), probe.at(CC_OP, ctypes.c_uint32)) == (0x8D5, 1)),
        ("the hidden flags", probe.at(HFLAGS, ctypes.c_uint32) & _LONG_MODE == _LONG_MODE),
    ]
    probe.run(b"\x66\xb8\x28\x00\x8e\xd8", PROBE_PAGE)  # mov ax, 0x28; mov ds, ax: #GP(0x28) with an empty GDT
    probe.save()
    seen += [
        ("the error code", probe.at(ERROR_CODE, ctypes.c_uint32) == 0x28),
        ("the software-interrupt flag", probe.at(EXCEPTION_IS_INT, ctypes.c_uint32) == 0),
        ("the last exception", probe.at(OLD_EXCEPTION, ctypes.c_int32) == 13),
        ("RIP", probe.at(RIP) == PROBE_PAGE + 4),
    ]
    ctypes.c_int32.from_address((probe.context.value or 0) + OLD_EXCEPTION).value = -1
    b.context_restore(probe.engine, probe.context)
    # lidt and lgdt from the second page, mov dr0/cr2, then int 0x80
    probe.run(
        b"\x0f\x01\x1c\x25\x80\x20\x00\x00\x0f\x01\x14\x25\x90\x20\x00\x00"
        b"\xb8\x21\x43\x00\x00\x0f\x23\xc0\x0f\x22\xd0\xcd\x80".ljust(0x80, b"\x90")
        + (0x765).to_bytes(2, "little") + (0xABCDE000).to_bytes(8, "little") + bytes(6)
        + (0x567).to_bytes(2, "little") + (0xBCDEF000).to_bytes(8, "little"),
        PROBE_PAGE + 4096,
    )
    probe.save()
    gdtr, idtr = SEGMENTS + 8 * SEGMENT_SIZE, SEGMENTS + 9 * SEGMENT_SIZE
    seen += [
        ("the software-interrupt flag", probe.at(EXCEPTION_IS_INT, ctypes.c_uint32) == 1),
        ("IDTR", (probe.at(idtr + 8), probe.at(idtr + 16, ctypes.c_uint32)) == (0xABCDE000, 0x765)),
        ("GDTR", (probe.at(gdtr + 8), probe.at(gdtr + 16, ctypes.c_uint32)) == (0xBCDEF000, 0x567)),
        ("DR0", probe.at(DEBUG) == 0x4321),
        ("CR2", probe.at(CONTROL + 16) == 0x4321),
    ]
    return seen


def live_state(engine: int, context: int) -> int | None:
    """Where an engine keeps its processor state while it runs; None if that cannot be found for certain.

    ``context`` is a context just saved from the engine. The answer is an address such that the offsets above apply
    to it. Pointers are followed through a file, so that a wrong one is an error and not a crash, and the place found
    must hold exactly what the context holds.
    """
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:  # noqa: PTH123 - needs no buffering
            cpu = _pointer(memory, engine + _CPU_POINTER)
            state = _pointer(memory, cpu + _ENV_POINTER)
            memory.seek(state)
            found = memory.read(OLD_EXCEPTION - _ENV)
    except (OSError, OverflowError, ValueError):
        return None
    wanted = ctypes.string_at(context + _ENV, OLD_EXCEPTION - _ENV)
    return state - _ENV if found == wanted else None


def _pointer(memory: io.RawIOBase, address: int) -> int:
    memory.seek(address)
    return int.from_bytes(memory.read(8) or b"", "little")
