"""Views: several EPTs of one machine, of which each vCPU uses one at a time (others call that altp2m).

What a frame's state allows, a view only restricts: it has a *limit* for a page of guest-physical memory, and it may
have a page lead to another frame. Whatever moves frames between states reaches them in every view, so that a frame
which is writable in one is executable in none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from attrs import define, field

from vmm.ept.bits import EXECUTE, USER_EXECUTE
from vmm.ept.entry import Permission
from vmm.ept.structures import ROOT
from vmm.ept.tables import ExtendedPageTables
from vmm.errors import OptionError
from vmm.memory import PAGE
from vmm.memory.frames import Frame, Frames

#: How many views a machine may have.
VIEWS_LIMIT: Final = 64
#: Host-physical addresses that the tables of one view have, in bytes.
_ROOM: Final = 1 << 26
#: A limit that limits nothing.
_ALL: Final = Permission.R | Permission.W | Permission.X


@define(slots=True, eq=False)
class View:
    """One view. ``limits`` are what it allows at most, ``hosts`` where it leads elsewhere than view 0, by GPA page.

    A violation of a page of ``convertible`` that the view's limit causes becomes a #VE of the guest.
    """

    number: int
    ept: ExtendedPageTables
    limits: dict[int, Permission] = field(factory=dict)
    hosts: dict[int, int] = field(factory=dict)
    convertible: set[int] = field(factory=set)
    #: Its number in records: None as long as it is the only one.
    shown: int | None = None

    @property
    def eptp(self) -> int:
        """The EPT pointer that selects it."""
        return self.ept.eptp

    def limit(self, gpa: int) -> Permission:
        """What it allows at most at ``gpa``, whatever the state of the frame."""
        return self.limits.get(gpa & -PAGE, _ALL)

    def forbids(self, gpa: int, needed: int) -> bool:
        """Whether its limit is against an access that needs these bits of an entry (2:0 and 10)."""
        if not self.limits:
            return False
        limit = self.limit(gpa)
        return bool(needed & ~(limit | (USER_EXECUTE if limit & EXECUTE else 0)))

    def can_allow(self, gpa: int, needed: int) -> bool:
        """Whether changing the entry that maps ``gpa`` can allow what is needed (bits 2:0 and 10 of an entry)."""
        return needed & ~self.ept.allowed_above(gpa) == 0 and not self.forbids(gpa, needed)


class Views:
    """All views of a machine. View 0 is ``first``; ``allowed`` is what a frame's state allows at the moment."""

    def __init__(
        self, first: ExtendedPageTables, frames: Frames, allowed: Callable[[Frame], Permission]
    ) -> None:
        self.all: Final = [View(0, first)]
        #: Whether there is nothing but view 0, without limits.
        self.plain = True
        self._frames = frames
        self._allowed = allowed

    def at(self, number: int) -> View:
        """A view by its number; raises ``OptionError`` for one that there is not."""
        if not 0 <= number < len(self.all):
            raise OptionError(f"view {number}", where="views", fix=f"there are {len(self.all)}, counted from 0")
        return self.all[number]

    def add(self, of: View) -> View:
        """A copy of a view; raises ``OptionError`` if there are too many."""
        number = len(self.all)
        if number >= VIEWS_LIMIT:
            raise OptionError(f"{number + 1} views", where="views", fix=f"have at most {VIEWS_LIMIT}")
        made = View(
            number, of.ept.copy(ROOT + number * _ROOM), dict(of.limits), dict(of.hosts), set(of.convertible)
        )
        for gpa, hpa in made.hosts.items():
            self._frames.at(hpa).elsewhere += ((number, gpa),)
        self.all.append(made)
        for view in self.all:
            view.shown = view.number
        self.plain = False
        return made

    def of_eptp(self, eptp: int) -> View | None:
        """The view that an EPT pointer selects; None if it is that of none."""
        return next((view for view in self.all if view.eptp == eptp), None)

    def places(self, frame: Frame) -> Iterator[tuple[View, int]]:
        """Every way to a frame: a view, and the GPA of a page there."""
        for view in self.all:
            for gpa in frame.gpas:
                if gpa not in view.hosts:
                    yield view, gpa
        for number, gpa in frame.elsewhere:
            yield self.all[number], gpa

    # What changes

    def protect(
        self,
        frame: Frame,
        permissions: Permission,
        gpas: Iterable[int] | None = None,
        *,
        user_execute: bool | None = None,
    ) -> None:
        """Let every way to a frame (by ``gpas`` only, if given) allow so much, as far as its view does.

        ``user_execute`` is as for ``ExtendedPageTables.protect``.
        """
        if self.plain:
            protect = self.all[0].ept.protect
            for gpa in frame.gpas if gpas is None else gpas:
                protect(gpa, permissions, user_execute=user_execute)
            return
        for view, gpa in self.places(frame):
            if gpas is None or gpa in gpas:
                left, user = within(view, gpa, permissions), user_execute
                if user:
                    user = bool(within(view, gpa, permissions | Permission.X) & Permission.X)
                view.ept.protect(gpa, left, user_execute=user)

    def guard_sub_pages(self, frame: Frame) -> None:
        """Have sub-page permissions decide about stores to a guarded frame, in every view that lets it be written."""
        for view, gpa in self.places(frame):
            _guard(view, gpa, frame)

    def guards_another(self, gpa: int, frame: Frame, writable: int, views: Iterable[View]) -> bool:
        """Whether a page leads to another guarded frame in one of these views, with other sub-pages to be written.

        The sub-page permission table goes by GPA and is one for all views, so that both cannot be.
        """
        hosts = (view.ept.host_page(gpa) for view in views)
        others = (self._frames.at(host) for host in hosts if host is not None and host != frame.hpa)
        return any(other.guarded and other.writable != writable for other in others)

    def map(self, gpa: int, frame: Frame) -> None:
        """Have a GPA lead to a frame in every view that does not have it lead elsewhere."""
        for view in self.all:
            if gpa not in view.hosts:
                self._put(view, gpa, frame)

    def restrict(self, view: View, gpa: int, limit: Permission, *, convertible: bool) -> None:
        """Set the limit of a mapped page in a view, and whether its violations become #VE."""
        self.plain = False
        if limit == _ALL:
            view.limits.pop(gpa, None)
        else:
            view.limits[gpa] = limit
        (view.convertible.add if convertible else view.convertible.discard)(gpa)
        hpa = view.ept.host_page(gpa)
        if hpa is not None:
            frame = self._frames.at(hpa)
            view.ept.protect(gpa, within(view, gpa, self._allowed(frame)))
            self._mark(view, gpa, frame)

    def remap(self, view: View, gpa: int, frame: Frame) -> None:
        """Have a page lead to a frame in a view; to the one that it leads to in view 0, as everywhere else again."""
        self.plain = False
        before = view.hosts.pop(gpa, None)
        if before is not None:
            left = self._frames.at(before)
            left.elsewhere = tuple(place for place in left.elsewhere if place != (view.number, gpa))
        if view.number and gpa not in frame.gpas:
            view.hosts[gpa] = frame.hpa
            frame.elsewhere += ((view.number, gpa),)
        self._put(view, gpa, frame)

    def _put(self, view: View, gpa: int, frame: Frame) -> None:
        """The entry of a page from all that is known of it."""
        view.ept.map(gpa, frame.hpa, within(view, gpa, self._allowed(frame)))
        self._mark(view, gpa, frame)

    @staticmethod
    def _mark(view: View, gpa: int, frame: Frame) -> None:
        """Bits 61 and 63 of the entry of a page."""
        if frame.guarded:
            _guard(view, gpa, frame)
        if view.ept.profile.virtualization_exceptions:
            view.ept.suppress(gpa, on=gpa not in view.convertible)


def _guard(view: View, gpa: int, frame: Frame) -> None:
    """The sub-page bit of an entry, and what the table says of the page; a guarded frame maps 4 KiB everywhere."""
    view.ept.guard_sub_pages(gpa, guarded=frame.guarded and bool(view.limit(gpa) & Permission.W))
    if frame.guarded and view.ept.sub_pages is not None:
        view.ept.sub_pages.permit(gpa, frame.writable)


def within(view: View, gpa: int, permissions: Permission) -> Permission:
    """What is left of permissions within a view's limit; nothing that would be misconfigured."""
    left = permissions & view.limit(gpa)
    if left & Permission.R:
        return left
    execute_only = view.ept.profile.capabilities.execute_only
    return left & Permission.X if execute_only else Permission.NONE
