"""Entries, exit qualifications and walks laid open for people, field by field, with the manual's sections."""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vmm.ept.bits import MEMORY_TYPE_SHIFT, page_mask, shift_of
from vmm.ept.capabilities import EptProfile
from vmm.ept.entry import NAMES, EptEntry, MemoryType
from vmm.ept.rules import EntryRules
from vmm.ept.tables import ExtendedPageTables

_FORMATS: Final = "29.3.2"
_MISCONFIGURATIONS: Final = "29.3.3.1"
_VIOLATIONS: Final = "29.3.3.2"
_PRIORITIES: Final = "29.3.3.3"
_SUB_PAGE: Final = "29.3.4"
_ACCESSED_DIRTY: Final = "29.3.5"
_MEMORY_TYPES: Final = "29.3.7.2"
_QUALIFICATION: Final = "table 28-7"

_SIZES: Final = {1: "4 KiB", 2: "2 MiB", 3: "1 GiB"}
_TYPES: Final = {int(value): value.name for value in MemoryType}

#: What a bit of the exit qualification says when it is set and when it is clear.
_SAYS: Final = (
    (0, "no data read", "the access was a data read"),
    (1, "no data write", "the access was a data write"),
    (2, "no instruction fetch", "the access was an instruction fetch"),
    (3, "some entry forbids reads, or is not present", "every entry allows reads"),
    (4, "some entry forbids writes, or is not present", "every entry allows writes"),
    (5, "some entry forbids fetches (X), or is not present", "every entry allows fetches (X)"),
    (6, "some entry forbids fetches from user-mode linear addresses", "every entry allows those from user-mode"),
    (7, "the guest-linear address is not valid", "the guest-linear address is valid"),
    (8, "an access to a guest paging structure", "an access to the translation of the linear address"),
    (9, "a supervisor-mode linear address", "a user-mode linear address"),
    (10, "the guest maps a read-only page", "the guest maps a read/write page"),
    (11, "the guest maps an executable page", "the guest maps an execute-disable page"),
    (12, "no NMI unblocking due to IRET", "NMI unblocking due to IRET"),
    (13, "no shadow-stack access", "a shadow-stack access"),
    (14, "the page is no supervisor shadow-stack page", "the page is a supervisor shadow-stack page"),
    (15, "not caused by guest-paging verification", "caused by guest-paging verification"),
    (16, "not asynchronous", "asynchronous to instruction execution"),
)


@frozen(slots=True)
class Field:
    """One field: its bits ("3" or "5:3"), its value, what that means, and the section of SDM vol. 3 that says so."""

    bits: str
    value: int
    meaning: str
    section: str


@frozen(slots=True)
class Explanation:
    """``what`` was explained, the ``verdict`` on it with its section, and its fields from bit 0 up."""

    what: str
    verdict: str
    section: str
    fields: tuple[Field, ...]


@frozen(slots=True)
class WalkExplanation:
    """The entries that a processor reads for a GPA, from the top, and what decides, with its section."""

    gpa: int
    entries: tuple[Explanation, ...]
    verdict: str
    section: str


def explain_qualification(raw: int, profile: EptProfile) -> Explanation:
    """The exit qualification of an EPT violation, 64 bits, as a processor of this profile gives it."""
    undefined = _undefined(raw, profile)
    fields = []
    for bit, clear, is_set in _SAYS:
        value = raw >> bit & 1
        meaning = undefined.get(bit) or (is_set if value else clear)
        fields.append(Field(str(bit), value, meaning, _QUALIFICATION))
    rest = raw >> 17
    if rest:
        fields.append(Field("63:17", rest, "not defined", _QUALIFICATION))
    return Explanation(f"exit qualification {raw:#x}", _refused(raw), _QUALIFICATION, tuple(fields))


def _undefined(raw: int, profile: EptProfile) -> dict[int, str]:
    """Why bits say nothing, given the others and the processor."""
    linear, final = raw >> 7 & 1, raw >> 7 & raw >> 8 & 1
    out = {14: "undefined without bit 7 of the EPTP"}
    if not profile.mode_based_execute:
        out[6] = "undefined without mode-based execute control"
    if not linear:
        out[8] = "reserved where bit 7 is 0"
    why = "" if final else "where bits 7 and 8 are not both 1"
    if not profile.capabilities.advanced_information:
        why = "on a processor without advanced information"
    return out | dict.fromkeys((9, 10, 11), f"undefined {why}") if why else out


