"""Why a translation was refused, kept for the VM exit or the fault that follows."""

from __future__ import annotations

from attrs import define

from vmm.errors import GuestError


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


Refusal = GuestFault | NonCanonical | Violation | Misconfiguration | Unjudged


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
