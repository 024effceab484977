"""What is done to guest memory, to the EPT, and to what is cached of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from vmm.ept import Permission
from vmm.errors import OptionError
from vmm.inputs.kind import Input

if TYPE_CHECKING:
    from vmm.machine import Machine


@frozen(slots=True)
class Write(Input):
    """The host wrote ``data`` at ``gpa``."""

    name: ClassVar[str] = "write"

    gpa: int
    data: bytes

    def apply(self, machine: Machine) -> None:
        """Write."""
        machine.write(self.gpa, self.data)


@frozen(slots=True)
class Protect(Input):
    """The host changed what the EPT allows for ``size`` bytes at ``gpa``; ``user_execute`` as in ``Machine``'s."""

    name: ClassVar[str] = "protect"

    gpa: int
    size: int
    access: Permission
    user_execute: bool | None = None
    #: Whether what was cached was invalidated.
    invalidate: bool = True

    def apply(self, machine: Machine) -> None:
        """Protect."""
        user, invalidate = self.user_execute, self.invalidate
        machine.protect(self.gpa, self.size, self.access, user_execute=user, invalidate=invalidate)


@frozen(slots=True)
class ProtectSubPages(Input):
    """The host let only some sub-pages of the page at ``gpa`` be written."""

    name: ClassVar[str] = "sub-pages"

    gpa: int
    writable: int

    def apply(self, machine: Machine) -> None:
        """Protect them."""
        machine.protect_sub_pages(self.gpa, self.writable)


@frozen(slots=True)
class Alias(Input):
    """The host made ``size`` bytes at ``gpa`` lead to the frames at ``target``."""

    name: ClassVar[str] = "alias"

    gpa: int
    target: int
    size: int

    def apply(self, machine: Machine) -> None:
        """Alias."""
        machine.alias(self.gpa, self.target, self.size)


@frozen(slots=True)
class Invept(Input):
    """INVEPT by the host: of the EPT that ``eptp`` selects, None for all."""

    name: ClassVar[str] = "invept"

    eptp: int | None

    def apply(self, machine: Machine) -> None:
        """Invalidate."""
        machine.invept(self.eptp)


@frozen(slots=True)
class Invvpid(Input):
    """INVVPID by the host, of a type 0 to 3; ``vpid`` and ``linear`` as far as the type has them."""

    name: ClassVar[str] = "invvpid"

    type: int
    vpid: int | None
    linear: int | None

    def apply(self, machine: Machine) -> None:
        """Invalidate."""
        machine.invvpid(self.type, vpid=self.vpid, linear=self.linear)


@frozen(slots=True)
class Seal(Input):
    """The host sealed ``size`` bytes at ``gpa``."""

    name: ClassVar[str] = "seal"

    gpa: int
    size: int

    def apply(self, machine: Machine) -> None:
        """Seal."""
        machine.seal(self.gpa, self.size)


@frozen(slots=True)
class Approve(Input):
    """The host let ``size`` bytes at ``gpa`` be executed, under a W^X policy."""

    name: ClassVar[str] = "approve"

    gpa: int
    size: int

    def apply(self, machine: Machine) -> None:
        """Approve."""
        machine.approve(self.gpa, self.size)


@frozen(slots=True)
class Hide(Input):
    """The host had ``data`` executed in place of what is at ``gpa``, by a hidden patch."""

    name: ClassVar[str] = "hide"

    gpa: int
    data: bytes

    def apply(self, machine: Machine) -> None:
        """Hide it."""
        machine.patch_hidden(self.gpa, self.data)


@frozen(slots=True)
class Reveal(Input):
    """The host removed the hidden patch of this ``number``: how many there had been before it."""

    name: ClassVar[str] = "reveal"

    number: int

    def apply(self, machine: Machine) -> None:
        """Remove it."""
        patches = machine.monitors.patches
        if self.number >= len(patches):
            raise OptionError(f"hidden patch {self.number}", where="reveal", fix="name one that there is")
        patches[self.number].remove()


@frozen(slots=True)
class JournalWindows(Input):
    """The host had journaled what was written through open windows."""

    name: ClassVar[str] = "journal"

    def apply(self, machine: Machine) -> None:
        """Journal it."""
        machine.journal_windows()


@frozen(slots=True)
class DrainLog(Input):
    """The host emptied the page-modification log of a vCPU, and if ``clean`` cleared the dirty flags of its pages.

    A ``vcpu`` of None, in old traces, is the one at work.
    """

    name: ClassVar[str] = "drain"

    clean: bool
    vcpu: int | None = None

    def apply(self, machine: Machine) -> None:
        """Empty it."""
        machine.drain_log(clean=self.clean, vcpu=self.vcpu)
