"""``[ept]`` of a manifest: what the EPT of the guest's processor can do, and what of it is enabled.

The keys are the names of the switches of ``EptProfile``, those of ``[ept.capabilities]`` the names of the fields of
``Capabilities``. The header of a trace has the same table, with nothing in it but what is not as by default.
"""

from __future__ import annotations

from typing import Any, Final

from attrs import evolve, fields

from vmm.ept import PROFILES, Capabilities, EptProfile
from vmm.errors import OptionError
from vmm.guest.fields import Table

_DEFAULT: Final = PROFILES["default"]
_SWITCHES: Final = tuple(each.name for each in fields(EptProfile) if isinstance(getattr(_DEFAULT, each.name), bool))
_WIDTH: Final = "physical_address_width"
_CAPABILITIES: Final = tuple(each.name for each in fields(Capabilities))
KEYS: Final = ("profile", "capabilities", *_SWITCHES)


def ept_of(table: Table) -> EptProfile:
    """The profile that an ``[ept]`` table makes; raises ``ManifestError``."""
    profile = PROFILES[table.choice("profile", tuple(PROFILES), default="default")]
    try:
        capabilities = _capabilities_of(table.table("capabilities", _CAPABILITIES), profile.capabilities)
        switches = {name: table.boolean(name, default=getattr(profile, name)) for name in _SWITCHES}
        return evolve(profile, capabilities=capabilities, **switches)
    except OptionError as problem:
        raise table.error("", problem.what, problem.fix) from None


def _capabilities_of(table: Table, of: Capabilities) -> Capabilities:
    flags = {name: table.boolean(name, default=getattr(of, name)) for name in _CAPABILITIES if name != _WIDTH}
    width = table.integer(_WIDTH, 32, 52, default=of.physical_address_width)
    return Capabilities(**flags, physical_address_width=width)


def ept_from(values: dict[str, Any], origin: str) -> EptProfile:
    """The profile that the values of an ``[ept]`` table make; raises ``ManifestError`` that names ``origin``."""
    return ept_of(Table(values, "[ept]", origin, KEYS))


def ept_values(profile: EptProfile) -> dict[str, Any]:
    """The values of an ``[ept]`` table that makes ``profile``: what is not as by default."""
    values: dict[str, Any] = _differences(profile, _DEFAULT, _SWITCHES)
    capabilities = _differences(profile.capabilities, _DEFAULT.capabilities, _CAPABILITIES)
    return {**values, "capabilities": capabilities} if capabilities else values


def _differences(one: object, other: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(one, name) for name in names if getattr(one, name) != getattr(other, name)}