def _refused(raw: int) -> str:
    kinds = [name for bit, name in enumerate(("read", "write", "fetch")) if raw >> bit & 1]
    allowed = "".join(letter if raw >> 3 + i & 1 else "-" for i, letter in enumerate("rwx"))
    where = " of a guest paging structure" if raw >> 7 & 1 and not raw >> 8 & 1 else ""
    what = f"a {' and '.join(kinds)}" if kinds else "an access of no kind"
    return f"{what}{where} was refused: the EPT allows {allowed}"


def explain_entry(raw: int, level: int, profile: EptProfile) -> Explanation:
    """An entry of ``level`` 1 to 4 as a processor of this profile takes it."""
    rules = EntryRules.of(profile)
    verdict, section = _judge(raw, level, rules)
    fields = _fields(raw, level, rules) if rules.is_present(raw) else _permissions(raw, rules)
    return Explanation(f"{NAMES[level]} {raw:#x}", verdict, section, tuple(fields))


def explain_walk(ept: ExtendedPageTables, gpa: int, access: str) -> WalkExplanation:
    """The walk for a ``read``, ``write`` or ``fetch`` of a GPA below 2^48; sets no flag.

    Under mode-based execute control a fetch is one from a supervisor-mode linear address.
    """
    path = list(ept.entries(gpa))
    entries = tuple(explain_entry(raw, level, ept.profile) for level, raw in path)
    level, raw = path[-1]
    if not ept.rules.is_present(raw):
        return WalkExplanation(gpa, entries, f"EPT violation: the {NAMES[level]} is not present", _PRIORITIES)
    if ept.rules.misconfigured(raw, level):
        return WalkExplanation(gpa, entries, f"EPT misconfiguration: by the {NAMES[level]}", _PRIORITIES)
    bit = ("read", "write", "fetch").index(access)
    for level, raw in path:
        if not raw >> bit & 1:
            verdict = f"EPT violation: the {NAMES[level]} does not allow a {access}"
            return WalkExplanation(gpa, entries, verdict, _VIOLATIONS)
    level, raw = path[-1]
    mask = page_mask(level)
    hpa = EptEntry.decode(raw, level).address | gpa & ~mask
    return WalkExplanation(gpa, entries, f"the {access} reaches HPA {hpa:#x}", _PRIORITIES)


def _judge(raw: int, level: int, rules: EntryRules) -> tuple[str, str]:
    if not rules.is_present(raw):
        return "not present; all other bits are ignored", _FORMATS
    wrong = rules.misconfigured(raw, level)
    if wrong:
        reasons = ", and ".join(reason.value for reason in wrong)
        bits = rules.reserved_bits(raw, level)
        return f"misconfigured: {reasons}{f' ({_bit_list(bits)})' if bits else ''}", _MISCONFIGURATIONS
    entry = EptEntry.decode(raw, level)
    if entry.leaf:
        return f"maps a page of {_SIZES[level]} at HPA {entry.address:#x}, {entry.permissions}", _FORMATS
    return f"refers to a table at HPA {entry.address:#x}, {entry.permissions}", _FORMATS


def _bit_list(bits: int) -> str:
    numbers = [str(bit) for bit in range(64) if bits >> bit & 1]
    return f"bit{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def _permissions(raw: int, rules: EntryRules) -> list[Field]:
    mode_based = rules.profile.mode_based_execute
    fields = [
        Field("0", raw & 1, _allows(raw & 1, "reads"), _FORMATS),
        Field("1", raw >> 1 & 1, _allows(raw >> 1 & 1, "writes"), _FORMATS),
    ]
    what = "fetches from supervisor-mode linear addresses" if mode_based else "fetches"
    fields.append(Field("2", raw >> 2 & 1, _allows(raw >> 2 & 1, what), _FORMATS))
    if mode_based:
        fields.append(_user_execute(raw, rules))
    return fields


def _user_execute(raw: int, rules: EntryRules) -> Field:
    value = raw >> 10 & 1
    if not rules.profile.mode_based_execute:
        return Field("10", value, "ignored without mode-based execute control", _FORMATS)
    return Field("10", value, _allows(value, "fetches from user-mode linear addresses"), _FORMATS)


