"""Two-stage address translation for one vCPU: the guest's page tables, then the EPT.

This is what answers the engines' TLB fills. A fill that both stages allow gets exactly the permissions that both
allow; any other is refused, and the reason is kept in ``refusal`` for the VM exit that follows. Fills come at
moments that depend on the host (the engine resizes its TLB by the clock), so nothing that a run shows may depend
on how often they come: only refusals count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from attrs import define

from vmm.cpu.context import Context
from vmm.cpu.engine import FETCH, READ, WRITE, Engine, R, W, X
from vmm.cpu.free import FreeRunningEngine
from vmm.cpu.stepping import SteppingEngine
from vmm.decode import MAX_LENGTH, Decoded, MemoryOperand, decode
from vmm.ept import ExtendedPageTables
from vmm.errors import GuestError
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frame, Frames, FrameState
from vmm.paging import Access, EntryChanged, PageFault, PagingMode, Translation, is_canonical, walk

PAGE_OFFSET: Final = PAGE - 1
_LEAF_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
_ACCESS: Final = {READ: Access.READ, WRITE: Access.WRITE, FETCH: Access.FETCH}
_NEEDED: Final = {READ: R, WRITE: W, FETCH: X}
_NOT_FETCHED: Final = (FrameState.DATA, FrameState.WINDOW)
#: How many linear pages are remembered that code was fetched from.
MAX_FETCH_PAGES: Final = 1 << 16
#: CR0, CR3, CR4, EFER, and whether code runs in ring 3: what a translation depends on.
Control = tuple[int, int, int, int, bool]
#: Answers a fill: (linear page, access) -> host address | permissions, or 0 to refuse.
Fill = Callable[[int, int], int]


@define(slots=True, eq=False)
class GuestFault:
    """The guest's page tables do not allow the access: a #PF is due. ``page`` is linear."""

    page: int
    access: int
    error_code: int


@define(slots=True, eq=False)
class NonCanonical:
    """The linear address is not canonical: a #GP or #SS is due."""

    page: int
    access: int


@define(slots=True, eq=False)
class Violation:
    """The EPT does not allow the access: a VM exit is due.

    ``page`` is linear, ``gpa`` the page's (or, for a paging structure, the entry's) guest-physical address,
    ``leaf`` what the EPT said (0: nothing mapped), ``final`` false for an access to a paging structure.
    """

    page: int
    access: int
    gpa: int
    leaf: int
    final: bool


@define(slots=True, eq=False)
class Misconfiguration:
    """An EPT entry on the way has a setting that no processor supports (SDM vol. 3, 28.3.3.1): a VM exit is due."""

    page: int
    gpa: int


Refusal = GuestFault | NonCanonical | Violation | Misconfiguration


class PagingStructureViolation(Exception):  # noqa: N818 - a guest-physical fault on its way out of a walk
    """The EPT does not allow an access to a guest paging-structure entry."""

    def __init__(self, gpa: int, access: int, leaf: int) -> None:
        super().__init__(gpa, access, leaf)
        self.gpa, self.access, self.leaf = gpa, access, leaf


class UnmappedStructure(GuestError):  # noqa: N818 - says what happened
    """Event delivery needs guest-physical memory that does not exist."""

    def __init__(self, gpa: int, linear: int) -> None:
        super().__init__(f"event delivery reaches GPA {gpa:#x} (linear {linear:#x}), where there is no memory")
        self.gpa, self.linear = gpa, linear


class StructureWriter(Protocol):
    """Where updates of paging structures go that the VMM makes on the guest's behalf."""

    def write(self, pieces: list[tuple[int, int, bytes]], *, cause: str, mmu: Mmu | None) -> None:
        """Change guest memory at each (HPA, GPA), as one operation."""


