"""The inputs of a trace line by line: from its objects to the kinds in the other rooms."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import attrs

from vmm.cpu.events import Event
from vmm.ept import Permission
from vmm.errors import OptionError
from vmm.inputs import memory, processor, views
from vmm.inputs.kind import EVENT_TYPES, Input

U64_MAX: Final = 0xFFFF_FFFF_FFFF_FFFF
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})*", re.ASCII)
#: The kinds of input, by name.
KINDS: Final[dict[str, type[Input]]] = {
    kind.name: kind
    for room in (processor, memory, views)
    for kind in vars(room).values()
    if isinstance(kind, type) and issubclass(kind, Input) and kind is not Input
}


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
        type=EVENT_TYPES[value["type"]],
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
