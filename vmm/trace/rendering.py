"""One record as a line for people: what it is, where it came from, and what is to be said about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from attrs import field, frozen

from vmm.cpu.events import Vector
from vmm.ept import Qualification
from vmm.exits import Cpuid, EptViolation, ExceptionExit, Exit, IoInstruction, Mtf
from vmm.guest.files import one_line
from vmm.memory import PAGE
from vmm.records import (
    BlockEvent,
    DeviceAccess,
    End,
    FrameEvent,
    Injection,
    LogEntry,
    Modification,
    Record,
    RefusedAccess,
    StaleExecution,
    StaleTranslation,
    ViewEvent,
)
from vmm.trace.painter import Style

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from vmm.trace.names import Names
    from vmm.trace.patches import Patch

_BYTES_SHOWN: Final = 16
_ADDRESSES_SHOWN: Final = 4
#: Fields that make two records of one type different for the eye.
_SHAPE: Final = (
    *("rip", "qualification", "vector", "cause", "event", "before", "after", "rule", "access", "view", "vcpu"),
)
_VECTORS: Final = frozenset(Vector)


@frozen(slots=True)
class Line:
    """The columns of one record, and styled lines that belong below it."""

    kind: str
    where: str
    what: str
    style: Style = Style.PLAIN
    below: tuple[tuple[Style, str], ...] = ()


@frozen(slots=True)
class Entry:
    """A record with its number, or several writes to the console, ``first`` to ``seq``, that make ``text``.

    ``patch`` and ``dead`` belong to a modification: its code, and for each block that died what it was.
    """

    seq: int
    record: Record
    first: int
    text: bytes = b""
    patch: Patch | None = None
    dead: Mapping[int, str] = field(factory=dict)

    @property
    def shape(self) -> Hashable:
        """What entries of a loop have in common."""
        record = self.record
        own = tuple(getattr(record, name, None) for name in _SHAPE)
        size = len(record.new) if isinstance(record, Modification) else 0
        return type(record), own, size, bool(self.text)


def line_of(entry: Entry, names: Names) -> Line:
    """The line of an entry."""
    record = entry.record
    if entry.text:
        return _console(entry, names)
    if isinstance(record, Modification):
        return _modification(record, entry, names)
    render = _RENDERERS.get(type(record))
    if render is not None:
        return render(record, names)
    return _any_exit(record, names) if isinstance(record, Exit) else Line(record.kind, "", "")


def vector_name(vector: int) -> str:
    """``#PF`` and the like, or the number."""
    return f"#{Vector(vector).name}" if vector in _VECTORS else f"vector {vector:#x}"


def _console(entry: Entry, names: Names) -> Line:
    record: Any = entry.record
    text = one_line(entry.text.decode("utf-8", "replace"))
    times = entry.seq - entry.first + 1
    count = f" x {times}" if times > 1 else ""
    return Line("IO_INSTRUCTION", names.code(record.rip), f'out {record.port:#x}{count}: "{text}"', Style.QUIET)


def _modification(record: Modification, entry: Entry, names: Names) -> Line:
    where = "" if record.rip is None else names.code(record.rip)
    change = "the same bytes" if record.old == record.new else f"{_hex(record.old)} -> {_hex(record.new)}"
    cause = "" if record.cause == "store" else f" by {record.cause}"
    below = [(Style.QUIET, f"drops {entry.dead.get(number, f'block {number}')}") for number in record.blocks]
    if entry.patch is not None and record.old != record.new:
        old, new = entry.patch.difference()
        below[:0] = [
            *((Style.OLD, f"- {names.instruction(text)}") for text in old),
            *((Style.NEW, f"+ {names.instruction(text)}") for text in new),
        ]
    what = f"{names.memory(record.gpa, record.gva)}: {change}{cause}"
    return Line("modification", where, what, Style.CHANGE, tuple(below))


def _hex(data: bytes) -> str:
    more = len(data) - _BYTES_SHOWN
    return data.hex() if more <= 0 else f"{data[:_BYTES_SHOWN].hex()}... ({len(data)} bytes)"


def _violation(record: EptViolation, names: Names) -> Line:
    words = str(Qualification.decode(record.qualification))
    view = "" if record.view is None else f" in view {record.view}"
    what = f"{words}{view}: {names.memory(record.gpa, record.gva)}"
    return Line("EPT_VIOLATION", names.code(record.rip), what, Style.TRAP)


def _mtf(record: Mtf, names: Names) -> Line:
    return Line("MTF", names.code(record.rip), "the one instruction is done", Style.QUIET)


def _io(record: IoInstruction, names: Names) -> Line:
    arrow = "->" if record.direction == "in" else "<-"
    what = f"{record.direction} port {record.port:#x} {arrow} {record.value:#0{2 * record.size + 2}x}"
    return Line("IO_INSTRUCTION", names.code(record.rip), what)


def _device(record: DeviceAccess, names: Names) -> Line:
    arrow = "->" if record.direction == "read" else "<-"
    what = f"{record.direction} {record.gpa:#x} {arrow} {record.value:#0{2 * record.size + 2}x}"
    return Line("device", names.code(record.rip), what)


def _exception(record: ExceptionExit, names: Names) -> Line:
    words = [vector_name(record.vector)]
    if record.error_code is not None:
        words.append(f"error code {record.error_code:#x}")
    if record.address is not None:
        words.append(f"address {record.address:#x}")
    return Line("EXCEPTION_OR_NMI", names.code(record.rip), ", ".join(words), Style.EVENT)


