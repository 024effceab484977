"""Views of the EPT as the host makes and changes them; see ``vmm.ept.views`` for what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from attrs import define

from vmm.control_fields import EPTP_LIST_LENGTH, ControlFields
from vmm.ept import ExtendedPageTables, Permission
from vmm.ept.bits import ADDRESS_MASK, GPA_LIMIT
from vmm.ept.views import View, Views
from vmm.errors import OptionError
from vmm.inputs import AddView, EptpList, Inputs, Remap, Restrict, SwitchView, VeArea
from vmm.memory import PAGE
from vmm.memory.frames import Frame, Frames, FrameState
from vmm.records import ViewEvent
from vmm.reporter import Reporter
from vmm.tlb import StrictTlb
from vmm.vcpu import VirtualCpu


@define(slots=True, eq=False)
class HostViews:
    """``Machine.views``. Views are named by their numbers; 0 is there from the start, and every vCPU starts with it.

    All methods raise ``OptionError`` for a view or a vCPU that there is not. ``flush`` makes every engine forget its
    address translations.
    """

    all: Views
    frames: Frames
    inputs: Inputs
    reporter: Reporter
    vcpus: list[VirtualCpu]
    fields: list[ControlFields]
    keeps_wx: bool
    flush: Callable[[], None]
    #: Strict staleness, None without it.
    tlb: StrictTlb | None = None

    def __len__(self) -> int:
        """How many views there are."""
        return len(self.all.all)

    def ept(self, view: int) -> ExtendedPageTables:
        """The EPT of a view; its ``eptp`` selects it."""
        return self.all.at(view).ept

    def current(self, *, vcpu: int = 0) -> int:
        """The view that a vCPU uses."""
        return self._vcpu(vcpu).mmu.view.number

    def add(self, *, of: int = 0) -> int:
        """Make another view, a copy of ``of``; its number. There are at most 64."""
        original = self.all.at(of)
        with self.inputs.during(AddView(of)):
            made = self.all.add(original)
            self._tell("added", made.number)
        return made.number

    def switch(self, view: int, *, vcpu: int = 0) -> None:
        """Have a vCPU use a view from its next access on. Its EPTP index becomes that of the view in its list."""
        chosen, processor, fields = self.all.at(view), self._vcpu(vcpu), self.fields[vcpu]
        with self.inputs.during(SwitchView(view, vcpu)):
            if chosen.eptp in fields.eptp_list:
                fields.eptp_index = fields.eptp_list.index(chosen.eptp)
            processor.use(chosen)
            self._tell("switched", view)

    def restrict(
        self, view: int, gpa: int, size: int, access: Permission, *, convertible: bool = False
    ) -> None:
        """Let a view allow at most ``access`` for whole pages of it, until it is changed again; "rwx" ends that.

        With ``convertible`` what it forbids there becomes a #VE of the guest (see ``set_ve_area``), on a processor
        with EPT-violation #VE. Raises ``OptionError`` for writes without reads, which no processor takes, and where
        nothing is mapped.
        """
        limited = self.all.at(view)
        if access & Permission.W and not access & Permission.R:
            raise OptionError(f"access {access}", where="restrict", fix="allow reads with writes")
        pages = list(self._pages(limited, gpa & -PAGE, size + gpa % PAGE))
        with self.inputs.during(Restrict(view, gpa, size, access, convertible)):
            for page, _ in pages:
                self.all.restrict(limited, page, access, convertible=convertible)
            self._changed(limited, pages)
            self._tell("restricted", view, gpa=gpa, size=size, access=str(access))

    def remap(self, view: int, gpa: int, target: int, size: int) -> None:
        """Make ``size`` bytes of GPAs of a view reach the frames of other GPAs (all multiples of 4096) of view 0.

        They follow view 0 again when ``target`` is ``gpa``. Raises ``OptionError`` for anything else, for view 0 (that
        is ``Machine.alias``), for GPAs from 2^48 on or that lead to sealed frames, for targets without memory, and
        under a W^X policy, which judges by one memory.
        """
        changed = self.all.at(view)
        if (gpa | target | size) % PAGE or not 0 <= gpa <= gpa + size <= GPA_LIMIT:
            what = f"{size:#x} bytes at GPA {gpa:#x} for {target:#x}"
            raise OptionError(what, where="remap", fix="give multiples of 4096 below 2^48")
        if not view or self.keeps_wx:
            what, fix = ("view 0", "use alias") if not view else ("a W^X policy", "restrict views only")
            raise OptionError(what, where="remap", fix=fix)
        pages = [(gpa + at - target, frame) for at, frame in self._pages(self.all.at(0), target, size)]
        self._refuse_sealed(changed, gpa, size)
        others = [each for each in self.all.all if each is not changed]
        for page, frame in pages:
            if frame.guarded and self.all.guards_another(page, frame, frame.writable, others):
                fix = "have the same sub-pages written in both frames"
                raise OptionError(f"GPA {page:#x} has sub-page permissions in another view", where="remap", fix=fix)
        with self.inputs.during(Remap(view, gpa, target, size)):
            for page, frame in pages:
                self.all.remap(changed, page, frame)
            self._changed(changed, pages)
            self._tell("mapped", view, gpa=gpa, size=size, target=target)

    def set_eptp_list(self, entries: Sequence[int], *, vcpu: int = 0) -> None:
        """Set the EPTPs that VMFUNC chooses from by ECX: at most 512, those that are not given being 0.

        Raises ``OptionError`` for more, and for an EPTP that VM entry takes and that is that of no view. What VM entry
        does not take may be in the list: VMFUNC exits there.
        """
        self._vcpu(vcpu)
        if len(entries) > EPTP_LIST_LENGTH:
            raise OptionError(f"{len(entries)} EPTPs", where="EPTP list", fix=f"give at most {EPTP_LIST_LENGTH}")
        profile = self.all.all[0].ept.profile
        for eptp in entries:
            if not 0 <= eptp < 1 << 64 or (profile.accepts_eptp(eptp) and self.all.of_eptp(eptp) is None):
                raise OptionError(f"EPTP {eptp:#x}", where="EPTP list", fix="give the eptp of a view's ept")
        self.inputs.note(EptpList(tuple(entries), vcpu))
        self.fields[vcpu].eptp_list = tuple(entries)

    def set_ve_area(self, gpa: int, *, vcpu: int = 0) -> None:
        """Set the page that gets the information of a #VE. Raises ``OptionError`` for no page, or without memory."""
        self._vcpu(vcpu)
        if gpa % PAGE:
            raise OptionError(f"GPA {gpa:#x}", where="#VE information area", fix="give a multiple of 4096")
        [(_, frame)] = self._pages(self.all.at(0), gpa, PAGE)
        self.inputs.note(VeArea(gpa, vcpu))
        self.fields[vcpu].ve_area = frame.hpa

    def _vcpu(self, number: int) -> VirtualCpu:
        if not 0 <= number < len(self.vcpus):
            fix = f"there are {len(self.vcpus)}, counted from 0"
            raise OptionError(f"vCPU {number}", where="views", fix=fix)
        return self.vcpus[number]

    def _pages(self, view: View, gpa: int, size: int) -> Iterator[tuple[int, Frame]]:
        """Each page of a range with the frame that it leads to in a view; raises ``OptionError`` if there is none."""
        if size < 0:
            raise OptionError(f"a size of {size}", where="views", fix="give 0 or more bytes")
        for page in range(gpa, gpa + size, PAGE):
            host = view.ept.host_page(page)
            if host is None:
                what = f"GPA {page:#x} has no memory in view {view.number}"
                raise OptionError(what, where="views", fix="stay inside the guest's RAM")
            yield page, self.frames.at(host)

    def _refuse_sealed(self, view: View, gpa: int, size: int) -> None:
        for page in range(gpa, gpa + size, PAGE):
            before = view.ept.host_page(page)
            if before is not None and self.frames.at(before).state is FrameState.SEALED:
                raise OptionError(f"GPA {page:#x} is sealed", where="remap", fix="sealed code stays where it is")

    def _changed(self, view: View, pages: list[tuple[int, Frame]]) -> None:
        """Entries of a view say something else by now; so do the VMM's own tables, if they are among the frames."""
        if self.tlb is not None:
            for page, _ in pages:
                self.tlb.invept_page(view.eptp & ADDRESS_MASK, page)
        for vcpu in self.vcpus:
            vcpu.mmu.aliases.frames_changed()
            vcpu.mmu.forget_all_fetches()
            if any(self.frames.is_system(frame.hpa) for _, frame in pages):
                vcpu.mmu.tables_changed()
        self.flush()

    def _tell(
        self,
        event: str,
        view: int,
        *,
        gpa: int | None = None,
        size: int | None = None,
        access: str | None = None,
        target: int | None = None,
    ) -> None:
        if self.reporter.observed:
            self.reporter.emit(ViewEvent(event, view, "host", gpa=gpa, size=size, access=access, target=target))
