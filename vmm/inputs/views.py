"""What is done to the views of the EPT, and to the fields that VMFUNC and #VE use."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from vmm.ept import Permission
from vmm.inputs.kind import Input

if TYPE_CHECKING:
    from vmm.machine import Machine


@frozen(slots=True)
class AddView(Input):
    """The host made another view of the EPT, a copy of ``of``."""

    name: ClassVar[str] = "add-view"

    of: int

    def apply(self, machine: Machine) -> None:
        """Make it."""
        machine.views.add(of=self.of)


@frozen(slots=True)
class SwitchView(Input):
    """The host had a vCPU use another view."""

    name: ClassVar[str] = "switch-view"

    view: int
    vcpu: int

    def apply(self, machine: Machine) -> None:
        """Switch."""
        machine.views.switch(self.view, vcpu=self.vcpu)


@frozen(slots=True)
class Restrict(Input):
    """The host changed what a view allows at most for ``size`` bytes at ``gpa``."""

    name: ClassVar[str] = "restrict"

    view: int
    gpa: int
    size: int
    access: Permission
    convertible: bool

    def apply(self, machine: Machine) -> None:
        """Restrict."""
        machine.views.restrict(self.view, self.gpa, self.size, self.access, convertible=self.convertible)


@frozen(slots=True)
class Remap(Input):
    """The host made ``size`` bytes at ``gpa`` lead, in a view, to the frames at ``target``."""

    name: ClassVar[str] = "remap"

    view: int
    gpa: int
    target: int
    size: int

    def apply(self, machine: Machine) -> None:
        """Remap."""
        machine.views.remap(self.view, self.gpa, self.target, self.size)


@frozen(slots=True)
class EptpList(Input):
    """The host set the EPTPs that VMFUNC chooses from."""

    name: ClassVar[str] = "eptp-list"

    entries: tuple[int, ...]
    vcpu: int

    def apply(self, machine: Machine) -> None:
        """Set them."""
        machine.views.set_eptp_list(self.entries, vcpu=self.vcpu)


@frozen(slots=True)
class VeArea(Input):
    """The host set the information area of virtualization exceptions."""

    name: ClassVar[str] = "ve-area"

    gpa: int
    vcpu: int

    def apply(self, machine: Machine) -> None:
        """Set it."""
        machine.views.set_ve_area(self.gpa, vcpu=self.vcpu)
