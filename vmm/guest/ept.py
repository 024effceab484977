"""``[ept]`` of a manifest: what the EPT of the guest's processor can do, and what of it is enabled.

The keys are the names of the switches of ``EptProfile``, those of ``[ept.capabilities]`` the names of the fields of
``Capabilities``. The header of a trace has the same table, with nothing in it but what is not as by default.
"""

from __future__ import annotations

from typing import Any, Final

from attrs import evolve, fields, frozen

from vmm.ept import PROFILES, Capabilities, EptProfile, Permission
from vmm.errors import OptionError
from vmm.guest.fields import PAGE, U32_MAX, Table

_DEFAULT: Final = PROFILES["default"]
_SWITCHES: Final = tuple(each.name for each in fields(EptProfile) if isinstance(getattr(_DEFAULT, each.name), bool))
_WIDTH: Final = "physical_address_width"
_CAPABILITIES: Final = tuple(each.name for each in fields(Capabilities))
KEYS: Final = ("profile", "capabilities", *_SWITCHES)
#: In a manifest the table says what is allowed at the start, too.
MANIFEST_KEYS: Final = (*KEYS, "map")
_MAPS_LIMIT: Final = 1024
_LETTERS: Final = "rwxu"
_MODES: Final = len(_LETTERS)


@frozen(slots=True)
class EptMap:
    """What the EPT allows for ``length`` bytes at ``gpa``, both multiples of 4096, when the guest starts.

    ``user_execute`` is whether fetches from user-mode linear addresses are allowed; None: as X says.
    """

    gpa: int
    length: int
    access: Permission
    user_execute: bool | None = None
    #: Bit n: whether sub-page n of each page may be written, although ``access`` does not say so.
    sub_pages: int = 0


def ept_of(table: Table) -> EptProfile:
    """The profile that an ``[ept]`` table makes; raises ``ManifestError``."""
    profile = PROFILES[table.choice("profile", tuple(PROFILES), default="default")]
    try:
        capabilities = _capabilities_of(table.table("capabilities", _CAPABILITIES), profile.capabilities)
        switches = {name: table.boolean(name, default=getattr(profile, name)) for name in _SWITCHES}
        return evolve(profile, capabilities=capabilities, **switches)
    except OptionError as problem:
        raise table.error("", problem.what, problem.fix) from None


def maps_of(table: Table, profile: EptProfile, memory: int) -> tuple[EptMap, ...]:
    """The entries of ``[[ept.map]]``, for ``memory`` bytes of RAM; raises ``ManifestError``."""
    entries = table.tables("map", "[ept.map]", ("gpa", "length", "access", "sub_pages"), _MAPS_LIMIT)
    return tuple(_map_of(entry, profile, memory) for entry in entries)


def _map_of(table: Table, profile: EptProfile, memory: int) -> EptMap:
    gpa = table.integer("gpa", 0, memory - PAGE, multiple=PAGE)
    length = table.integer("length", PAGE, memory, multiple=PAGE)
    if gpa + length > memory:
        raise table.error("length", f"{gpa:#x}+{length:#x} lies out of RAM, which ends at {memory:#x}", "map less")
    text = table.string("access", longest=_MODES)
    modes = len(text) == _MODES
    if len(text) < _MODES - 1 or any(c not in (letter, "-") for c, letter in zip(text, _LETTERS, strict=False)):
        raise table.error("access", f'"{text}" is no access', 'write "r-x", or with mode-based execute control "r-xu"')
    if modes and not profile.mode_based_execute:
        raise table.error("access", f'"{text}" needs mode-based execute control', "set [ept].mode_based_execute")
    if text[1] == "w" and text[2:] not in ("-", "--"):
        raise table.error("access", f'"{text}" is writable and executable', "a frame is never both: give one")
    sub_pages = table.integer("sub_pages", 0, U32_MAX, default=0)
    if sub_pages and (text != "r--" or not profile.sub_page_write):
        fix = 'set [ept].sub_page_write, and access = "r--"'
        raise table.error("sub_pages", "only a read-only page has them, with sub-page write permissions", fix)
    return EptMap(gpa, length, Permission.parse(text[:3]), text[3] == "u" if modes else None, sub_pages)


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