def _allows(value: int, what: str) -> str:
    return f"allows {what}" if value else f"forbids {what}"


def _fields(raw: int, level: int, rules: EntryRules) -> list[Field]:
    leaf = bool(raw & rules.level(level).leaf_bit)
    flags = rules.profile.accessed_dirty
    fields = _permissions(raw, rules)[:3]
    fields += _of_page(raw) if leaf else [Field("6:3", raw >> 3 & 0xF, _must_be_0(raw >> 3 & 0xF), _FORMATS)]
    fields.append(_bit_7(raw, level, leaf=leaf))
    fields.append(Field("8", raw >> 8 & 1, _flag(raw >> 8 & 1, "used", enabled=flags), _ACCESSED_DIRTY))
    if leaf:
        fields.append(Field("9", raw >> 9 & 1, _flag(raw >> 9 & 1, "written", enabled=flags), _ACCESSED_DIRTY))
    else:
        fields.append(Field("9", raw >> 9 & 1, "ignored", _FORMATS))
    fields.append(_user_execute(raw, rules))
    fields.append(Field("11", raw >> 11 & 1, "ignored", _FORMATS))
    fields += _address(raw, level, rules, leaf=leaf)
    return fields + (_high_of_page(raw, level) if leaf else [Field("63:52", raw >> 52, "ignored", _FORMATS)])


def _of_page(raw: int) -> list[Field]:
    memory_type, ignore_pat = raw >> MEMORY_TYPE_SHIFT & 7, raw >> 6 & 1
    meaning = f"memory type {_TYPES[memory_type]}" if memory_type in _TYPES else "memory type: reserved"
    pat = "the guest's PAT is ignored" if ignore_pat else "the guest's PAT has its say"
    return [Field("5:3", memory_type, meaning, _MEMORY_TYPES), Field("6", ignore_pat, pat, _MEMORY_TYPES)]


def _bit_7(raw: int, level: int, *, leaf: bool) -> Field:
    value = raw >> 7 & 1
    if level == 1:
        return Field("7", value, "ignored", _FORMATS)
    if leaf:
        return Field("7", value, f"maps a page of {_SIZES[level]}", _FORMATS)
    meaning = _must_be_0(value)
    return Field("7", value, meaning if level == 4 or value else "refers to a table", _FORMATS)


def _flag(value: int, what: str, *, enabled: bool) -> str:
    if not enabled:
        return f"ignored without accessed and dirty flags ({what})"
    return what if value else f"not {what} yet"


def _address(raw: int, level: int, rules: EntryRules, *, leaf: bool) -> list[Field]:
    width = rules.profile.capabilities.physical_address_width
    low = shift_of(level) if leaf else 12
    fields = []
    if low > 12:
        value = raw >> 12 & (1 << low - 12) - 1
        fields.append(Field(f"{low - 1}:12", value, _must_be_0(value), _FORMATS))
    address = raw & (1 << width) - (1 << low)
    what = "the page" if leaf else "the next table"
    fields.append(Field(f"{width - 1}:{low}", address >> low, f"address of {what}: {address:#x}", _FORMATS))
    if width < 52:
        value = raw >> width & (1 << 52 - width) - 1
        fields.append(Field(f"51:{width}", value, _must_be_0(value), _FORMATS))
    return fields


def _must_be_0(value: int) -> str:
    return "reserved, must be 0, and is not" if value else "reserved"


def _high_of_page(raw: int, level: int) -> list[Field]:
    def one(bit: int, meaning: str, section: str = _FORMATS) -> Field:
        return Field(str(bit), raw >> bit & 1, meaning, section)

    return [
        Field("56:52", raw >> 52 & 0x1F, "ignored", _FORMATS),
        one(57, "verify guest paging, under guest-paging verification", _VIOLATIONS),
        one(58, "paging-write access, under EPT paging-write control", _VIOLATIONS),
        one(59, "ignored"),
        one(60, "supervisor shadow stack, with bit 7 of the EPTP", _VIOLATIONS),
        one(61, "sub-page write permissions, under that control", _SUB_PAGE) if level == 1 else one(61, "ignored"),
        one(62, "ignored"),
        one(63, "suppress #VE, under EPT-violation #VE"),
    ]


__all__ = [
    "Explanation",
    "Field",
    "WalkExplanation",
    "explain_entry",
    "explain_qualification",
    "explain_walk",
]
