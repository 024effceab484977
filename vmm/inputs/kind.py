"""What every kind of input has: its name, its fields, and its trace line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final

import attrs
from attrs import frozen

from vmm.cpu.events import Event, EventType
from vmm.ept import Permission
from vmm.records import Json

if TYPE_CHECKING:
    from vmm.machine import Machine

#: Types of events, as trace lines name them.
EVENT_TYPES: Final = {kind.name.lower().replace("_", " "): kind for kind in EventType}


@frozen(slots=True)
class Input:
    """One input. ``name`` is what its trace line has under ``input``."""

    name: ClassVar[str] = ""

    def to_json(self) -> Json:
        """The input's name and fields, as its trace line has them."""
        return {"input": self.name, **{key: _to_json(value) for key, value in _values(self)}}

    def apply(self, machine: Machine) -> None:
        """Do it again; raises ``OptionError`` where the machine refuses it. Reads and decisions are asked for."""


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