class Mmu:
    """Address translation for one vCPU, in whichever mode its control registers select."""

    def __init__(self, memory: GuestMemory, ept: ExtendedPageTables, frames: Frames, context: Context) -> None:
        self.refusal: Refusal | None = None
        #: Linear pages written in the current step: page -> (gpa page, hpa page).
        self.written: dict[int, tuple[int, int]] = {}
        #: Contents of the frames written in the current step, from before it.
        self.undo: dict[int, bytes] = {}
        #: While the VMM itself walks on the guest's behalf, paging structures in code frames may be read, and what
        #: the walk changes in them goes here.
        self._writer: StructureWriter | None = None
        self._memory = memory
        self._ept = ept
        self._frames = frames
        self._context = context
        self._fetch_pages: dict[int, int] = {}
        #: The instruction that is being stepped, or was last.
        self.stepped: Decoded
        self._step_page = 0
        #: Where it is; None when no step is under way.
        self._step_pc: int | None = None
        self._step_control: Control = (0, 0, 0, 0, False)
        #: Linear page -> what the step fetches there instead of the guest's bytes (see ``vmm.cpu.defects``).
        self._step_patch: dict[int, tuple[int, bytes]] = {}
        self._step_code = b""
        #: (linear address, bytes) of a REP that has overwritten itself and is not finished: it is to be stepped on.
        self.held: tuple[int, bytes] | None = None
        self._fixed_root: int | None = None
        self._fixed: list[tuple[int, int, int]] = []
        self._fixed_pages: dict[int, list[int]] = {}
        self._fixed_walks: dict[tuple[int, int, bool], Translation] = {}
        self._mode_of: tuple[int, int, int] = (0, 0, 0)
        self._mode = PagingMode.of(0, 0, 0)

    # Fills

    def fills_of_free(self, engine: FreeRunningEngine) -> Fill:
        """What answers fills of the free-running engine."""
        control = engine.live.control

        def fill(page: int, access: int) -> int:
            found = self._translate(control(), page, access, engine)
            if found is None:
                return 0
            translation, leaf = found
            if not leaf & _NEEDED[access] or leaf & (W | R) == W:
                self.refusal = self._refusal(page, access, translation.gpa, leaf)
                return 0
            if access == FETCH:
                self._fetched(page, leaf & _LEAF_ADDRESS)
                return leaf & (_LEAF_ADDRESS | X | R * translation.readable)
            return leaf & (_LEAF_ADDRESS | R * translation.readable | W * translation.writable)

        return fill

    def fills_of_step(self, engine: SteppingEngine) -> Fill:
        """What answers fills of the stepping engine: fetches come from latched copies, writes are kept track of."""

        def fill(page: int, access: int) -> int:
            if access == FETCH and page != self._step_page and not self._reaches(page):
                return engine.nothing | X
            found = self._translate(self._step_control, page, access, engine)
            if found is None:
                return 0
            translation, leaf = found
            host = leaf & _LEAF_ADDRESS
            if access == FETCH:
                if self._frames.at(host).state in _NOT_FETCHED:
                    self.refusal = Violation(page, access, translation.gpa, leaf, final=True)
                    return 0
                self._fetched(page, host)
                return engine.latch(host, self._step_patch.get(page) if self._step_patch else None) | X
            if not leaf & _NEEDED[access] or leaf & (W | R) == W:
                self.refusal = self._refusal(page, access, translation.gpa, leaf)
                return 0
            if access == READ:
                return host | R
            self.written[page] = (translation.gpa, host)
            if host not in self.undo:
                self.undo[host] = self._memory.read(host, PAGE)
            return host | R | W

        return fill

    def _fetched(self, page: int, host: int) -> None:
        """Remember where fetches of a page go, within bounds."""
        if len(self._fetch_pages) >= MAX_FETCH_PAGES:
            self._fetch_pages.clear()
        self._fetch_pages[page] = host

    def _refusal(self, page: int, access: int, gpa: int, leaf: int) -> Refusal:
        """Misconfiguration comes before violation."""
        if leaf & (W | R) == W:
            return Misconfiguration(page, gpa)
        return Violation(page, access, gpa, leaf, final=True)

    def begin_step(self, *, arrived: bool) -> None:
        """Forget what earlier steps wrote; the next fills are for the instruction at RIP.

        ``arrived`` is whether the free-running engine has just stopped at that instruction, so that what it fetched
        there is what the guest's page tables say now.
        """
        self.written = {}
        self.undo = {}
        pc, self._step_control, bits = self._context.step_view()
        self._step_pc = pc
        self._step_page = pc & -PAGE
        if not arrived:
            self._fetch_pages.pop(self._step_page, None)
        self._step_code = self.instruction_bytes(pc)
        decoded = self.stepped = decode(self._step_code, bits)
        self._step_patch = {}
        code = decoded.correction or (self._step_code[: decoded.length] if self.held is not None else b"")
        if code:
            room = PAGE - (pc & PAGE_OFFSET)
            self._step_patch[self._step_page] = (pc & PAGE_OFFSET, code[:room])
            self._step_patch[self._step_page + PAGE] = (0, code[room:])

    def end_step(self) -> None:
        """The instruction is done with, one way or the other.

        A REP goes on with the bytes that it was fetched from, even if an iteration has overwritten them: a processor
        fetches a string instruction once.
        """
        pc, self._step_pc, self.held = self._step_pc, None, None
        if self.stepped.repeats and self.undo and pc is not None and self._context.pc == pc:
            length = self.stepped.length
            if self.instruction_bytes(pc)[:length] != self._step_code[:length]:
                self.held = (pc, self._step_code)

    def _reaches(self, page: int) -> bool:
        """Whether the stepped instruction itself lies on a linear page other than the one that it starts on.

        The engine also asks for what comes after it (quirk "early-fetch"), which is none of the guest's doing yet.
        """
        assert self._step_pc is not None
        end = self._step_pc + (self.stepped.length or MAX_LENGTH) - 1
        return page == self._step_page + PAGE and end & -PAGE == page

    def _translate(
        self, control: Control, page: int, access: int, engine: Engine
    ) -> tuple[Translation, int] | None:
        """Both stages for a fill; None with ``refusal`` set if the first one does not allow it."""
        cr0, cr3, cr4, efer, user = control
        if self._mode_of != (cr0, cr4, efer):
            self._select_mode(cr0, cr4, efer)
        root = cr3 & _LEAF_ADDRESS
        fixed = root == self._fixed_root
        if fixed:
            known = self._fixed_walks.get((page, access, user))
            if known is not None:
                return known, self._ept.translate(known.gpa)
        mode = self._mode
        if mode.levels > 3 and not is_canonical(page, mode.levels == 5):
            self.refusal = NonCanonical(page, access)
            return None
        try:
            translation = walk(self, mode, cr3, page, _ACCESS[access], user=user)
        except PageFault as fault:
            if not (user and fault.error_code & 1 and self._is_system_access(engine, page, access)):
                self.refusal = GuestFault(page, access, fault.error_code)
                return None
            return self._translate_system(mode, cr3, page, access)
        except PagingStructureViolation as violation:
            self.refusal = Violation(page, violation.access, violation.gpa, violation.leaf, final=False)
            return None
        leaf = self._ept.translate(translation.gpa)
        if fixed:
            self._fixed_walks[page, access, user] = translation
        elif leaf:
            self._frames.at(leaf).learn(root, page)
        return translation, leaf

    def _select_mode(self, cr0: int, cr4: int, efer: int) -> None:
        self._mode_of = (cr0, cr4, efer)
        self._mode = PagingMode.of(cr0, cr4, efer)
        self._fixed_walks.clear()

    @property
    def pc(self) -> int:
        """The linear address of the current instruction."""
        return self._context.pc

    def current_mode(self) -> PagingMode:
        """The paging mode that the saved state selects."""
        context = self._context
        selected = (context.cr0, context.cr4, context.efer)
        if self._mode_of != selected:
            self._select_mode(*selected)
        return self._mode

    # Accesses of the processor itself from ring 3 (quirk "descriptor-fill")

    def _is_system_access(self, engine: Engine, page: int, access: int) -> bool:
        """Whether a user-mode access that paging refuses is in truth the processor's own: GDT, LDT, TSS, a new stack.

        The engine does not tell the privilege of a fill. The instruction does: it must be one that uses
        descriptors, and none of its own operands may lie on the page.
        """
        if access == FETCH:
            return False
        here = Context(engine.handle)
        decoded = self.decode_at(here, here.rip)
        touched = (operand_address(operand, here) for operand in decoded.operands)
        return decoded.uses_descriptors and not any(address & -PAGE == page for address in touched)

    def _translate_system(
        self, mode: PagingMode, cr3: int, page: int, access: int
    ) -> tuple[Translation, int] | None:
        try:
            translation = walk(self, mode, cr3, page, _ACCESS[access], user=False, implicit=True)
        except PageFault as fault:
            self.refusal = GuestFault(page, access, fault.error_code)
            return None
        return translation, self._ept.translate(translation.gpa)

    # The guest's page tables, behind the EPT (vmm.paging.PhysicalMemory)

    def load(self, gpa: int, size: int) -> int:
        """A paging-structure entry."""
        leaf = self._ept.translate(gpa)
        if not leaf & R and (self._writer is None or not leaf):
            raise PagingStructureViolation(gpa, READ, leaf)
        hpa = leaf & _LEAF_ADDRESS | gpa & PAGE_OFFSET
        if size == 8:
            return self._memory.words[hpa >> 3]
        return int.from_bytes(self._memory.read(hpa, size), "little")

    def compare_and_store(self, gpa: int, size: int, old: int, new: int) -> None:
        """Set accessed and dirty flags in a paging-structure entry."""
        leaf = self._ept.translate(gpa)
        if not leaf & W and (self._writer is None or not leaf):
            raise PagingStructureViolation(gpa, WRITE, leaf)
        hpa = leaf & _LEAF_ADDRESS | gpa & PAGE_OFFSET
        if int.from_bytes(self._memory.read(hpa, size), "little") != old:
            raise EntryChanged(f"the paging-structure entry at GPA {gpa:#x} changed under a walk")
        data = new.to_bytes(size, "little")
        if self._writer is None:
            self._memory.write(hpa, data)
        else:
            self._writer.write([(hpa, gpa, data)], cause="page walk", mmu=self)

    @contextmanager
    def structure_access(self, writer: StructureWriter) -> Iterator[None]:
        """Let walks reach paging structures in code frames, with their updates going to ``writer``."""
        before, self._writer = self._writer, writer
        try:
            yield
        finally:
            self._writer = before

    # Looking at the guest

    def peek(self, gva: int) -> int | None:
        """The host address behind a linear address, for looking only: no rights, no flags set; None if unmapped."""
        try:
            with self.structure_access(_NO_WRITER):
                translation = walk(
                    self, self.current_mode(), self._context.cr3, gva, Access.READ, user=False, set_bits=False
                )
        except (PageFault, PagingStructureViolation):
            return None
        leaf = self._ept.translate(translation.gpa)
        return leaf & _LEAF_ADDRESS | gva & PAGE_OFFSET if leaf else None

    def byte_at(self, hpa: int) -> int:
        """One byte of guest memory."""
        return self._memory.bytes[hpa]

    def instruction_bytes(self, gva: int) -> bytes:
        """Up to 15 bytes at the linear address of an instruction; short if it runs into an unmapped page."""
        if self.held is not None and self.held[0] == gva:
            return self.held[1]
        host = self._fetch_pages.get(gva & -PAGE)
        if host is not None and gva & PAGE_OFFSET <= PAGE - MAX_LENGTH:
            return self._memory.read(host | gva & PAGE_OFFSET, MAX_LENGTH)
        out = b""
        while len(out) < MAX_LENGTH:
            at = gva + len(out)
            hpa = host | at & PAGE_OFFSET if host is not None and not out else self.peek(at)
            if hpa is None:
                break
            out += self._memory.read(hpa, min(MAX_LENGTH - len(out), PAGE - (at & PAGE_OFFSET)))
        return out

    def decode_at(self, context: Context, rip: int) -> Decoded:
        """The instruction at RIP of a saved state."""
        base = context.pc - context.rip & 0xFFFF_FFFF_FFFF_FFFF
        return decode(self.instruction_bytes(base + rip), context.code_bits)

    def faulting_address(self, page: int, access: int) -> tuple[int, Decoded]:
        """The exact linear address of a refused access of the current instruction, and the instruction.

        The first byte of the access that lies on the page; the page itself if the instruction does not tell.
        """
        context = self._context
        pc = context.pc
        decoded = self.stepped if pc == self._step_pc else decode(self.instruction_bytes(pc), context.code_bits)
        if access == FETCH:
            return (pc if pc & -PAGE == page else page), decoded
        wants = "reads" if access == READ else "writes"
        for operand in decoded.operands:
            address = operand_address(operand, context)
            if getattr(operand, wants) and address < page + PAGE and address + max(operand.size, 1) > page:
                return max(address, page), decoded
        return page, decoded

    def operand_address(self, operand: MemoryOperand) -> int:
        """The linear address of a memory operand of the current instruction."""
        return operand_address(operand, self._context)

    def holds_instruction(self, frame: Frame) -> bool:
        """Whether any byte of the current instruction lies in a frame."""
        pc = self._context.pc
        decoded = decode(self.instruction_bytes(pc), self._context.code_bits)
        ends = (pc, pc + max(decoded.length, 1) - 1)
        return any((host := self.peek(gva)) is not None and host & -PAGE == frame.hpa for gva in ends)

    def on_stack(self, page: int) -> bool:
        """Whether the current instruction reaches a linear page by SS (a non-canonical address is then #SS)."""
        decoded = self.decode_at(self._context, self._context.rip)
        return any(o.segment == 2 and operand_address(o, self._context) & -PAGE == page for o in decoded.operands)

    def forbids_write(self, page: int) -> bool:
        """Whether the guest's page tables forbid a store to a linear page; the fault is then the ``refusal``."""
        context = self._context
        try:
            with self.structure_access(_NO_WRITER):
                walk(
                    self, self.current_mode(), context.cr3, page, Access.WRITE, user=context.cpl == 3, set_bits=False
                )
        except PageFault as fault:
            self.refusal = GuestFault(page, WRITE, fault.error_code)
            return True
        return False

    def walk_again(self, page: int) -> None:
        """Repeat the walk for a store to a linear page, so that the flags it sets go through the door."""
        context = self._context
        for access in (Access.WRITE, Access.READ):
            try:
                walk(self, self.current_mode(), context.cr3, page, access, user=context.cpl == 3)
            except PageFault:
                continue
            return

    def fetch_host(self, gva: int) -> int | None:
        """The host address that instruction fetch at a linear address reaches."""
        host = self._fetch_pages.get(gva & -PAGE)
        return self.peek(gva) if host is None else host | gva & PAGE_OFFSET

    def fix_tables(self, root: int, mappings: list[tuple[int, int, int]]) -> None:
        """The address space of ``root`` consists of these (GVA, GPA, bytes), later ones winning, and never changes."""
        self._fixed_root, self._fixed = root, mappings
        self._fixed_walks.clear()

    def aliases(self, frame: Frame, offset: int) -> tuple[int, ...]:
        """All linear addresses of the current address space known to reach a byte of a frame, ascending."""
        root = self._context.cr3 & _LEAF_ADDRESS
        if root == self._fixed_root:
            pages = self._fixed_pages.get(frame.hpa) or self._fixed_aliases(frame)
            return tuple([page + offset for page in pages])
        found = (page + offset for where, page in frame.linear if where == root)
        return tuple(sorted(gva for gva in found if self.peek(gva) == frame.hpa + offset))

    def _fixed_aliases(self, frame: Frame) -> list[int]:
        """The linear pages of a frame in the constant address space, ascending."""
        pages: set[int] = set()
        for gpa in frame.gpas:
            candidates = (gva + gpa - start for gva, start, size in self._fixed if start <= gpa < start + size)
            pages.update(page for page in candidates if self.peek(page) == frame.hpa)
        self._fixed_pages[frame.hpa] = sorted(pages)
        return self._fixed_pages[frame.hpa]


def operand_address(operand: MemoryOperand, context: Context) -> int:
    """The linear address of a memory operand in a saved state."""
    flat = context.code_bits == 64

    def segment_base(index: int) -> int:
        if flat and index < 4:
            return 0
        return context.segment_base(index)

    return operand.address(context.rip, list(context.gprs), segment_base)


class _NoWriter:
    """For walks that set no flags."""

    def write(self, pieces: list[tuple[int, int, bytes]], *, cause: str, mmu: Mmu | None) -> None:
        raise AssertionError


_NO_WRITER: Final = _NoWriter()
