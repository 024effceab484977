"""``[views]`` of a manifest: the views of the EPT that a guest finds, and what it may do about them itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from attrs import frozen

from vmm.control_fields import EPTP_LIST_LENGTH
from vmm.ept.bits import GPA_LIMIT
from vmm.ept.entry import Permission
from vmm.ept.views import VIEWS_LIMIT
from vmm.guest.fields import PAGE

if TYPE_CHECKING:
    from vmm.ept import EptProfile
    from vmm.guest.fields import Table
    from vmm.host_views import HostViews

KEYS: Final = ("count", "eptp_list", "ve_area", "denied", "restrict", "map")
_RESTRICTION_KEYS: Final = ("view", "gpa", "length", "access", "convertible")
_ACCESSES: Final = ("---", "r--", "rw-", "--x", "r-x", "rwx")
_ENTRIES_LIMIT: Final = 1024


@frozen(slots=True)
class Restriction:
    """At most ``access`` for ``length`` bytes at ``gpa`` in a view."""

    view: int
    gpa: int
    length: int
    access: Permission
    convertible: bool


@frozen(slots=True)
class ViewMapping:
    """``length`` bytes at ``gpa`` of a view lead to where ``target`` does in view 0."""

    view: int
    gpa: int
    target: int
    length: int


@frozen(slots=True)
class ViewsSpec:
    """``eptp_list`` has numbers of views, ``ve_area`` is the GPA of the first vCPU's information area.

    ``denied`` is what becomes of an access that a view forbids, if nobody deals with it.
    """

    count: int = 1
    restrictions: tuple[Restriction, ...] = ()
    maps: tuple[ViewMapping, ...] = ()
    eptp_list: tuple[int, ...] = ()
    ve_area: int | None = None
    denied: Literal["stop", "fault"] = "stop"

    def apply(self, views: HostViews, vcpus: int) -> None:
        """Make the views of a machine that has only the first one; raises ``OptionError`` for what it cannot have."""
        for _ in range(1, self.count):
            views.add()
        for each in self.maps:
            views.remap(each.view, each.gpa, each.target, each.length)
        for limit in self.restrictions:
            views.restrict(limit.view, limit.gpa, limit.length, limit.access, convertible=limit.convertible)
        eptps = [views.ept(number).eptp for number in self.eptp_list]
        for vcpu in range(vcpus):
            views.set_eptp_list(eptps, vcpu=vcpu)
            if self.ve_area is not None:
                views.set_ve_area(self.ve_area + vcpu * PAGE, vcpu=vcpu)


#: View 0 and nothing else.
PLAIN: Final = ViewsSpec()


def views_of(table: Table, memory: int, vcpus: int, ept: EptProfile) -> ViewsSpec:
    """The views of a ``[views]`` table, for RAM of ``memory`` bytes; raises ``ManifestError``."""
    count = table.integer("count", 1, VIEWS_LIMIT, default=1)
    restrict = table.tables("restrict", "[views.restrict]", _RESTRICTION_KEYS, _ENTRIES_LIMIT)
    maps = table.tables("map", "[views.map]", ("view", "gpa", "target", "length"), _ENTRIES_LIMIT)
    spec = ViewsSpec(
        count=count,
        restrictions=tuple([_restriction(each, count, memory) for each in restrict]),
        maps=tuple([_mapping(each, count, memory) for each in maps]),
        eptp_list=table.integers("eptp_list", count - 1, EPTP_LIST_LENGTH),
        ve_area=table.maybe_integer("ve_area", 0, memory - vcpus * PAGE, multiple=PAGE),
        denied=table.choice("denied", ("stop", "fault"), default="stop"),
    )
    _check_enabled(table, spec, ept)
    return spec


def _check_enabled(table: Table, spec: ViewsSpec, ept: EptProfile) -> None:
    if spec.eptp_list and not ept.vm_functions:
        raise table.error("eptp_list", "VMFUNC is not enabled", "set [ept].vm_functions = true")
    wanted = "ve_area" if spec.ve_area is not None else ""
    if any(each.convertible for each in spec.restrictions):
        wanted = "restrict"
    if wanted and not ept.virtualization_exceptions:
        raise table.error(wanted, "#VE is not enabled", "set [ept].virtualization_exceptions = true")


def _restriction(table: Table, count: int, memory: int) -> Restriction:
    gpa = table.integer("gpa", 0, memory - PAGE, multiple=PAGE)
    return Restriction(
        view=table.integer("view", 0, count - 1),
        gpa=gpa,
        length=table.integer("length", PAGE, memory - gpa, default=PAGE, multiple=PAGE),
        access=Permission.parse(table.choice("access", _ACCESSES)),
        convertible=table.boolean("convertible", default=False),
    )


def _mapping(table: Table, count: int, memory: int) -> ViewMapping:
    view = table.integer("view", 1, VIEWS_LIMIT - 1)
    if view >= count:
        raise table.error("view", f"there is no view {view}", "raise [views].count")
    gpa = table.integer("gpa", 0, GPA_LIMIT - PAGE, multiple=PAGE)
    target = table.integer("target", 0, memory - PAGE, multiple=PAGE)
    room = min(memory - target, GPA_LIMIT - gpa)
    return ViewMapping(
        view=view,
        gpa=gpa,
        target=target,
        length=table.integer("length", PAGE, room, default=PAGE, multiple=PAGE),
    )
