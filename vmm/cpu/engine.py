"""One Unicorn engine over the guest memory: what the free-running and the stepping engine have in common.

An engine knows nothing of guests, EPT or traps. It asks its ``Environment`` to fill its TLB, to do port I/O and
to tell the time; it reports why it stopped as a ``Stop``. Every workaround of a Unicorn quirk in here names the
entry of docs/unicorn-quirks.md that explains it.
"""

from __future__ import annotations

import ctypes
import enum
import secrets
from collections.abc import Callable
from typing import Any, Final, Protocol

from vmm.cpu import binding as b
from vmm.cpu.context import Context
from vmm.cpu.features import CpuidAnswer
from vmm.cpu.fill_table import FillTable
from vmm.cpu.live import LiveState
from vmm.memory import PAGE, GuestMemory

READ: Final = b.ACCESS_READ
WRITE: Final = b.ACCESS_WRITE
FETCH: Final = b.ACCESS_FETCH

R: Final = b.PERM_READ
W: Final = b.PERM_WRITE
X: Final = b.PERM_EXEC

PAGE_MASK: Final = ~(PAGE - 1)

#: Host-physical place of the engine's own pages (latched fetch pages), far above any guest memory.
PRIVATE_BASE: Final = 1 << 40
PRIVATE_PAGES: Final = 64
#: Host-physical place of guest-physical address 0, as far as pages are devices; above everything else.
DEVICES_BASE: Final = 1 << 41

#: Bytes of translated code that an engine keeps. Dead translations count until the engine, out of room, drops all of
#: them; so this bounds what a guest that patches itself for ever can take of the host's memory.
CODE_BUFFER: Final = 32 << 20

_MODE_BITS: Final = (1 << 64) - 1


class Stop(enum.Enum):
    """Why an engine stopped. RIP is exact in every case."""

    REFUSED = "a TLB fill was refused; nothing of the instruction has happened"
    INTERRUPT = "an exception (RIP at it) or a software interrupt (RIP after it)"
    INVALID = "an invalid instruction, or one that the engine does not know (VMCALL)"
    SYSCALL = "SYSCALL; nothing of it has happened"
    SYSENTER = "SYSENTER; nothing of it has happened"
    HALT = "HLT; RIP after it"
    EXACT = "IN, OUT, CPUID or RDTSC that wants a boundary before it; nothing of it has happened"
    ASKED = "somebody asked for it, at an instruction boundary"
    STEPPED = "the one instruction is complete"


class Environment(Protocol):
    """What an engine needs of the machine around it."""

    def port_in(self, port: int, size: int) -> int | None:
        """The value that IN reads; None to stop before the instruction."""

    def port_out(self, port: int, size: int, value: int) -> bool:
        """Do an OUT; False to stop before the instruction."""

    def cpuid(self, leaf: int, subleaf: int) -> CpuidAnswer | bool:
        """What CPUID says, or True for the engine's own answer; False to stop before the instruction."""

    def timestamp(self, *, with_processor_id: bool) -> int | None:
        """The value that RDTSC or RDTSCP reads; None to stop before the instruction."""

    def device_read(self, gpa: int, size: int) -> int:
        """The value that a load from a device gets."""


