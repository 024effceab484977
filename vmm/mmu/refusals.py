"""Why a translation was refused, kept for the VM exit or the fault that follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define

from vmm.ept import MISCONFIGURED
from vmm.ept.bits import WRITE as _WRITE
from vmm.errors import GuestError

if TYPE_CHECKING:
    from vmm.ept.views import View
    from vmm.tlb.mappings import EntryRead, Mapping


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
    ``leaf`` what the EPT said (0: not present), ``final`` false for an access to a paging structure. ``needed`` is what
    all entries would have to allow (bits 2:0 and 10 of an entry). An access to a paging structure has
    ``linear_access``, what the instruction was doing to the linear page. ``advanced`` are bits 9 to 11 of the exit
    qualification, 0 on a processor without them.
    """

    page: int
    access: int
    gpa: int
    leaf: int
    final: bool
    needed: int
    linear_access: int | None = None
    advanced: int = 0

    @property
    def updates(self) -> bool:
        """Whether it is an access to a paging structure that counts as a read and a write.

        That is one that sets accessed and dirty flags, or any with those of the EPT on.
        """
        return not self.final and bool(self.needed & _WRITE)


@define(slots=True, eq=False)
class Misconfiguration:
    """An EPT entry on the way has a setting that the processor does not support (SDM vol. 3, 29.3.3.1).

    A VM exit is due. ``gpa`` is as for a :class:`Violation`.
    """

    page: int
    access: int
    gpa: int
    final: bool


@define(slots=True, eq=False)
class Unjudged:
    """Both stages allow the access, but the W^X policy has not seen this use of a permission yet.

    ``page`` is linear, in the address space of ``root``; ``gpa`` is that of its page, ``host`` the host page.
    """

    page: int
    access: int
    gpa: int
    root: int
    host: int


@define(slots=True, eq=False)
class Watched:
    """Everything allows the access, but somebody monitors bytes of the frame: the instruction has to be stepped."""


@define(slots=True, eq=False)
class LogFull:
    """The access would set an accessed or dirty flag of the EPT, and the page-modification log has no room.

    A VM exit is due. ``page`` is linear.
    """

    page: int
    access: int


@define(slots=True, eq=False)
class Stepwise:
    """Strict staleness: only a stepped instruction may make the access, so that what it does is known exactly."""

    page: int
    access: int


@define(slots=True, eq=False)
class Unflushed:
    """Strict staleness: the engines have to forget their translations before the access is tried again."""

    page: int
    access: int


@define(slots=True, eq=False)
class StaleUse:
    """Strict staleness: only a stale mapping allows the access, or takes it where it goes.

    ``cached`` is the first entry that the mapping was made from and that is another by ``now``, in the view of the EPT
    that is in use.
    """

    page: int
    access: int
    mapping: Mapping
    cached: EntryRead
    now: int
    view: View


#: Of strict staleness.
Strictness = Stepwise | Unflushed | StaleUse
Refusal = GuestFault | NonCanonical | Violation | Misconfiguration | Unjudged | LogFull | Watched | Strictness


class PagingStructureViolation(Exception):  # noqa: N818 - a guest-physical fault on its way out of a walk
    """The EPT does not allow an access to a guest paging-structure entry, or is misconfigured there."""

    def __init__(self, gpa: int, access: int, leaf: int, needed: int) -> None:
        super().__init__(gpa, access, leaf, needed)
        self.gpa, self.access, self.leaf, self.needed = gpa, access, leaf, needed

    def refusal(self, page: int, access: int) -> Violation | Misconfiguration | LogFull:
        """What it means for the access to a linear page that the walk was for."""
        if self.leaf == MISCONFIGURED:
            return Misconfiguration(page, self.access, self.gpa, final=False)
        return Violation(
            page, self.access, self.gpa, self.leaf, final=False, needed=self.needed, linear_access=access
        )


class ForbiddenStructure(GuestError):  # noqa: N818 - says what happened
    """The view of the EPT does not allow an access of event delivery; a VM exit is due."""

    def __init__(self, violation: Violation, linear: int) -> None:
        super().__init__(f"event delivery reaches GPA {violation.gpa:#x} (linear {linear:#x}), which the view forbids")
        self.violation, self.linear = violation, linear


class LogIsFull(PagingStructureViolation):
    """The EPT allows the access, but a flag would have to be set, and the page-modification log is full."""

    def refusal(self, page: int, access: int) -> LogFull:
        """What it means for the access to a linear page that the walk was for."""
        return LogFull(page, access)


class UnmappedStructure(GuestError):  # noqa: N818 - says what happened
    """Event delivery needs guest-physical memory that does not exist."""

    def __init__(self, gpa: int, linear: int) -> None:
        super().__init__(f"event delivery reaches GPA {gpa:#x} (linear {linear:#x}), where there is no memory")
        self.gpa, self.linear = gpa, linear
