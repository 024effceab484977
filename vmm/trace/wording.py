"""Records in the words of a script: a line that, put into a script, expects exactly this record."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from vmm.trace.fields import LABELS, OPEN_KINDS, FieldType, Schema
from vmm.trace.lines import RESERVED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.trace.syntax import Json

_BARE: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)
#: What no line names: the kind stands in front, an exit's number follows from its reason, and only a trace numbers
#: its records.
_IMPLIED: Final = frozenset({"kind", "number", "seq"})
#: Fields that records have only where there are several vCPUs, or views.
_WHERE_SEVERAL: Final = frozenset({"vcpu", "view"})
_SMALL: Final = 10


def as_line(record: Json) -> str:
    """The script line for one record: its kind, its label and all fields that a script can name."""
    return _line(record, Schema.of_records())


def as_script(records: Iterable[Json]) -> str:
    """A script that expects exactly these records, in this order and no others between them.

    What is no record, like the console output in a trace, is passed over.
    """
    schema = Schema.of_records()
    lines = (_line(record, schema) + _absent(record, schema) for record in records if record["kind"] in schema.kinds)
    return "\n".join(["vmm-script/1", *(f"next {line}" for line in lines), ""])


def _line(record: Json, schema: Schema) -> str:
    kind = str(record.get("kind"))
    types = schema.kinds.get(kind, {})
    label_field = LABELS.get(kind)
    label = record.get(label_field) if label_field else None
    words = [kind]
    if isinstance(label, str):
        taken = {*RESERVED, *(types if kind not in OPEN_KINDS else ())}
        words.append(label if _BARE.fullmatch(label) and label not in taken else quoted(label))
    for name, value in record.items():
        spelled = _spelled(value, types.get(name, FieldType.ANY))
        known = name in types or kind in OPEN_KINDS
        if known and name not in {*_IMPLIED, label_field} and spelled is not None:
            words.append(f"{name}={spelled}")
    return " ".join(words)


def _absent(record: Json, schema: Schema) -> str:
    """Conditions that the fields which an exit leaves out are left out."""
    reason = record.get("reason") if record.get("kind") == "exit" else None
    fields = schema.exits.get(reason, {}) if isinstance(reason, str) else {}
    return "".join(f" {name}=none" for name in fields if name not in record and name not in _WHERE_SEVERAL)


def quoted(text: str) -> str:
    """The text in double quotes, as a script writes it; nothing in it reaches a terminal raw."""
    return '"' + "".join(map(_escaped, text)) + '"'


def number(value: int) -> str:
    """The number as people in this field read it: hexadecimal from 10 on."""
    return str(value) if abs(value) < _SMALL else f"{value:#x}"


def value_words(value: Any, type_: FieldType) -> str:  # noqa: ANN401 - a JSON value
    """Any value of a record, for a message."""
    if type(value) is int:
        return number(value)
    spelled = _spelled(value, type_)
    return spelled if spelled is not None else ascii(value)


def _spelled(value: Any, type_: FieldType) -> str | None:  # noqa: ANN401 - a JSON value
    if value is None:
        return "none"
    if type(value) is int:
        return number(value) if value >= 0 else None
    if isinstance(value, list):
        return _list(value)
    if not isinstance(value, str):
        return None
    if type_ is FieldType.BYTES:
        return value if re.fullmatch("([0-9a-f]{2})+", value) else quoted(value)
    bare = type_ is FieldType.TEXT and _BARE.fullmatch(value) and value != "none"
    return value if bare else quoted(value)


def _list(values: list[Any]) -> str | None:
    if not all(type(value) is int and value >= 0 for value in values):
        return None
    return f"[{', '.join(map(number, values))}]"


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char == "\n":
        return "\\n"
    return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
