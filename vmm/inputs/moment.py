"""When an input takes effect, more exactly than "after this record"."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, Self

from attrs import frozen

from vmm.records import Json

_TIME_LIMIT: Final = 1 << 64


class Place(StrEnum):
    """At what of a run an input takes effect.

    ``OUTPUT`` is after the record of an OUT, while what the guest prints by it is handed on. ``BOUNDARY`` is between
    two instructions, anywhere before the next record: only virtual time says where.
    """

    RECORD = "record"
    OUTPUT = "output"
    BOUNDARY = "boundary"


@frozen(slots=True)
class Moment:
    """The place of an input, and how many others are being carried out around it.

    ``time`` is the virtual time in nanoseconds of a ``BOUNDARY``, None at other places.
    """

    depth: int = 0
    place: Place = Place.RECORD
    time: int | None = None

    def to_json(self) -> Json:
        """What a trace line has of it: only what is not as by default."""
        depth = {"depth": self.depth} if self.depth else {}
        place = {} if self.place is Place.RECORD else {"at": self.place.value}
        return {**place, **({} if self.time is None else {"time": self.time}), **depth}

    @classmethod
    def parse(cls, line: Mapping[str, Any]) -> Self:
        """Of a trace line; raises ``ValueError``, with what is wrong, for one that no input has."""
        depth, place, time = line.get("depth", 0), line.get("at", Place.RECORD.value), line.get("time")
        if type(depth) is not int or depth < 0:
            raise ValueError(f"{line.get('input')} with an unusable depth")
        if place not in list(Place):
            raise ValueError(f"{line.get('input')} at an unusable place")
        if (type(time) is int and 0 <= time < _TIME_LIMIT) if place == Place.BOUNDARY else time is None:
            return cls(depth, Place(place), time)
        raise ValueError(f"{line.get('input')} at an unusable time")
