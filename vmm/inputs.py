"""What reaches a machine from outside: all of a run that does not follow from the image and the manifest.

There are two sorts. The guest *reads* a device whose answer comes from the host (``PortRead``); everything else is
something that the host *does* to the machine at a record: an action of a script, a call of ``Machine``'s methods, the
decision of a handler. Both pass through ``Inputs``, which tells a listener (the trace sink) of each before it takes
effect. ``vmm.player`` has a machine take the same inputs from a trace again.

A new kind of input is one class here: its fields are those of its trace line, ``apply`` does it again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import attrs
from attrs import frozen

from vmm.cpu.events import Event, EventType
from vmm.ept import Permission
from vmm.errors import OptionError
from vmm.exits import Json

if TYPE_CHECKING:
    from vmm.cpu.context import Context
    from vmm.devices import Device
    from vmm.machine import Machine

U64_MAX: Final = 0xFFFF_FFFF_FFFF_FFFF
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})*", re.ASCII)
_EVENT_TYPES: Final = {kind.name.lower().replace("_", " "): kind for kind in EventType}


@frozen(slots=True)
class Input:
    """One input. ``name`` is what its trace line has under ``input``."""

    name: ClassVar[str] = ""

    def to_json(self) -> Json:
        """The input's name and fields, as its trace line has them."""
        return {"input": self.name, **{key: _to_json(value) for key, value in _values(self)}}

    def apply(self, machine: Machine) -> None:
        """Do it again; raises ``OptionError`` where the machine refuses it. Reads and decisions are asked for."""


@frozen(slots=True)
class PortRead(Input):
    """IN of ``size`` bytes (1, 2, 4) got ``value`` from a device that the host stands behind."""

    name: ClassVar[str] = "port"

    port: int
    size: int
    value: int


@frozen(slots=True)
class Decision(Input):
    """What a handler made of the exit before it: an event in its place; None: it has dealt with the exit."""

    name: ClassVar[str] = "decision"

    event: Event | None


@frozen(slots=True)
class Answer(Input):
    """The IN at this exit is to read ``value``, whatever its device says."""

    name: ClassVar[str] = "answer"

    value: int

    def apply(self, machine: Machine) -> None:
        """Answer."""
        machine.answer(self.value)


@frozen(slots=True)
class Inject(Input):
    """An event for the next VM entry of a vCPU; None, in old traces: of the one at work."""

    name: ClassVar[str] = "inject"

    event: Event
    vcpu: int | None = None

    def apply(self, machine: Machine) -> None:
        """Inject."""
        machine.inject(self.event, vcpu=self.vcpu)


@frozen(slots=True)
class Interrupt(Input):
    """An external interrupt was raised at a vCPU: a ``vector`` of 0 to 255."""

    name: ClassVar[str] = "interrupt"

    vector: int
    vcpu: int

    def apply(self, machine: Machine) -> None:
        """Raise it."""
        machine.interrupt(self.vector, vcpu=self.vcpu)


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
class MonitorTrap(Input):
    """The host switched the monitor trap flag of a vCPU."""

    name: ClassVar[str] = "monitor_trap_flag"

    vcpu: int
    on: bool

    def apply(self, machine: Machine) -> None:
        """Switch it."""
        machine.monitor_trap_flag(self.vcpu, on=self.on)


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


@frozen(slots=True)
class SetRegisters(Input):
    """A handler or an acting observer left registers of a vCPU with new values, by their names in a state file."""

    name: ClassVar[str] = "registers"

    vcpu: int
    values: dict[str, int]

    def apply(self, machine: Machine) -> None:
        """Set them."""
        if self.vcpu >= len(machine.vcpus):
            raise OptionError(f"vCPU {self.vcpu}", where="registers", fix="name one that there is")
        for name, value in self.values.items():
            machine.vcpus[self.vcpu].context.set_register(name, value)


@frozen(slots=True)
class Stop(Input):
    """The host ended the run."""

    name: ClassVar[str] = "stop"

    def apply(self, machine: Machine) -> None:
        """Stop."""
        machine.stop()


KINDS: Final[dict[str, type[Input]]] = {kind.name: kind for kind in Input.__subclasses__()}
#: Called with each input before it takes effect, and with how many others are being carried out around it.
Listener = Callable[[Input, int], None]
#: Answers an IN (port, size) in place of all devices; None: nobody is there.
PortSource = Callable[[int, int], int | None]


