"""The stepping engine: exactly one instruction, fetched from a latched copy of its page.

It never runs more than one instruction at a time, so it needs no trust in cached blocks (quirk "count-one"), and
its write hook slows nobody down. Instruction bytes come from *latched copies*: the frame itself may be writable
during the step, and no host page is ever writable and executable at once.
"""

from __future__ import annotations

from vmm.cpu import binding as b
from vmm.cpu.context import Context
from vmm.cpu.engine import DEVICES_BASE, PRIVATE_BASE, PRIVATE_PAGES, Engine, Environment, Stop
from vmm.memory import PAGE, GuestMemory

_HLT_SLOT = PRIVATE_PAGES - 1


class SteppingEngine(Engine):
    """Executes one instruction and lists the guest memory that it wrote."""

    def __init__(self, memory: GuestMemory) -> None:
        #: (host address, size in bytes) of each store of the last step, in order; a store that straddles a page
        #: is there once, with the address of its first byte.
        self.writes: list[tuple[int, int]] = []
        #: The same for loads, each behind the number of stores before it; empty unless ``wants_reads``.
        self.reads: list[tuple[int, int, int]] = []
        #: (GPA, bytes, value, whether it is a store) of each access of the last step to a device, in order. Loads have
        #: got their value from it; stores are for whoever knows that the instruction is complete.
        self.device_accesses: list[tuple[int, int, int, bool]] = []
        #: Whether loads are to be listed, too, from the next step on. Once that is so it stays so.
        self.wants_reads = False
        self._hears_reads = False
        self._slots: dict[int, int] = {}  # page -> slot of its last copy
        self._owners: dict[int, int] = {}  # and back
        self._latched: dict[int, bytes] = {}
        self._next_slot = 0
        #: Slots that the current step fetches from.
        self._in_use: set[int] = set()
        super().__init__(memory)
        self._private.write(_HLT_SLOT * PAGE, b"\xf4" * PAGE)

    def _add_hooks(self) -> None:
        super()._add_hooks()
        self._hook(b.HOOK_MEMORY_WRITE, b.MemoryAccess(self._on_write))

    def step(self, context: Context) -> Stop:
        """Execute one instruction (one iteration of a REP) from ``context``, which then holds the state after it.

        On any stop but ``STEPPED`` and ``INTERRUPT`` by a software interrupt, nothing of the instruction is done.
        HLT counts as stepped; whoever asks for the step knows the instruction.
        """
        if self.wants_reads and not self._hears_reads:
            self._hear_reads()
        self.writes.clear()
        self.reads.clear()
        self.device_accesses.clear()
        self._in_use.clear()
        self.flush_tlb()
        self._start(context, 1, b.emu_step)
        return self.stop or Stop.STEPPED

    def rehearse(self, context: Context) -> tuple[Stop, Context]:
        """Execute one instruction as ``step`` does, into a context of its own; no device and no clock hears of it.

        What it does to memory is the caller's to undo. IN, OUT, CPUID and RDTSC end in ``Stop.EXACT``. Loads from
        devices get their values, which changes nothing.
        """
        scratch = context.copy(self.handle)
        before, self.environment = self.environment, _Nobody(self.environment)
        try:
            return self.step(scratch), scratch
        finally:
            self.environment = before

    def latch(self, hpa: int, patch: tuple[int, bytes] | None = None) -> int:
        """The host address of an up-to-date copy of the page at ``hpa``, for fetching from.

        ``patch`` replaces bytes of the copy: (offset in the page, bytes). Changed contents get a new place: the
        engine asks for the second page of an instruction when it has already chosen a translation by its first.
        """
        content = self._memory.read(hpa, PAGE)
        if patch is not None:
            offset, data = patch
            content = content[:offset] + data + content[offset + len(data) :]
        slot = self._slots.get(hpa)
        if slot is None or self._latched[slot] != content:
            slot = self._take_slot(hpa)
            self._latched[slot] = content
            self._private.write(slot * PAGE, content)
            self.forget(PRIVATE_BASE + slot * PAGE, PAGE)
        self._in_use.add(slot)
        return PRIVATE_BASE + slot * PAGE

    @property
    def nothing(self) -> int:
        """The host address of a page that holds nothing but HLT, for fetches that must not reach the guest."""
        return PRIVATE_BASE + _HLT_SLOT * PAGE

    def _take_slot(self, hpa: int) -> int:
        slot = self._next_slot
        while slot in self._in_use:
            slot = (slot + 1) % _HLT_SLOT
        self._next_slot = (slot + 1) % _HLT_SLOT
        owner = self._owners.get(slot)
        if owner is not None and self._slots.get(owner) == slot:
            del self._slots[owner]
        self._owners[slot] = hpa
        self._slots[hpa] = slot
        return slot

    def map_device(self, gpa: int, size: int) -> None:
        """Make devices of guest-physical pages, for fills that answer with their place from ``DEVICES_BASE`` on."""

        def on_read(_engine: int, offset: int, length: int, _data: int) -> int:
            return self._on_device_read(gpa + offset, length)

        def on_write(_engine: int, offset: int, length: int, value: int, _data: int) -> None:
            self._on_device_write(gpa + offset, length, value)

        read, write = b.DeviceRead(on_read), b.DeviceWrite(on_write)
        self._keep += [read, write]
        status = b.mmio_map(self.handle, DEVICES_BASE + gpa, size, read, None, write, None)
        b.check(status, "uc_mmio_map")

    def _on_device_read(self, gpa: int, size: int) -> int:
        if self._saved is not None or self.failure is not None:
            return 0
        try:
            value = self.environment.device_read(gpa, size)
        except BaseException as failure:  # noqa: BLE001 - raised after the stop
            self._fail_before_instruction(failure)
            return 0
        self.device_accesses.append((gpa, size, value, False))
        return value

    def _on_device_write(self, gpa: int, size: int, value: int) -> None:
        self.device_accesses.append((gpa, size, value & (1 << 8 * size) - 1, True))

    def _hear_reads(self) -> None:
        """Have loads reported. What was translated before (quirk "late-hook") does not do that."""
        self._hears_reads = True
        self._hook(b.HOOK_MEMORY_READ, b.MemoryAccess(self._on_read))
        self.forget(PRIVATE_BASE, PRIVATE_PAGES * PAGE)

    def _on_read(self, _engine: int, _access: int, hpa: int, size: int, _value: int, _data: int) -> None:
        self.reads.append((len(self.writes), hpa, size))

    def _on_write(self, _engine: int, _access: int, hpa: int, size: int, _value: int, _data: int) -> None:
        self.writes.append((hpa, size))


class _Nobody:
    """The environment of a rehearsal: whatever an instruction wants of it but to look, it has to stop."""

    def __init__(self, environment: Environment) -> None:
        self.device_read = environment.device_read

    def port_in(self, _port: int, _size: int) -> int | None:
        return None

    def port_out(self, _port: int, _size: int, _value: int) -> bool:
        return False

    def cpuid(self, _leaf: int, _subleaf: int) -> bool:
        return False

    def timestamp(self, *, with_processor_id: bool) -> int | None:  # noqa: ARG002 - as the protocol has it
        return None