def _injection(record: Injection, names: Names) -> Line:
    code = "" if record.error_code is None else f", error code {record.error_code:#x}"
    what = f"{vector_name(record.vector)} as {record.type}{code}, to its handler"
    return Line("injection", names.code(record.rip), what, Style.EVENT)


def _cpuid(record: Cpuid, names: Names) -> Line:
    return Line("CPUID", names.code(record.rip), f"leaf {record.leaf:#x}, subleaf {record.subleaf:#x}")


def _stale(record: StaleExecution, names: Names) -> Line:
    who = "the host" if record.writer is None else names.code(record.writer)
    writer = who if record.vcpu == record.writer_vcpu or record.vcpu is None else f"{who} of vCPU {record.writer_vcpu}"
    what = f"ran {record.executed.hex()}, but {writer} has written {record.memory.hex()}; missing: {record.missing}"
    return Line("stale", names.code(record.rip), what, Style.BAD)


def _stale_translation(record: StaleTranslation, names: Names) -> Line:
    who = "the host" if record.writer is None else names.code(record.writer)
    if record.time is None:
        who = "somebody"
    elif record.vcpu is not None and record.vcpu != record.writer_vcpu:
        who += f" of vCPU {record.writer_vcpu}"
    place = names.memory(record.gpa, record.gva)
    changed = f"the {record.entry} at {record.place:#x} was {record.old:#x}, {who} has made it {record.new:#x}"
    below = ((Style.BAD, f"missing: {record.missing}; {changed}"),)
    return Line("stale TLB", names.code(record.rip), f"{record.access} of {place} by a stale mapping", Style.BAD, below)


def _frame(record: FrameEvent, names: Names) -> Line:
    what = f"{record.gpa:#x}: {record.before} -> {record.after} ({record.cause})"
    return Line("frame", names.code(names.linked(record.gpa)), what, Style.QUIET)


def _view(record: ViewEvent, names: Names) -> Line:
    where = "" if record.rip is None else names.code(record.rip)
    what = f"view {record.view} {record.event}"
    if record.gpa is not None and record.size is not None:
        lot = f"{record.size:#x} bytes at {names.memory(record.gpa, None)}"
        done = f"at most {record.access}" if record.target is None else f"lead to {names.memory(record.target, None)}"
        what = f"{what}: {lot} {done}"
    return Line("view", where, f"{what} by {record.cause.replace('vmfunc', 'VMFUNC')}", Style.EVENT)


def _refusal(record: RefusedAccess, names: Names) -> Line:
    deed = "store" if record.access == "write" else record.access
    at = "" if record.gva is None else f" at {record.gva:#x}"
    what = f"frame {record.gpa & -PAGE:#x} {_reason(record)}; the {deed}{at} is refused"
    return Line("refusal", names.code(record.rip), what, Style.BAD)


def _reason(record: RefusedAccess) -> str:
    if record.rule == "seal":
        return "is sealed"
    if record.rule == "tracking":
        return "is in use by more aliases than are tracked"
    if record.rule == "approval":
        return "is written and not approved"
    return f"is executable at {_addresses(record.executable)} and writable at {_addresses(record.writable)}"


def _addresses(addresses: tuple[int, ...]) -> str:
    shown = [f"{address:#x}" for address in addresses[:_ADDRESSES_SHOWN]]
    more = len(addresses) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _block(record: BlockEvent, names: Names) -> Line:
    cause = "" if record.event == "created" else f" ({record.cause})"
    owner = "" if record.owner is None else f" of vCPU {record.owner}"
    what = f"block {record.block}{owner} {record.event}{cause}: {record.size} bytes at GPA {record.gpa:#x}"
    return Line("block", names.code(record.gva), what, Style.QUIET)


def _log(record: LogEntry, names: Names) -> Line:
    what = f"{names.memory(record.gpa, None)}: modified, entry {record.index} of the page-modification log"
    return Line("log", "", what, Style.QUIET)


def _end(record: End, names: Names) -> Line:
    return Line("end", names.code(record.rip), record.reason, Style.STRONG)


def _any_exit(record: Exit, names: Names) -> Line:
    fields = {name: value for name, value in record.to_json().items() if name not in _COMMON}
    what = ", ".join(f"{n} {v:#x}" if isinstance(v, int) else f"{n} {v}" for n, v in fields.items())
    bad = Style.BAD if record.reason.name == "TRIPLE_FAULT" else Style.PLAIN
    return Line(record.reason.name, names.code(record.rip), what, bad)


_COMMON: Final = frozenset({"kind", "reason", "number", "rip", "length", "vcpu"})
_RENDERERS: Final[dict[type[Record], Callable[[Any, Names], Line]]] = {
    EptViolation: _violation,
    Mtf: _mtf,
    IoInstruction: _io,
    DeviceAccess: _device,
    ExceptionExit: _exception,
    Injection: _injection,
    Cpuid: _cpuid,
    FrameEvent: _frame,
    RefusedAccess: _refusal,
    ViewEvent: _view,
    BlockEvent: _block,
    StaleExecution: _stale,
    StaleTranslation: _stale_translation,
    LogEntry: _log,
    End: _end,
}