class Engine:
    """A Unicorn engine in virtual-TLB mode, its hooks, and how it is started and stopped."""

    def __init__(self, memory: GuestMemory) -> None:
        pointer = ctypes.c_void_p()
        b.check(b.open_engine(b.ARCH_X86, b.MODE_64, ctypes.byref(pointer)), "uc_open")
        assert pointer.value is not None
        self.handle: Final = pointer.value
        #: Whether it has not been closed.
        self.open = True
        self._pointer = pointer
        self.environment: Environment
        #: Translates a linear page for an access (READ, WRITE, FETCH): host address | permissions, or 0 to refuse.
        self.fill: Callable[[int, int], int]
        self.stop: Stop | None = None
        #: What a callback raised; ``run`` and ``step`` raise it after the stop.
        self.failure: BaseException | None = None
        self._memory = memory
        self._private = GuestMemory(PRIVATE_PAGES * PAGE)
        self._keep: list[object] = []
        # The window (quirk "remove-cache"): linear addresses that only this object knows and that no guest can
        # use, because they are not canonical; a guest cannot guess them either.
        self._window: Final = (1 << 63) + secrets.randbits(46) * PAGE
        self._window_open = False
        #: The context that a stop in the middle of a block was saved into, None if the engine itself holds the state.
        self._saved: Context | None = None
        self._context: Context | None = None
        self._scratch = b.u64()
        self._scratch_at = ctypes.addressof(self._scratch)
        handle = ctypes.c_void_p(self.handle)
        b.check(b.ctl(handle, b.CTL_CODE_BUFFER, ctypes.c_uint32(CODE_BUFFER)), "uc_ctl")
        b.check(b.ctl(handle, b.CTL_TLB_VIRTUAL, b.TLB_VIRTUAL), "uc_ctl")
        b.check(b.ctl(handle, b.CTL_USE_EXITS, 1), "uc_ctl")
        for base, area in ((0, memory), (PRIVATE_BASE, self._private)):
            status = b.mem_map_ptr(self.handle, base, area.size, b.PERM_ALL, area.address)
            b.check(status, "uc_mem_map_ptr")
        self.fills: Final = FillTable(b.TlbFill(self._on_fill))
        self._hook(b.HOOK_TLB_FILL, self.fills.callback, user_data=self.fills.user_data)
        self._prime()
        self.live: Final = LiveState(self.handle)
        self._add_hooks()

    def close(self) -> None:
        """Give the engine's memory back; it cannot be started any more."""
        if self.open:
            self.open = False
            b.close_engine(self.handle)
            self.fills.retire()

    def __del__(self) -> None:
        if getattr(self, "open", False) and b is not None:
            self.close()

    # Starting and stopping

    def ask_to_stop(self) -> None:
        """Stop at the next boundary. From a callback this is exact; from another thread it ends the machine."""
        b.emu_stop(self.handle)

    def flush_tlb(self) -> None:
        """Forget all cached translations of addresses (INVEPT and INVVPID of this engine)."""
        if self.open:
            b.ctl(self._pointer, b.CTL_FLUSH_TLB)

    def forget(self, hpa: int, size: int) -> None:
        """Remove every translated block that overlaps [hpa, hpa + size), whatever its linear address.

        The range must lie in one mapping (guest memory or private pages).
        """
        if not self.open:
            return
        start = self._window + hpa
        self._window_open = True
        b.ctl(self._pointer, b.CTL_REMOVE_CACHE, b.u64(start), b.u64(start + size))
        self._window_open = False

    def _start(self, context: Context, count: int, start: Any) -> None:
        self.stop = None
        self._saved = None
        self.fills.suspend(on=False)
        self._context = context
        handle, pointer = self.handle, context.pointer
        b.context_restore(handle, pointer)
        start(handle, context.rip, 0, 0, count)
        if self.stopped_inside_block:
            self.flush_tlb()
        else:
            b.context_save(handle, pointer)
        context.forget_exception()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    @property
    def stopped_inside_block(self) -> bool:
        """Whether the last run was stopped before an instruction in the middle of a block."""
        return self._saved is not None

    def _stop_before_instruction(self, why: Stop) -> None:
        """Stop a block in its middle, exactly before the instruction whose callback this is (quirk "stop-in-out").

        The engine would go on to the end of the block. The state is right at this moment, so it is saved here;
        what the rest of the block does to registers is thrown away, and it cannot touch memory: the TLB is empty
        and every fill is refused.
        """
        assert self._context is not None
        self._context.save_from(self.handle)
        self._context.settle_flags()
        self._saved = self._context
        self.fills.suspend(on=True)
        self.stop = why
        self.flush_tlb()
        self.ask_to_stop()

    # The state of the running guest, for callbacks

    @property
    def pc(self) -> int:
        """The linear address of the instruction that the running engine is at."""
        assert self._context is not None
        return self._context.code_base + self.register(b.REG_RIP) & 0xFFFF_FFFF_FFFF_FFFF

    def register(self, number: int) -> int:
        """A register of the running engine, by its Unicorn number."""
        self._scratch.value = 0
        b.reg_read(self.handle, number, self._scratch_at)
        return self._scratch.value

    # Hooks

    def _hook(
        self, kind: int, callback: object, instruction: int | None = None, user_data: object = None
    ) -> None:
        self._keep.append(callback)
        handle = ctypes.c_size_t()
        arguments: list[Any] = [ctypes.c_void_p(self.handle), ctypes.byref(handle), kind, callback, user_data]
        arguments += [b.u64(1), b.u64(0)]
        if instruction is not None:
            arguments.append(ctypes.c_int(instruction))
        b.check(b.hook_add(*arguments), "uc_hook_add")

    def _add_hooks(self) -> None:
        self._hook(b.HOOK_INTERRUPT, b.Interrupt(self._on_interrupt))
        self._hook(b.HOOK_INVALID_INSTRUCTION, b.InvalidInstruction(self._on_invalid))
        for number, callback in (
            (b.INSN_IN, b.PortIn(self._on_in)),
            (b.INSN_OUT, b.PortOut(self._on_out)),
            (b.INSN_CPUID, b.Instruction(self._on_cpuid)),
            (b.INSN_RDTSC, b.Instruction(self._on_rdtsc)),
            (b.INSN_RDTSCP, b.Instruction(self._on_rdtscp)),
            (b.INSN_SYSCALL, b.Instruction(self._on_syscall)),
            (b.INSN_SYSENTER, b.Instruction(self._on_sysenter)),
        ):
            self._hook(b.HOOK_INSTRUCTION, callback, number)

    def _prime(self) -> None:
        """Let the engine return from one block (quirk "first-edge"): only then does it report translations."""
        self._window_open = True
        self._private.write(0, b"\xeb\x00\xf4")  # jmp +0; hlt
        b.emu_start(self.handle, self._window + PRIVATE_BASE, 0, 0, 0)
        self._window_open = False
        self.forget(PRIVATE_BASE, PAGE)

    def _fail(self, failure: BaseException) -> None:
        self.failure = failure
        self.ask_to_stop()

    def _fail_before_instruction(self, failure: BaseException) -> None:
        """As if the instruction whose callback this is had not been reached: the machine can go on from there."""
        self.failure = failure
        self._stop_before_instruction(Stop.ASKED)

    def _on_fill(self, _engine: int, page: int, access: int, entry: Any, _data: int) -> bool:
        if self._window_open:
            entry[0], entry[1] = page - self._window, X
            return True
        if self._saved is not None:
            return False
        try:
            answer = self.fill(page, access)
        except BaseException as failure:  # noqa: BLE001 - ctypes would swallow it; raised after the stop
            self.failure = failure
            return False
        if not answer:
            self.stop = Stop.REFUSED
            return False
        entry[0], entry[1] = answer & PAGE_MASK & _MODE_BITS, answer & 7
        return True

    def _on_interrupt(self, _engine: int, vector: int, _data: int) -> None:
        if self._saved is None:
            assert self._context is not None
            self.stop, self._context.vector = Stop.INTERRUPT, vector
        self.ask_to_stop()

    def _on_invalid(self, _engine: int, _data: int) -> bool:
        if self._saved is None:
            self.stop = Stop.INVALID
        self.ask_to_stop()
        return True

    def _on_in(self, _engine: int, port: int, size: int, _data: int) -> int:
        if self._saved is not None or self.failure is not None:
            return 0
        try:
            value = self.environment.port_in(port, size)
        except BaseException as failure:  # noqa: BLE001 - raised after the stop
            self._fail_before_instruction(failure)
            return 0
        if value is None:
            self._stop_before_instruction(Stop.EXACT)
            return 0
        return value

    def _on_out(self, _engine: int, port: int, size: int, value: int, _data: int) -> None:
        if self._saved is not None or self.failure is not None:
            return
        try:
            done = self.environment.port_out(port, size, value & (1 << 8 * size) - 1)
        except BaseException as failure:  # noqa: BLE001 - raised after the stop
            self._fail_before_instruction(failure)
            return
        if not done:
            self._stop_before_instruction(Stop.EXACT)

    def _on_cpuid(self, _engine: int, _data: int) -> int:
        if self._saved is not None or self.failure is not None:
            return 0
        leaf, subleaf = self.register(b.REG_RAX), self.register(b.REG_RCX)
        try:
            answer = self.environment.cpuid(leaf & 0xFFFF_FFFF, subleaf & 0xFFFF_FFFF)
        except BaseException as failure:  # noqa: BLE001 - raised after the stop
            self._fail_before_instruction(failure)
            return 0
        if answer is False:
            self._stop_before_instruction(Stop.EXACT)
        elif answer is not True:
            for register, value in zip((b.REG_RAX, b.REG_RBX, b.REG_RCX, b.REG_RDX), answer, strict=True):
                self._set(register, value)
            return 1
        return 0

    def _on_rdtsc(self, _engine: int, _data: int) -> int:
        return self._time(with_processor_id=False)

    def _on_rdtscp(self, _engine: int, _data: int) -> int:
        return self._time(with_processor_id=True)

    def _time(self, *, with_processor_id: bool) -> int:
        if self._saved is not None or self.failure is not None:
            return 1
        try:
            value = self.environment.timestamp(with_processor_id=with_processor_id)
        except BaseException as failure:  # noqa: BLE001 - raised after the stop
            self._fail_before_instruction(failure)
            return 1
        if value is None:
            self._stop_before_instruction(Stop.EXACT)
            return 1
        self._set(b.REG_RAX, value & 0xFFFF_FFFF)
        self._set(b.REG_RDX, value >> 32 & 0xFFFF_FFFF)
        if with_processor_id:
            self._set(b.REG_RCX, 0)
        return 1

    def _set(self, number: int, value: int) -> None:
        b.reg_write(self.handle, number, ctypes.byref(b.u64(value)))

    def _on_syscall(self, _engine: int, _data: int) -> int:
        if self._saved is None:
            self._stop_before_instruction(Stop.SYSCALL)
        return 1

    def _on_sysenter(self, _engine: int, _data: int) -> int:
        if self._saved is None:
            self._stop_before_instruction(Stop.SYSENTER)
        return 1