class Inputs:
    """The place that every input of one machine passes."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        #: In a replay, where the values of IN come from.
        self.source: PortSource | None = None
        #: The registers that a handler may change: those of each vCPU.
        self.contexts: list[Context] = []
        self._depth = 0
        self._unrepeatable = False

    def note(self, given: Input) -> None:
        """An input is about to take effect; raises ``OptionError`` where a recording could not tell the place of it."""
        if self.listener is not None:
            if self._unrepeatable:
                raise _unrepeatable(given.name)
            self.listener(given, self._depth)

    @contextmanager
    def during(self, given: Input) -> Iterator[None]:
        """An input takes effect in the ``with`` block, and may cause records, at which others come."""
        self.note(given)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @contextmanager
    def unrepeatable(self) -> Iterator[None]:
        """Nothing may reach a machine that is recorded in the ``with`` block, which is at no record of the run."""
        before, self._unrepeatable = self.registers(), True
        try:
            yield
            self.registers_after(before)
        finally:
            self._unrepeatable = False

    def read(self, port: int, size: int, device: Device | None) -> int | None:
        """What an IN gets from outside; None if there is neither a device nor a recorded answer."""
        if self.source is not None:
            value = self.source(port, size)
        else:
            value = None if device is None else device.read(port, size)
        if value is not None:
            value &= (1 << 8 * size) - 1
            self.note(PortRead(port, size, value))
        return value

    def decided(self, decision: Event | bool) -> None:  # noqa: FBT001 - the value that a handler returned
        """A handler has decided about the exit that is under way."""
        self.note(Decision(decision if isinstance(decision, Event) else None))

    def registers(self) -> list[bytes]:
        """The registers before somebody may change them, for ``registers_after``; empty if nobody wants to know."""
        return [] if self.listener is None else [context.snapshot() for context in self.contexts]

    def registers_after(self, before: list[bytes]) -> None:
        """Note which registers were changed since ``registers``."""
        for vcpu, old in enumerate(before):
            changed = self.contexts[vcpu].changed_since(old)
            if changed:
                self.note(SetRegisters(vcpu, changed))


def _unrepeatable(what: str) -> OptionError:
    where, fix = "what a monitor does", "only look, or record the run without it"
    return OptionError(f"an input ({what}) at no record of the trace", where=where, fix=fix)


# Trace lines


def parse(line: Mapping[str, Any]) -> Input:
    """The input of a trace line; raises ``ValueError``, with what is wrong, for one that no run could have."""
    name = line.get("input")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"no such input: {str(name)[:40]!a}")
    return kind(**{field.name: _from_json(field, line) for field in attrs.fields(kind)})


def _from_json(field: attrs.Attribute[Any], line: Mapping[str, Any]) -> Any:  # noqa: ANN401 - one of _READERS' types
    if field.name not in line and field.default is not attrs.NOTHING:
        return field.default
    try:
        return _READERS[str(field.type)](line[field.name])
    except (KeyError, TypeError, ValueError, AttributeError, OptionError):
        raise ValueError(f"{line.get('input')} with an unusable {field.name}") from None


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= U64_MAX:
        raise ValueError(value)
    return value


def _boolean(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(value)
    return value


def _numbers(value: Any) -> tuple[int, ...]:  # noqa: ANN401 - a JSON value
    return tuple([_number(each) for each in value])


def _bytes(value: Any) -> bytes:  # noqa: ANN401 - a JSON value
    if not _HEX.fullmatch(value):
        raise ValueError(value)
    return bytes.fromhex(value)


def _event(value: Any) -> Event:  # noqa: ANN401 - a JSON value
    return Event(
        vector=_number(value["vector"]),
        type=_EVENT_TYPES[value["type"]],
        error_code=_optional(_number, value["error_code"]),
        length=_number(value["length"]),
        cr2=_optional(_number, value["cr2"]),
        dr6=_number(value["dr6"]),
    )


def _registers(value: Any) -> dict[str, int]:  # noqa: ANN401 - a JSON value
    found = {str(name): each for name, each in value.items()}
    if not all(type(each) is int and 0 <= each < 1 << 128 for each in found.values()):
        raise ValueError(value)
    return found


T = TypeVar("T")


def _optional(read: Callable[[Any], T], value: object) -> T | None:
    return None if value is None else read(value)


_READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "int": _number,
    "int | None": lambda value: _optional(_number, value),
    "bool": _boolean,
    "tuple[int, ...]": _numbers,
    "bool | None": lambda value: _optional(_boolean, value),
    "bytes": _bytes,
    "Permission": Permission.parse,
    "Event": _event,
    "Event | None": lambda value: _optional(_event, value),
    "dict[str, int]": _registers,
}


def _values(given: Input) -> Iterator[tuple[str, object]]:
    for field in attrs.fields(type(given)):
        yield field.name, getattr(given, field.name)


def _to_json(value: object) -> object:
    match value:
        case bytes():
            return value.hex()
        case Permission():
            return str(value)
        case Event():
            words = {**attrs.asdict(value), "vector": int(value.vector)}
            return {**words, "type": value.type.name.lower().replace("_", " ")}
    return value
