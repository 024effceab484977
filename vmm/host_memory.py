"""Guest-physical memory as the host reaches it: to look at, and to change with all that follows from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attrs import define

from vmm.ept import Permission
from vmm.ept.bits import ADDRESS_MASK, GPA_LIMIT
from vmm.ept.sub_pages import SUB_PAGES
from vmm.ept.views import View, Views
from vmm.errors import OptionError
from vmm.inputs import Alias, Approve, Inputs, Protect, ProtectSubPages, Seal, Write
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frame, Frames, FrameState
from vmm.mmu import Mmu
from vmm.tlb import StrictTlb
from vmm.translation import BlockCache
from vmm.trap.door import Door
from vmm.trap.frames import FrameControl
from vmm.trap.wx import is_approved
from vmm.vcpu import VirtualCpu

#: Part of a range: (HPA, GPA, bytes), within one page.
Place = tuple[int, int, int]


@define(slots=True, eq=False)
class HostMemory:
    """The part of ``Machine`` that is about memory; its methods say there what they do.

    ``current`` gives the MMU of the vCPU at work, ``flush`` makes every engine forget its address translations.
    """

    memory: GuestMemory
    frames: Frames
    views: Views
    blocks: BlockCache
    control: FrameControl
    door: Door
    inputs: Inputs
    vcpus: list[VirtualCpu]
    keeps_wx: bool
    current: Callable[[], Mmu]
    flush: Callable[[], None]
    #: Strict staleness, None without it.
    tlb: StrictTlb | None = None

    def read(self, gpa: int, size: int) -> bytes:
        """See ``Machine.read``."""
        return b"".join(self.memory.read(hpa, length) for hpa, _, length in self.places(gpa, size))

    def write(self, gpa: int, data: bytes) -> None:
        """See ``Machine.write``."""
        places = self.places(gpa, len(data))
        self._refuse_sealed(places, "write")
        pieces = [(hpa, where, data[where - gpa : where - gpa + length]) for hpa, where, length in places]
        with self.inputs.during(Write(gpa, data)):
            self.door.write(pieces, cause="host", mmu=self.current())
            if any(self.frames.is_system(hpa) for hpa, _, _ in places):
                for vcpu in self.vcpus:
                    vcpu.mmu.tables_changed()
                self.flush()

    def alias(self, gpa: int, target: int, size: int) -> None:
        """See ``Machine.alias``."""
        if (gpa | target | size) % PAGE or not 0 <= gpa <= gpa + size <= GPA_LIMIT:
            what = f"{size:#x} bytes at GPA {gpa:#x} for {target:#x}"
            raise OptionError(what, where="alias", fix="give multiples of 4096 below 2^48")
        places = self.places(target, size)
        for page in range(gpa, gpa + size, PAGE):
            before = self.control.host_of(page)
            if before is None:
                continue
            old = self.frames.at(before)
            if old.state is FrameState.SEALED:
                raise OptionError(f"GPA {page:#x} is sealed", where="alias", fix="sealed code stays where it is")
            if old.elsewhere and all(gpa <= own < gpa + size for own in old.gpas):
                what = f"GPA {page:#x} is all that leads in view 0 to a page of another view"
                raise OptionError(what, where="alias", fix="remap that view first")
        for host, where, _ in places:
            frame, page = self.frames.at(host), gpa + where - target
            if frame.guarded:
                elsewhere = [view for view in self.views.all if page in view.hosts]
                self._refuse_guarded(page, frame, frame.writable, elsewhere, "alias")
        with self.inputs.during(Alias(gpa, target, size)):
            for host, where, _ in places:
                self._map(gpa + where - target, self.frames.at(host))
            for vcpu in self.vcpus:
                vcpu.mmu.aliases.frames_changed()
            self.flush()

    def protect(
        self,
        gpa: int,
        size: int,
        access: Permission,
        *,
        user_execute: bool | None = None,
        invalidate: bool = True,
    ) -> None:
        """See ``Machine.protect``."""
        executable = bool(access & Permission.X or user_execute)
        if access & Permission.W and executable:
            raise OptionError(f"access {access}", where="protect", fix="a frame is writable or executable, never both")
        if user_execute is not None and not self.views.all[0].ept.profile.mode_based_execute:
            fix = "give a profile with mode_based_execute"
            raise OptionError("fetches from user-mode addresses cannot be told from others", where="protect", fix=fix)
        places = self.places(gpa & -PAGE, size + gpa % PAGE)
        if access & Permission.W:
            self._refuse_sealed(places, "protect")
        if executable and self.keeps_wx:
            self._refuse_unapproved(places)
        with self.inputs.during(Protect(gpa, size, access, user_execute, invalidate)):
            for hpa, where, _ in places:
                frame, page = self.frames.at(hpa), where & -PAGE
                self.control.protect(frame, access, page, user_execute=user_execute)
                self._changed_entries(page, invalidate=invalidate)
            if invalidate:
                self.flush()

    def protect_sub_pages(self, gpa: int, writable: int) -> None:
        """See ``Machine.protect_sub_pages``."""
        if self.views.all[0].ept.sub_pages is None:
            fix = "give a profile with sub_page_write"
            raise OptionError("the processor has no sub-page permissions", where="protect_sub_pages", fix=fix)
        if gpa % PAGE or not 0 <= writable < 1 << SUB_PAGES:
            what = f"sub-pages {writable:#x} of GPA {gpa:#x}"
            raise OptionError(what, where="protect_sub_pages", fix="give a multiple of 4096, and 32 bits")
        places = self.places(gpa, PAGE)
        self._refuse_sealed(places, "protect_sub_pages")
        frame = self.frames.at(places[0][0])
        for _, page in self.views.places(frame):
            self._refuse_guarded(page, frame, writable, self.views.all, "protect_sub_pages")
        with self.inputs.during(ProtectSubPages(gpa, writable)):
            self.control.protect_sub_pages(frame, writable)
            if self.tlb is not None:
                for view, page in self.views.places(frame):
                    self.tlb.invept_page(view.eptp & ADDRESS_MASK, page)
            self.flush()

    def approve(self, gpa: int, size: int) -> None:
        """See ``Machine.approve``."""
        if not self.keeps_wx:
            raise OptionError("the run has no W^X policy", where="approve", fix="give [policy].wx or RunOptions.wx")
        places = self.places(gpa, size)
        with self.inputs.during(Approve(gpa, size)):
            for hpa, _, _ in places:
                frame = self.frames.at(hpa)
                if not is_approved(frame):
                    self.control.move(frame, FrameState.CODE, "approve")

    def seal(self, gpa: int, size: int) -> None:
        """See ``Machine.seal``."""
        places = self.places(gpa, size)
        with self.inputs.during(Seal(gpa, size)):
            for hpa, _, _ in places:
                frame = self.frames.at(hpa)
                if frame.state is not FrameState.SEALED:
                    self.control.move(frame, FrameState.SEALED, "seal")

    def _map(self, gpa: int, frame: Frame) -> None:
        """One more GPA for a frame; blocks of whatever was there before must go."""
        before = self.control.host_of(gpa)
        if before is not None:
            old = self.frames.at(before)
            if old.state is FrameState.WINDOW and old.gpas == [gpa]:
                self.control.move(old, FrameState.DATA, "remap")  # journaled while it has an address
            self.blocks.invalidate(old.hpa, PAGE, "remap")
            old.gpas.remove(gpa)
        frame.gpas.append(gpa)
        self.views.map(gpa, frame)
        self._changed_entries(gpa, invalidate=True)

    def _changed_entries(self, gpa: int, *, invalidate: bool) -> None:
        """The entry of a page is another in every view that leads where view 0 does; INVEPT comes after it or not."""
        if self.tlb is None:
            return
        for view in self.views.all:
            if gpa not in view.hosts and invalidate:
                self.tlb.invept_page(view.eptp & ADDRESS_MASK, gpa)
            elif gpa not in view.hosts:
                self.tlb.ept_entry_written(view.eptp, 1, gpa)

    def _refuse_sealed(self, places: list[Place], what: str) -> None:
        for hpa, where, _ in places:
            if self.frames.at(hpa).state is FrameState.SEALED:
                raise OptionError(f"GPA {where:#x} is sealed", where=what, fix="sealed code never changes")

    def _refuse_guarded(self, gpa: int, frame: Frame, writable: int, views: Iterable[View], what: str) -> None:
        if self.views.guards_another(gpa, frame, writable, views):
            fix = "have the same sub-pages written in both frames"
            raise OptionError(f"GPA {gpa:#x} has sub-page permissions in another view", where=what, fix=fix)

    def _refuse_unapproved(self, places: list[Place]) -> None:
        for hpa, where, _ in places:
            if not is_approved(self.frames.at(hpa)):
                raise OptionError(f"GPA {where:#x} is not approved", where="protect", fix="approve it first")

    def places(self, gpa: int, size: int) -> list[Place]:
        """Page by page; raises ``OptionError`` where nothing is mapped."""
        if size < 0:
            raise OptionError(f"a size of {size}", where="guest memory", fix="give 0 or more bytes")
        places = []
        done = 0
        while done < size:
            where = gpa + done
            page = self.views.all[0].ept.host_page(where)
            if page is None:
                what = f"GPA {where:#x} has no memory"
                raise OptionError(what, where="guest memory", fix="stay inside the guest's RAM")
            length = min(size - done, PAGE - where % PAGE)
            places.append((page | where % PAGE, where, length))
            done += length
        return places
