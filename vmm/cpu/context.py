"""The state of a vCPU between two runs of an engine: what the guest-state area is to a VMCS.

A ``Context`` is Unicorn's saved context with typed access on top. Saving an engine into it and restoring it into
another moves the whole processor (0.6 us each way); the fields are read in place. SDM names throughout.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Final, get_args

from vmm.cpu import binding as b
from vmm.cpu import layout as at
from vmm.cpu.early_flags import ARITHMETIC
from vmm.cpu.state import Segment, SegmentName
from vmm.errors import OptionError

GPR_NAMES: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
#: What ``Context.set_register`` sets: the registers that have no hidden part.
SETTABLE: Final = frozenset({*GPR_NAMES, "rip", "rflags", "cr2", "cr3", *(f"xmm{i}" for i in range(16))})
SEGMENT_NAMES: Final[tuple[SegmentName, ...]] = get_args(SegmentName)

CR0_PE: Final = 1
CR0_PG: Final = 1 << 31
EFER_LMA: Final = 1 << 10
RFLAGS_RF: Final = 1 << 16
RFLAGS_VM: Final = 1 << 17
#: All of RFLAGS but VM, which goes with segments of another sort.
RFLAGS_SETTABLE: Final = 0x3D_7FD7
#: The flags that translations depend on: TF, IOPL, RF, VM, AC.
EFLAGS_IN_MODE: Final = 0x73100
_AR_DB: Final = 1 << 14
_AR_L: Final = 1 << 13
#: From ``layout.RIP`` on: RIP, hflags, CS base, CR0, CR3, CR4, EFER in one go.
_CS_BASE: Final = at.SEGMENTS + at.SEGMENT_SIZE + 8
_STEP_VIEW: Final = struct.Struct(
    f"<Q{at.HFLAGS - at.RIP - 8}xI{_CS_BASE - at.HFLAGS - 4}xQ{at.CONTROL - _CS_BASE - 8}xQ16xQQ"
    f"{at.EFER - at.CONTROL - 40}xQ"
).unpack_from


class _SegmentRegister(ctypes.Structure):
    _fields_ = (
        ("selector", ctypes.c_uint32),
        ("base", b.u64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class Context:
    """The architectural state of one vCPU (implements ``vmm.cpu.state.CpuState``).

    Integers go in and come out unsigned. RFLAGS is computed on each read, since the engine keeps the arithmetic
    flags lazily; everything else is a memory access.
    """

    def __init__(self, engine: int) -> None:
        pointer = ctypes.c_void_p()
        b.check(b.context_alloc(engine, ctypes.byref(pointer)), "uc_context_alloc")
        assert pointer.value is not None
        self.pointer: Final = pointer.value
        self.save_from(engine)
        #: Vector of the exception or software interrupt that the last run or step stopped with.
        self.vector = 0
        base = self.pointer
        self._buffer = memoryview((ctypes.c_uint8 * at.CONTEXT_SIZE).from_address(base))
        self.gprs: Final = (b.u64 * 16).from_address(base + at.GPRS)
        self._rip = b.u64.from_address(base + at.RIP)
        self._hflags = ctypes.c_uint32.from_address(base + at.HFLAGS)
        self._all_flags = (ctypes.c_uint8 * (at.HFLAGS - at.EFLAGS)).from_address(base + at.EFLAGS)
        self._cc_src = b.u64.from_address(base + at.CC_SRC)
        self._cc_op = ctypes.c_uint32.from_address(base + at.CC_OP)
        self._eflags = ctypes.c_uint32.from_address(base + at.EFLAGS)
        self._segments = (_SegmentRegister * 10).from_address(base + at.SEGMENTS)
        self._control = (b.u64 * 5).from_address(base + at.CONTROL)
        self._efer = b.u64.from_address(base + at.EFER)
        self._debug = (b.u64 * 8).from_address(base + at.DEBUG)
        self._error_code = ctypes.c_uint32.from_address(base + at.ERROR_CODE)
        self._is_int = ctypes.c_uint32.from_address(base + at.EXCEPTION_IS_INT)
        self._old_exception = ctypes.c_int32.from_address(base + at.OLD_EXCEPTION)
        self._scratch = b.u64()
        self._scratch_at = ctypes.addressof(self._scratch)

    def __del__(self) -> None:
        pointer = getattr(self, "pointer", None)
        if pointer is not None and b is not None:
            b.context_free(pointer)

    def save_from(self, engine: int) -> None:
        """Take over the state of an engine."""
        b.context_save(engine, self.pointer)

    def copy(self, engine: int) -> Context:
        """The same state, for an engine that is not running and whose own is of no value."""
        b.context_restore(engine, self.pointer)
        return Context(engine)

    # Instruction pointer, general registers, flags

    @property
    def rip(self) -> int:
        """Instruction pointer (the offset in the code segment, as the RIP register has it)."""
        return self._rip.value

    @rip.setter
    def rip(self, value: int) -> None:
        self._rip.value = value

    @property
    def pc(self) -> int:
        """The linear address of the next instruction: CS base + RIP."""
        base: int = self._segments[1].base
        return self._rip.value if not base else base + self._rip.value & 0xFFFF_FFFF

    @property
    def code_base(self) -> int:
        """Base of the code segment (0 in 64-bit mode)."""
        return self.segment_base(1)

    @property
    def rsp(self) -> int:
        """Stack pointer."""
        return self.gprs[4]

    @rsp.setter
    def rsp(self, value: int) -> None:
        self.gprs[4] = value

    @property
    def rcx(self) -> int:
        """RCX."""
        return self.gprs[1]

    @rcx.setter
    def rcx(self, value: int) -> None:
        self.gprs[1] = value

    @property
    def r11(self) -> int:
        """R11."""
        return self.gprs[11]

    @r11.setter
    def r11(self, value: int) -> None:
        self.gprs[11] = value

    @property
    def rflags(self) -> int:
        """RFLAGS with bit 1 set."""
        return self.read(b.REG_RFLAGS)

    @rflags.setter
    def rflags(self, value: int) -> None:
        self.write(b.REG_RFLAGS, value)

    def end_resume(self) -> None:
        """Clear RF, as an instruction that completes does; the engine does it at the end of a block only."""
        self.rflags &= ~RFLAGS_RF

    def settle_flags(self) -> None:
        """Make RFLAGS whole in a state that was saved in the middle of a block (quirk "flags-in-hook").

        There the arithmetic flags and DF are still spread over the engine's lazy fields, and starting from such a
        state would lose them.
        """
        self.rflags = self.rflags

    @property
    def raw_flags(self) -> bytes:
        """RFLAGS as the engine keeps it, with what it computes the arithmetic flags from; to be given back."""
        return bytes(self._all_flags)

    @raw_flags.setter
    def raw_flags(self, value: bytes) -> None:
        ctypes.memmove(self._all_flags, value, len(self._all_flags))

    @property
    def flag_operation(self) -> int:
        """Which operation CC_DST, CC_SRC and CC_SRC2 belong to: QEMU's CC_OP."""
        return self._cc_op.value

    @property
    def flags_may_be_computed(self) -> bool:
        """Whether CC_SRC could be arithmetic flags, and not an operand."""
        return not self._cc_src.value & ~ARITHMETIC

    def recover_flags(self) -> None:
        """Take the arithmetic flags from where an interrupted instruction left them (quirk "early-flags")."""
        flags = self._cc_src.value & ARITHMETIC
        self.rflags = self.rflags & ~ARITHMETIC | flags

    # Control, debug and model-specific registers

    @property
    def cr0(self) -> int:
        """CR0."""
        return self._control[0]

    @cr0.setter
    def cr0(self, value: int) -> None:
        self._control[0] = value

    @property
    def cr2(self) -> int:
        """CR2, the page-fault linear address."""
        return self._control[2]

    @cr2.setter
    def cr2(self, value: int) -> None:
        self._control[2] = value

    @property
    def cr3(self) -> int:
        """CR3."""
        return self._control[3]

    @cr3.setter
    def cr3(self, value: int) -> None:
        self._control[3] = value

    @property
    def cr4(self) -> int:
        """CR4."""
        return self._control[4]

    @cr4.setter
    def cr4(self, value: int) -> None:
        self._control[4] = value

    @property
    def efer(self) -> int:
        """IA32_EFER."""
        return self._efer.value

    @efer.setter
    def efer(self, value: int) -> None:
        self._efer.value = value

    @property
    def dr6(self) -> int:
        """DR6."""
        return self._debug[6]

    @dr6.setter
    def dr6(self, value: int) -> None:
        self._debug[6] = value

    @property
    def dr7(self) -> int:
        """DR7."""
        return self._debug[7]

    @dr7.setter
    def dr7(self, value: int) -> None:
        self._debug[7] = value

    def syscall_msr(self, offset: int) -> int:
        """One of IA32_STAR, LSTAR, CSTAR, FMASK by its place in ``layout``."""
        return b.u64.from_address(self.pointer + offset).value

    # Segments

    @property
    def cpl(self) -> int:
        """Current privilege level."""
        return self._hflags.value & at.HF_CPL

    @property
    def gdtr(self) -> tuple[int, int]:
        """(linear base, limit in bytes - 1)."""
        register = self._segments[8]
        return register.base, register.limit

    @gdtr.setter
    def gdtr(self, value: tuple[int, int]) -> None:
        self._segments[8].base, self._segments[8].limit = value

    @property
    def idtr(self) -> tuple[int, int]:
        """(linear base, limit in bytes - 1)."""
        register = self._segments[9]
        return register.base, register.limit

    @idtr.setter
    def idtr(self, value: tuple[int, int]) -> None:
        self._segments[9].base, self._segments[9].limit = value

    def segment_base(self, index: int) -> int:
        """Base of ES, CS, SS, DS, FS or GS, by its number in instruction encodings (0 to 5)."""
        base: int = self._segments[index].base
        return base

    def segment(self, name: SegmentName) -> Segment:
        """The segment register with its hidden part."""
        register = self._segments[at.SEGMENT_ORDER.index(name)]
        return Segment(register.selector, register.base, register.limit, register.flags >> 8 & 0xF0FF)

    def set_segment(self, name: SegmentName, segment: Segment) -> None:
        """Load a segment register and its hidden part; CS and SS also set CPL and the operand sizes."""
        register = self._segments[at.SEGMENT_ORDER.index(name)]
        register.selector = segment.selector
        register.base = segment.base
        register.limit = segment.limit
        register.flags = (segment.access_rights & 0xF0FF) << 8
        self.refresh_hidden_flags(cpl=segment.dpl if name == "ss" else None)

    def refresh_hidden_flags(self, *, cpl: int | None = None) -> None:
        """Derive the engine's digest of mode and segments anew (QEMU's ``hflags``), keeping the rest of it."""
        flags = self._hflags.value
        if cpl is not None:
            flags = flags & ~at.HF_CPL | cpl
        cs, ss = self._segments[1].flags >> 8, self._segments[2].flags >> 8
        protected = self.cr0 & CR0_PE
        flags &= ~(at.HF_PE | at.HF_LMA | at.HF_CS64 | at.HF_CS32 | at.HF_SS32 | at.HF_ADDSEG)
        flags |= at.HF_PE if protected else 0
        flags |= at.HF_LMA if self.efer & EFER_LMA else 0
        if flags & at.HF_LMA and cs & _AR_L:
            self._hflags.value = flags | at.HF_CS64 | at.HF_CS32 | at.HF_SS32
            return
        flags |= at.HF_CS32 if cs & _AR_DB else 0
        flags |= at.HF_SS32 if ss & _AR_DB else 0
        flat = not any(self._segments[i].base for i in (0, 2, 3))
        if not protected or self.virtual_8086 or not flags & at.HF_CS32 or not flat:
            flags |= at.HF_ADDSEG
        self._hflags.value = flags

    @property
    def virtual_8086(self) -> bool:
        """Whether RFLAGS.VM is set (never in IA-32e mode)."""
        return not self.efer & EFER_LMA and bool(self.rflags & RFLAGS_VM)

    def step_view(self) -> tuple[int, tuple[int, int, int, int, bool], int]:
        """What a step starts from: linear address, (CR0, CR3, CR4, EFER, ring 3?), width of the code segment."""
        rip, hflags, code_base, cr0, cr3, cr4, efer = _STEP_VIEW(self._buffer, at.RIP)
        pc = code_base + rip & 0xFFFF_FFFF if code_base else rip
        bits = 64 if hflags & at.HF_CS64 else 32 if hflags & at.HF_CS32 else 16
        return pc, (cr0, cr3, cr4, efer, hflags & 3 == 3), bits

    # What is not architectural but decides how the guest goes on

    @property
    def mode_flags(self) -> int:
        """The engine's digest of CPU mode, which translations depend on."""
        return self._hflags.value | self._eflags.value & EFLAGS_IN_MODE

    @property
    def mode(self) -> str:
        """The CPU mode in words: long, compat-32, compat-16, protected-32, protected-16, real or virtual-8086."""
        return mode_name(self._hflags.value, virtual_8086=self.virtual_8086)

    @property
    def code_bits(self) -> int:
        """The width of the code segment: 16, 32 or 64."""
        flags = self._hflags.value
        return 64 if flags & at.HF_CS64 else 32 if flags & at.HF_CS32 else 16

    @property
    def in_shadow(self) -> bool:
        """Whether the last instruction was STI or loaded SS: no interrupt at this boundary."""
        return bool(self._hflags.value & at.HF_INHIBIT_IRQ)

    def end_shadow(self) -> None:
        """The instruction in the shadow is complete, or an event was delivered."""
        self._hflags.value &= ~at.HF_INHIBIT_IRQ

    @property
    def error_code(self) -> int:
        """The error code of the exception that the engine just stopped with."""
        return self._error_code.value & 0xFFFF

    @property
    def by_instruction(self) -> bool:
        """Whether the exception that the engine just stopped with is INT n, INT3 or INTO; RIP is after it."""
        return bool(self._is_int.value)

    def forget_exception(self) -> None:
        """Make the engine forget its last exception: it would turn the next unrelated one into a #DF."""
        self._old_exception.value = -1

    # Registers by number, through the interface

    def read(self, register: int) -> int:
        """A 64-bit (or narrower) register by its Unicorn number."""
        self._scratch.value = 0
        b.context_reg_read(self.pointer, register, self._scratch_at)
        return self._scratch.value

    def write(self, register: int, value: int) -> None:
        """Set a 64-bit (or narrower) register by its Unicorn number."""
        self._scratch.value = value
        b.context_reg_write(self.pointer, register, self._scratch_at)

    def read_xmm(self, index: int) -> int:
        """XMM0 to XMM15 as a 128-bit integer."""
        buffer = (ctypes.c_uint8 * 16)()
        b.context_reg_read(self.pointer, b.REG_XMM0 + index, ctypes.addressof(buffer))
        return int.from_bytes(buffer, "little")

    def write_xmm(self, index: int, value: int) -> None:
        """Set XMM0 to XMM15 from a 128-bit integer."""
        buffer = (ctypes.c_uint8 * 16)(*value.to_bytes(16, "little"))
        b.context_reg_write(self.pointer, b.REG_XMM0 + index, ctypes.addressof(buffer))

    def set_gpr(self, name: str, value: int) -> None:
        """Set a general register by its 64-bit name."""
        self.gprs[GPR_NAMES.index(name)] = value

    def set_register(self, name: str, value: int) -> None:
        """Set a register by its name in a state file: a general register, RIP, RFLAGS, CR2, CR3 or XMM.

        Raises ``OptionError`` for another one, and for a value that it cannot hold.
        """
        wide = name.startswith("xmm")
        if name not in SETTABLE or value >> (128 if wide else 64) or (name == "rflags" and value & ~RFLAGS_SETTABLE):
            fix = "set a general register, rip, rflags, cr2, cr3 or xmm to what it can hold"
            raise OptionError(f"{name[:20]!a} = {value:#x}", where="registers", fix=fix)
        if wide:
            self.write_xmm(int(name[3:]), value)
        elif name in GPR_NAMES:
            self.set_gpr(name, value)
        else:
            setattr(self, name, value)

    def snapshot(self) -> bytes:
        """The whole saved state, to be compared with a later one."""
        return bytes(self._buffer)

    def changed_since(self, before: bytes) -> dict[str, int]:
        """The registers, with their values now, that differ from those of a ``snapshot`` of this context."""
        now = self.snapshot()
        if now == before:
            return {}
        new = self.registers()
        ctypes.memmove(self.pointer, before, len(before))
        old = self.registers()
        ctypes.memmove(self.pointer, now, len(now))
        return {name: value for name, value in new.items() if value != old[name]}

    def registers(self) -> dict[str, int]:
        """Every architectural register by name, as a state file shows them."""
        out = dict(zip(GPR_NAMES, self.gprs, strict=True))
        out["rip"] = self.rip
        out["rflags"] = self.rflags
        for name in SEGMENT_NAMES:
            out[name] = self._segments[at.SEGMENT_ORDER.index(name)].selector
        out["fs_base"] = self._segments[4].base
        out["gs_base"] = self._segments[5].base
        out.update(cr0=self.cr0, cr2=self.cr2, cr3=self.cr3, cr4=self.cr4, efer=self.efer)
        out["mxcsr"] = self.read(b.REG_MXCSR) & 0xFFFF_FFFF
        out["fcw"] = self.read(b.REG_FCW) & 0xFFFF
        out["fsw"] = self.read(b.REG_FSW) & 0xFFFF
        for index in range(16):
            out[f"xmm{index}"] = self.read_xmm(index)
        return out


def mode_name(hflags: int, *, virtual_8086: bool = False) -> str:
    """The CPU mode that a digest stands for, in words."""
    if hflags & at.HF_CS64:
        return "long"
    if not hflags & at.HF_PE:
        return "real"
    if virtual_8086:
        return "virtual-8086"
    width = "32" if hflags & at.HF_CS32 else "16"
    return f"compat-{width}" if hflags & at.HF_LMA else f"protected-{width}"
