"""What answers TLB fills: the guest's page tables, then the EPT.

A fill that both stages allow gets exactly the permissions that both allow; any other is refused, and the reason is
kept in ``refusal`` for the VM exit that follows. Fills come at moments that depend on the host (the engine resizes its
TLB by the clock), so nothing that a run shows may depend on how often they come: only refusals count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from vmm.cpu.context import Context
from vmm.cpu.engine import FETCH, READ, WRITE, Engine, R, W, X
from vmm.cpu.fill_table import REGION
from vmm.cpu.free import FreeRunningEngine
from vmm.decode import MAX_LENGTH, decode, operand_address
from vmm.ept import CLEAN, HELD, MISCONFIGURED
from vmm.ept.bits import USER_EXECUTE
from vmm.ept.qualification import advanced
from vmm.ept.views import View
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frames
from vmm.mmu.aliases import Aliases
from vmm.mmu.fetch_pages import FetchPages
from vmm.mmu.quick_fills import QuickFills
from vmm.mmu.refusals import (
    GuestFault,
    LogFull,
    LogIsFull,
    Misconfiguration,
    NonCanonical,
    PagingStructureViolation,
    Refusal,
    Unjudged,
    Violation,
    Watched,
)
from vmm.mmu.structures import NO_WRITER, GuestStructures
from vmm.mmu.walk_cache import Read, WalkCache
from vmm.paging import Access, PageFault, PagingMode, Translation, entries, is_canonical, walk
from vmm.paging.mode import CR0_PG, CR0_USED, CR4_USED, EFER_USED

PAGE_OFFSET: Final = PAGE - 1
LEAF_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
#: What of CR3 says which address space it is; bits 11:5 count in PAE paging.
_ROOT: Final = 0x000F_FFFF_FFFF_FFE0
#: The address space without paging.
UNPAGED: Final = -1

#: CR0, CR3, CR4, EFER, and whether code runs in ring 3: what a translation depends on.
Control = tuple[int, int, int, int, bool]
#: Answers a fill: (linear page, access) -> host address | permissions, or 0 to refuse.
Fill = Callable[[int, int], int]

#: The accesses of a fill in the words of ``vmm.paging``.
ACCESSES: Final = {READ: Access.READ, WRITE: Access.WRITE, FETCH: Access.FETCH}
_NEEDED: Final = {READ: R, WRITE: W, FETCH: X}
#: What a leaf says of flags of the EPT that an access may have to set.
_FLAGS_TO_SET: Final = CLEAN | HELD


class FetchSide(Protocol):
    """Where a vCPU fetches frames that have changed, under a weaker coherence model."""

    def host(self, hpa: int) -> int:
        """Where it fetches what lies at an HPA."""

    def may_be_written(self, hpa: int) -> bool:
        """Whether the frame may change without further notice."""

    def before_write(self, hpa: int, rip: int | None) -> None:
        """The frame may change from now on, first by the instruction at ``rip`` (None: the host)."""


def space_of(cr0: int, cr3: int) -> int:
    """Which address space these registers select, for ``Mmu.rights``."""
    return cr3 & _ROOT if cr0 & CR0_PG else UNPAGED


class Mmu:
    """Address translation for one vCPU, in whichever mode its control registers select."""

    def __init__(self, memory: GuestMemory, view: View, frames: Frames, context: Context) -> None:
        #: The view of the EPT that the vCPU uses.
        self.view = view
        #: Why the last fill was refused.
        self.refusal: Refusal | None = None
        #: Whether a W^X policy has to see each use of a permission to write or fetch before it is granted.
        self.judges = False
        #: Of each host page with monitored bytes: the permissions (R, W) that the free-running engine never gets.
        self.withheld: dict[int, int] = {}
        #: Host pages with bytes where somebody is asked before an access.
        self.announced: set[int] = set()
        #: None where fetches reach what loads and stores reach, as on a coherent processor.
        self.fetch_side: FetchSide | None = None
        #: The guest's page tables, for its walks.
        self.structures: Final = GuestStructures(memory, view, frames, self)
        self._memory = memory
        self._ept = view.ept
        self._frames = frames
        self._context = context
        profile = view.ept.profile
        #: What a fetch from a user-mode linear address needs (SDM vol. 3, 29.3.3.2).
        self._user_fetch = USER_EXECUTE if profile.mode_based_execute else X
        #: What a leaf has that any fetch is allowed from.
        self.executable: Final = X | self._user_fetch
        self._advanced = profile.capabilities.advanced_information
        self._fetch_pages: Final = FetchPages()
        #: The fills of the free-running engine that it can answer without Python.
        self.quick: Final = QuickFills(memory)
        #: What the last translation depends on of the guest's paging structures; None if that is not known.
        self._reads: tuple[Read, ...] | None = None
        #: Which linear addresses reach a frame.
        self.aliases: Final = Aliases(frames, self)
        self._fixed_walks: dict[tuple[int, int, bool], Translation] = {}
        self._walks: Final = WalkCache(memory, view.ept)
        #: Whether the paging mode has entries that walks can be remembered by.
        self._caches_walks = False
        self._mode_of: tuple[int, int, int] = (-1, 0, 0)
        self._mode = PagingMode.of(0, 0, 0)

    @property
    def pc(self) -> int:
        """The linear address of the instruction that the vCPU is at."""
        return self._context.pc

    def use(self, view: View) -> None:
        """Translate by another view from now on; the engines' TLBs are for the caller to flush."""
        self.view = view
        self._ept = view.ept
        self.structures.use(view)
        self._walks.use(view.ept)
        self.forget_all_fetches()
        self.aliases.frames_changed()
        self.quick.select(self._mode_of, view)

    # Fills

    def fills_of_free(self, engine: FreeRunningEngine) -> Fill:
        """What answers fills of the free-running engine."""
        control = engine.live.control
        self.quick.attach(engine.fills)
        self.quick.select(self._mode_of, self.view)
        if not self._remembers:
            self.quick.detach()

        def fill(page: int, access: int) -> int:
            state = control()
            found = self.translate(state, page, access, engine)
            if found is None or self.refuses(page, access, *found):
                return 0
            translation, leaf = found
            withheld = self.withheld.get(leaf & LEAF_ADDRESS, 0) if self.withheld else 0
            if withheld and self._is_watched(access, withheld):
                return 0
            if self.judges:
                if self.is_unjudged(state, page, access, translation.gpa, leaf):
                    return 0
                if access == READ:
                    return leaf & (LEAF_ADDRESS | R)  # the first store comes here, too
            lasts = self.quick.on and not (leaf & _FLAGS_TO_SET or self.judges)
            if leaf & _FLAGS_TO_SET:
                leaf = self.used(page, access, translation.gpa, leaf)
                if not leaf:
                    return 0
            if access == FETCH:
                cell = self.fetched(page, leaf & LEAF_ADDRESS)
                answer = leaf & (LEAF_ADDRESS | R * translation.readable) & ~withheld | X
            else:
                cell = 0
                answer = leaf & (LEAF_ADDRESS | R * translation.readable | W * translation.writable) & ~withheld
            if lasts and self._reads is not None:
                self.quick.keep(
                    page, access, state[1], translation, self._reads,
                    user=state[4], user_fetch=self._user_fetch, cell=cell,
                )  # fmt: skip
            return answer

        return fill if self.fetch_side is None else self._fills_of_two_sides(fill, self.fetch_side, engine)

    def _fills_of_two_sides(self, fill: Fill, side: FetchSide, engine: FreeRunningEngine) -> Fill:
        """The same where a frame may have two sides: fetches go to one of them, and stores are noticed."""

        def fill_side(page: int, access: int) -> int:
            answer = fill(page, access)
            if access == FETCH and answer:
                host = answer & LEAF_ADDRESS
                fetched = side.host(host)
                if fetched != host:
                    self.fetched(page, fetched)
                    return fetched | X
            elif access == WRITE and answer:
                side.before_write(answer & LEAF_ADDRESS, engine.pc)
            elif answer & W and not side.may_be_written(answer & LEAF_ADDRESS):
                return answer & ~W
            return answer

        return fill_side

    def refuses(self, page: int, access: int, translation: Translation, leaf: int) -> bool:
        """Whether the EPT does not allow the access; misconfiguration comes before violation."""
        needed = self._user_fetch if access == FETCH and translation.user else _NEEDED[access]
        if leaf & needed:
            return False
        if leaf == MISCONFIGURED:
            self.refusal = Misconfiguration(page, access, translation.gpa, final=True)
        else:
            self.refusal = Violation(page, access, translation.gpa, leaf, final=True, needed=needed)
            if self._advanced:
                self.refusal.advanced = advanced(
                    user=translation.user, read_write=translation.read_write, execute_disable=translation.nx
                )
        return True

    def used(self, page: int, access: int, gpa: int, leaf: int) -> int:
        """The leaf for the engine of a page whose EPT dirty flag is clear: a write sets it, all else must not hide one.

        The engine's TLB hides what follows, so W is withheld until the first write. 0 with ``refusal`` set if a flag
        cannot be set, because the page-modification log is full.
        """
        if leaf & HELD or (access == WRITE and self._ept.is_log_full):
            self.refusal = LogFull(page, access)
            return 0
        return self._ept.dirty(gpa) if access == WRITE else leaf & ~W

    def _is_watched(self, access: int, withheld: int) -> bool:
        """Whether somebody monitors this kind of access to the frame; that is then the ``refusal``."""
        if access == FETCH or not withheld & _NEEDED[access]:
            return False
        self.refusal = Watched()
        return True

    def is_unjudged(self, control: Control, page: int, access: int, gpa: int, leaf: int) -> bool:
        """Whether the W^X policy must see this use of a permission first; that is then the ``refusal``."""
        root, host = space_of(control[0], control[1]), leaf & LEAF_ADDRESS
        if access == READ or (root, page, access) in self._frames.at(host).uses.judged:
            return False
        self.refusal = Unjudged(page, access, gpa, root, host)
        return True

    @property
    def _remembers(self) -> bool:
        """Whether fills depend on nothing but what ``FillTable`` can hold."""
        return self.fetch_side is None

    def fetched(self, page: int, host: int) -> int:
        """Remember where fetches of a page go, within bounds; the address of the cell that holds it."""
        if self._fetch_pages.is_full:
            self._fetch_pages.reset()
            self.quick.forget()
        return self._fetch_pages.record(page, host)

    def forget_fetches(self, page: int) -> None:
        """The page tables may say something else by now about where fetches of a page go."""
        self._fetch_pages.forget(page)

    def translate(
        self, control: Control, page: int, access: int, engine: Engine
    ) -> tuple[Translation, int] | None:
        """Both stages for a fill; None with ``refusal`` set if the first one does not allow it."""
        cr0, cr3, cr4, efer, user = control
        if self._mode_of != (cr0 & CR0_USED, cr4 & CR4_USED, efer & EFER_USED):
            self._select_mode(cr0, cr4, efer)
        if cr3 & LEAF_ADDRESS == self.aliases.fixed_root:
            known = self._fixed_walks.get((page, access, user))
            if known is not None:
                self._reads = ()
                return known, self._ept.translate(known.gpa)
        if self._caches_walks:
            found = self._walks.find((cr3, page, access, user))
            if found is not None:
                known, self._reads = found
                return known, self._ept.translate(known.gpa)
        return self._walk(cr3, page, access, engine, user=user)

    def _walk(
        self, cr3: int, page: int, access: int, engine: Engine, *, user: bool
    ) -> tuple[Translation, int] | None:
        """Both stages for a fill that nothing is remembered of; as ``translate``."""
        mode, root = self._mode, cr3 & LEAF_ADDRESS
        self._reads = None
        if mode.levels > 3 and not is_canonical(page, mode.levels == 5):
            self.refusal = NonCanonical(page, access)
            return None
        trail: list[tuple[int, int]] = []
        try:
            translation = walk(self.structures, mode, cr3, page, ACCESSES[access], user=user, trail=trail)
        except PageFault as fault:
            if not (user and fault.error_code & 1 and self._is_system_access(engine, page, access)):
                self.refusal = GuestFault(page, access, fault.error_code)
                return None
            return self._translate_system(mode, cr3, page, access)
        except PagingStructureViolation as violation:
            self.refusal = violation.refusal(page, access)
            return None
        leaf = self._ept.translate(translation.gpa)
        if root == self.aliases.fixed_root:
            self._fixed_walks[page, access, user] = translation
            self._reads = ()
        elif leaf and leaf != MISCONFIGURED:
            self._learn(root, page, translation, leaf)
            if trail and self._caches_walks:
                self._reads = self._walks.keep((cr3, page, access, user), translation, trail)
        return translation, leaf

    def _learn(self, root: int, page: int, translation: Translation, leaf: int) -> None:
        """Remember an alias; of a large page, all of them at once."""
        if translation.page_size < REGION:
            self._frames.at(leaf).learn(root, page)
        else:
            self._frames.learn_region(root, page & -REGION, translation.gpa & -REGION)

    def _select_mode(self, cr0: int, cr4: int, efer: int) -> None:
        self._mode_of = (cr0 & CR0_USED, cr4 & CR4_USED, efer & EFER_USED)
        self._mode = PagingMode.of(cr0, cr4, efer)
        self._fixed_walks.clear()
        self._walks.clear()
        self._caches_walks = self._mode.levels > 3
        self.quick.select(self._mode_of, self.view)

    def current_mode(self) -> PagingMode:
        """The paging mode that the saved state selects."""
        context = self._context
        cr0, cr4, efer = context.cr0, context.cr4, context.efer
        if self._mode_of != (cr0 & CR0_USED, cr4 & CR4_USED, efer & EFER_USED):
            self._select_mode(cr0, cr4, efer)
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
        decoded = decode(self.code_bytes(here.pc), here.code_bits)
        touched = (operand_address(operand, here) for operand in decoded.operands)
        return decoded.uses_descriptors and not any(address & -PAGE == page for address in touched)

    def _translate_system(
        self, mode: PagingMode, cr3: int, page: int, access: int
    ) -> tuple[Translation, int] | None:
        try:
            translation = walk(self.structures, mode, cr3, page, ACCESSES[access], user=False, implicit=True)
        except PageFault as fault:
            self.refusal = GuestFault(page, access, fault.error_code)
            return None
        except PagingStructureViolation as violation:
            self.refusal = violation.refusal(page, access)
            return None
        return translation, self._ept.translate(translation.gpa)

    # Looking at the guest

    @property
    def root(self) -> int:
        """The page that CR3 leads to."""
        return self._context.cr3 & LEAF_ADDRESS

    @property
    def space(self) -> int:
        """The address space in use, for ``rights``."""
        return space_of(self._context.cr0, self._context.cr3)

    def peek(self, gva: int) -> int | None:
        """The host address behind a linear address, for looking only: no rights, no flags set; None if unmapped."""
        try:
            with self.structures.reached_by(NO_WRITER):
                mode, cr3 = self.current_mode(), self._context.cr3
                translation = walk(self.structures, mode, cr3, gva, Access.READ, user=False, set_bits=False)
        except (PageFault, PagingStructureViolation):
            return None
        leaf = self._ept.look(translation.gpa)
        return leaf & LEAF_ADDRESS | gva & PAGE_OFFSET if leaf and leaf != MISCONFIGURED else None

    def rights(self, root: int, page: int) -> tuple[int, bool, bool] | None:
        """(host page, writable, executable) of a linear page, by the page tables of ``root`` as they are now.

        It is what the entries say to whoever may use the page at all: R/W set in each, XD in none. CR0.WP takes no
        part. None where nothing is mapped; paging is off for ``UNPAGED``, and on for any other. Sets no flags.
        """
        gpa, writable, executable = page, True, True
        mode = self.current_mode()
        if (root == UNPAGED) != (mode.levels == 0):
            return None
        if mode.levels:
            try:
                with self.structures.reached_by(NO_WRITER):
                    found = entries(self.structures, mode, root, page)
            except PagingStructureViolation:
                return None
            leaf = found[-1]
            if leaf.page_size is None or leaf.reserved or not leaf.present:
                return None
            gpa = leaf.address | page & leaf.page_size - PAGE
            writable = all(entry.writable is not False for entry in found)
            executable = not any(entry.nx for entry in found)
        host = self._ept.host_page(gpa)
        return None if host is None else (host, writable, executable)

    def code_bytes(self, gva: int) -> bytes:
        """Up to 15 bytes at the linear address of an instruction; short if it runs into an unmapped page."""
        host = self._fetch_pages.host(gva & -PAGE)
        if host is not None and gva & PAGE_OFFSET <= PAGE - MAX_LENGTH:
            return self._memory.read(host | gva & PAGE_OFFSET, MAX_LENGTH)
        out = b""
        while len(out) < MAX_LENGTH:
            at = gva + len(out)
            hpa = host | at & PAGE_OFFSET if host is not None and not out else self._peek_fetch(at)
            if hpa is None:
                break
            out += self._memory.read(hpa, min(MAX_LENGTH - len(out), PAGE - (at & PAGE_OFFSET)))
        return out

    def forbids_write(self, page: int) -> bool:
        """Whether the guest's page tables forbid a store to a linear page; the fault is then the ``refusal``."""
        context = self._context
        try:
            with self.structures.reached_by(NO_WRITER):
                mode, user = self.current_mode(), context.cpl == 3
                walk(self.structures, mode, context.cr3, page, Access.WRITE, user=user, set_bits=False)
        except PageFault as fault:
            self.refusal = GuestFault(page, WRITE, fault.error_code)
            return True
        return False

    def walk_again(self, page: int) -> None:
        """Repeat the walk for a store to a linear page, so that the flags it sets go through the door."""
        context = self._context
        for access in (Access.WRITE, Access.READ):
            try:
                walk(self.structures, self.current_mode(), context.cr3, page, access, user=context.cpl == 3)
            except PageFault:
                continue
            except LogIsFull:
                return  # the guest's own walk will come to that
            return

    def fetch_host(self, gva: int) -> int | None:
        """The host address that instruction fetch at a linear address reaches."""
        host = self._fetch_pages.host(gva & -PAGE)
        return self._peek_fetch(gva) if host is None else host | gva & PAGE_OFFSET

    def _peek_fetch(self, gva: int) -> int | None:
        host = self.peek(gva)
        return host if host is None or self.fetch_side is None else self.fetch_side.host(host)

    def forget_all_fetches(self) -> None:
        """Fetches of any page may go elsewhere from now on."""
        self._fetch_pages.forget_all()

    def fix_tables(self, root: int, mappings: list[tuple[int, int, int]]) -> None:
        """The address space of ``root`` consists of these (GVA, GPA, bytes), later ones winning, and never changes."""
        self.aliases.fix(root, mappings)
        self._fixed_walks.clear()
        self.quick.forget()

    def tables_changed(self) -> None:
        """The host has written to the address space that was fixed: from now on it is like any other."""
        self.aliases.unfix()
        self.quick.forget()
