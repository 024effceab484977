"""What the stepping engine sees of memory while it executes one instruction, and what it does to it.

Fetches come from latched copies. Every page that the instruction writes is copied before its first store, so that the
change can be told and, if the guest faults half-way, undone.
"""

from __future__ import annotations

from typing import Final

from vmm.cpu.context import Context
from vmm.cpu.engine import DEVICES_BASE, FETCH, READ, WRITE, R, W, X
from vmm.cpu.stepping import SteppingEngine
from vmm.decode import MAX_LENGTH, Decoded, decode
from vmm.ept import CLEAN, HELD, MISCONFIGURED
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frames, FrameState
from vmm.mmu.instruction import CurrentInstruction
from vmm.mmu.refusals import Watched
from vmm.mmu.translation import LEAF_ADDRESS, PAGE_OFFSET, Control, Fill, Mmu
from vmm.paging import Translation

_NOT_FETCHED: Final = (FrameState.DATA, FrameState.WINDOW)


class StepMemory:
    """Memory as one stepped instruction of one vCPU has it."""

    def __init__(
        self, memory: GuestMemory, frames: Frames, context: Context, mmu: Mmu, instruction: CurrentInstruction
    ) -> None:
        #: Linear pages written: page -> (GPA page, host page).
        self.written: dict[int, tuple[int, int]] = {}
        #: Linear pages read, likewise; one that was written first may have been read, too.
        self.read: dict[int, tuple[int, int]] = {}
        #: Linear pages through which the instruction may reach a device: page -> permissions (R, W).
        self.devices: dict[int, int] = {}
        #: Whether accesses to frames are let through for which somebody is to be asked before.
        self.lets_through = False
        #: Contents of the frames written, from before.
        self.undo: dict[int, bytes] = {}
        self._memory = memory
        self._frames = frames
        self._context = context
        self._mmu = mmu
        self._instruction = instruction
        self._pc = self._page = 0
        self._control: Control = (0, 0, 0, 0, False)
        self._code = b""
        self._decoded: Decoded
        #: Linear page -> what is fetched there instead of the guest's bytes: (offset, bytes).
        self._patch: dict[int, tuple[int, bytes]] = {}

    @property
    def decoded(self) -> Decoded:
        """The instruction."""
        return self._decoded

    @property
    def pc(self) -> int:
        """The linear address of the instruction."""
        return self._pc

    def begin(self, *, arrived: bool) -> None:
        """The next fills are for the instruction at RIP.

        ``arrived`` is whether the free-running engine has just stopped there, so that what it fetched is what the
        guest's page tables say now.
        """
        self.written = {}
        self.read = {}
        self.undo = {}
        self.devices = {}
        self.lets_through = False
        pc, self._control, bits = self._context.step_view()
        self._pc, self._page = pc, pc & -PAGE
        if not arrived:
            self._mmu.forget_fetches(self._page)
        instruction = self._instruction
        self._code = instruction.bytes_at(pc)
        decoded = self._decoded = decode(self._code, bits)
        instruction.pin(pc, decoded)
        self._patch = {}
        code = decoded.correction or (self._code[: decoded.length] if instruction.held is not None else b"")
        if code:
            room = PAGE - (pc & PAGE_OFFSET)
            self._patch[self._page] = (pc & PAGE_OFFSET, code[:room])
            self._patch[self._page + PAGE] = (0, code[room:])

    def end(self) -> None:
        """The instruction is done with, one way or the other.

        A REP goes on with the bytes that it was fetched from, even if an iteration has overwritten them: a processor
        fetches a string instruction once.
        """
        instruction = self._instruction
        instruction.unpin()
        instruction.held = None
        if self._decoded.repeats and self.undo and self._context.pc == self._pc:
            length = self._decoded.length
            if instruction.bytes_at(self._pc)[:length] != self._code[:length]:
                instruction.held = (self._pc, self._code)

    def roll_back(self) -> None:
        """Nothing of the instruction has happened."""
        for hpa, before in self.undo.items():
            self._memory.write(hpa, before)
        self.undo.clear()

    def fills_of(self, engine: SteppingEngine) -> Fill:
        """What answers the stepping engine's fills."""
        side = self._mmu.fetch_side

        def fill(page: int, access: int) -> int:
            if access == FETCH and page != self._page and not self._reaches(page):
                return engine.nothing | X
            found = self._mmu.translate(self._control, page, access, engine)
            if found is None:
                return 0
            translation, leaf = found
            host = leaf & LEAF_ADDRESS
            if access == FETCH:
                if self._refuses_fetch(page, translation, leaf):
                    return 0
                if side is not None:
                    host = side.host(host)
                self._mmu.fetched(page, host)
                return engine.latch(host, self._patch.get(page) if self._patch else None) | X
            if (
                self._mmu.refuses(page, access, translation, leaf)
                or self._is_unjudged(page, access, translation.gpa, leaf)
                or self._is_unannounced(host)
            ):
                return self._reach_device(page, access, translation.gpa)
            if leaf & (CLEAN | HELD) and not self._mmu.used(page, access, translation.gpa, leaf):
                return 0
            if access == READ:
                self.read[page] = (translation.gpa, host)
                return host | R
            if side is not None:
                side.before_write(host, self._pc)
            self.written[page] = (translation.gpa, host)
            if host not in self.undo:
                self.undo[host] = self._memory.read(host, PAGE)
            return host | R | W

        return fill

    def _reach_device(self, page: int, access: int, gpa: int) -> int:
        """The answer to a fill that reaches no memory: a device, if the access was let through; 0 if it was not."""
        permissions = self.devices.get(page, 0)
        if not permissions & (W if access == WRITE else R):
            return 0
        place = gpa & LEAF_ADDRESS | DEVICES_BASE
        (self.written if access == WRITE else self.read)[page] = (gpa, place)
        return place | permissions

    def _is_unannounced(self, host: int) -> bool:
        """Whether somebody has to be asked about accesses to a frame first."""
        if self.lets_through or host not in self._mmu.announced:
            return False
        self._mmu.refusal = Watched()
        return True

    def _refuses_fetch(self, page: int, translation: Translation, leaf: int) -> bool:
        """Whether a page cannot be fetched, and is not code that is open for this very instruction."""
        executable = self._mmu.executable
        opened = leaf & executable == executable or self._is_opened_code(translation.gpa, leaf)
        if not opened and self._mmu.refuses(page, FETCH, translation, leaf):
            return True
        if leaf & HELD and not self._mmu.used(page, FETCH, translation.gpa, leaf):
            return True
        return self._is_unjudged(page, FETCH, translation.gpa, leaf)

    def _is_unjudged(self, page: int, access: int, gpa: int, leaf: int) -> bool:
        return self._mmu.judges and self._mmu.is_unjudged(self._control, page, access, gpa, leaf)

    def _is_opened_code(self, gpa: int, leaf: int) -> bool:
        if leaf in (0, MISCONFIGURED) or self._mmu.view.forbids(gpa, self._mmu.executable):
            return False
        frame = self._frames.at(leaf)
        return frame.state is FrameState.STEPPING and frame.resting not in _NOT_FETCHED

    def _reaches(self, page: int) -> bool:
        """Whether the instruction itself lies on a linear page other than the one that it starts on.

        The engine also asks for what comes after it (quirk "early-fetch"), which is none of the guest's doing yet.
        """
        end = self._pc + (self._decoded.length or MAX_LENGTH) - 1
        return page == self._page + PAGE and end & -PAGE == page
