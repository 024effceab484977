"""Which fields the records of each kind have, and what a script may ask of them.

The tables are read from the record classes of :mod:`vmm.exits` and :mod:`vmm.records`, so that a new one can be named
in a script from the day that it exists.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from attrs import frozen

from vmm.exits import ExitReason
from vmm.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class FieldType(enum.Enum):
    """What a field holds; the value is the word for it in messages."""

    NUMBER = "a number"
    TEXT = "a word"
    BYTES = "bytes"
    LIST = "a list of numbers"
    ANY = "a value"


#: The field that a bare word after the kind stands for: ``exit HLT``, ``end port``, ``block created``.
LABELS = {
    "exit": "reason",
    "end": "reason",
    "block": "event",
    "modification": "cause",
    "injection": "type",
    "refusal": "rule",
    "view": "event",
}

#: Kinds whose records carry fields beyond the ones listed.
OPEN_KINDS = frozenset({"end"})

#: JSON names that differ from the attribute's.
_RENAMED = {"frame": {"before": "from", "after": "to"}}

#: Fields that ``to_json`` adds to the attributes.
_ADDED = {
    "exit": {"reason": FieldType.TEXT, "number": FieldType.NUMBER},
    "modification": {"size": FieldType.NUMBER},
    "end": {"port": FieldType.NUMBER, "value": FieldType.NUMBER},
}

_ANNOTATIONS = {
    "int": FieldType.NUMBER,
    "str": FieldType.TEXT,
    "bytes": FieldType.BYTES,
    "tuple": FieldType.LIST,
}


@frozen
class Schema:
    """The fields of every kind, and of every exit by the name of its reason."""

    kinds: Mapping[str, Mapping[str, FieldType]]
    exits: Mapping[str, Mapping[str, FieldType]]

    @classmethod
    def of_records(cls) -> Schema:
        """Read the schema off all record classes that exist now."""
        kinds: dict[str, dict[str, FieldType]] = {}
        exits: dict[str, dict[str, FieldType]] = {}
        for record in _record_classes(Record):
            fields = {**_ADDED.get(record.kind, {}), **_own_fields(record)}
            kinds.setdefault(record.kind, {}).update(fields)
            reason = getattr(record, "reason", None)
            if isinstance(reason, ExitReason):
                exits.setdefault(reason.name, {}).update(fields)
        return cls(kinds, exits)

    def fields(self, kind: str, label: str | None) -> Mapping[str, FieldType]:
        """The fields of records of ``kind``; of one exit reason if ``label`` names it."""
        if kind == "exit" and label is not None:
            return self.exits.get(label, self.kinds[kind])
        return self.kinds[kind]


def _record_classes(parent: type[Record]) -> Iterator[type[Record]]:
    for child in parent.__subclasses__():
        if child.kind:
            yield child
        yield from _record_classes(child)


def _own_fields(record: type[Record]) -> dict[str, FieldType]:
    renamed = _RENAMED.get(record.kind, {})
    fields = {}
    for attribute in getattr(record, "__attrs_attrs__", ()):
        words = str(getattr(attribute.type, "__name__", attribute.type)).replace("[", " ").split()
        if words[0] in _ANNOTATIONS:
            fields[renamed.get(attribute.name, attribute.name)] = _ANNOTATIONS[words[0]]
    return fields
