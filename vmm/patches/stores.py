"""The modifications of a trace, each with what the records before it say of its frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn

from attrs import frozen

from vmm.memory import PAGE
from vmm.patches.mapping import KERNEL_IMAGE, is_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.records import Json
    from vmm.trace.reading import TraceReader

#: Frames whose place is remembered: 4 GiB of code.
_FRAMES: Final = 1 << 20
#: Bit 2 of an exit qualification: the access was a fetch (SDM vol. 3, table 28-7).
_FETCH: Final = 1 << 2
_MOST_ADDRESSES: Final = 1024


@frozen(slots=True)
class Store:
    """One modification.

    ``seq``, ``gpa``, ``gva``, ``rip``, ``old``, ``new``, ``cause`` and ``callers`` are the record's; ``callers`` is
    empty where it has none. ``executed_at`` is the linear address by which the guest has executed the first byte, None
    if nobody knows. ``is_early`` says that nothing has been executed in the kernel's half so far.
    """

    seq: int
    gpa: int
    gva: int | None
    rip: int | None
    old: bytes
    new: bytes
    cause: str
    callers: tuple[int, ...] = ()
    executed_at: int | None = None
    is_early: bool = False


class Stores:
    """Reads an open trace to its end; raises ``InputError`` for a record that is none."""

    def __init__(self, reader: TraceReader) -> None:
        #: Lines read so far, for whoever shows how far it has come.
        self.lines = 0
        self._reader = reader
        #: Whether nothing has been executed in the kernel's half so far.
        self.is_early = True
        #: Of each frame, the linear page that it was last known to be fetched by.
        self._fetched: dict[int, int] = {}

    def __iter__(self) -> Iterator[Store]:
        for line in self._reader.lines():
            self.lines += 1
            if line.kind == "exit":
                self._learn(line.object)
            elif line.kind == "modification":
                yield self._store(line.seq, line.object)

    def _learn(self, record: Json) -> None:
        rip, gpa, gva = record.get("rip"), record.get("gpa"), record.get("gva")
        if self.is_early and type(rip) is int and is_kernel(rip):
            self.is_early = False
        if record.get("number") != 48 or type(gpa) is not int or type(gva) is not int:
            return
        qualification = record.get("qualification")
        if type(qualification) is int and qualification & _FETCH:
            self._remember(gpa, gva)

    def _store(self, seq: int, record: Json) -> Store:
        gpa = self._number(record, "gpa")
        gva, rip = (None if record.get(key) is None else self._number(record, key) for key in ("gva", "rip"))
        old, new = self._bytes(record, "old"), self._bytes(record, "new")
        cause = record.get("cause")
        if not isinstance(cause, str) or len(old) != len(new) or not new:
            self._refuse("cause" if not isinstance(cause, str) else "old")
        executed = self._executed_at(gpa, gva, self._addresses(record, "aliases"))
        callers = self._addresses(record, "callers")
        return Store(seq, gpa, gva, rip, old, new, cause, callers, executed, self.is_early)

    def _executed_at(self, gpa: int, gva: int | None, aliases: tuple[int, ...]) -> int | None:
        """The kernel's image is executed where it lies, even if it was entered by another address."""
        places = aliases if gva is None else (gva, *aliases)
        image = next((place for place in places if place >= KERNEL_IMAGE), None)
        if image is not None:
            self._remember(gpa, image)
            return image
        page = self._fetched.get(gpa & -PAGE)
        return None if page is None else page | gpa % PAGE

    def _remember(self, gpa: int, place: int) -> None:
        """A frame is executed by the linear page of ``place``."""
        self._fetched.pop(gpa & -PAGE, None)
        self._fetched[gpa & -PAGE] = place & -PAGE
        if len(self._fetched) > _FRAMES:
            del self._fetched[next(iter(self._fetched))]

    def _number(self, record: Json, key: str) -> int:
        value: Any = record.get(key)
        if not _is_address(value):
            self._refuse(key)
        return int(value)

    def _bytes(self, record: Json, key: str) -> bytes:
        try:
            return bytes.fromhex(record[key])
        except (KeyError, TypeError, ValueError):
            self._refuse(key)

    def _addresses(self, record: Json, key: str) -> tuple[int, ...]:
        value: Any = record.get(key, [])
        if not isinstance(value, list) or len(value) > _MOST_ADDRESSES or not all(map(_is_address, value)):
            self._refuse(key)
        return tuple(value)

    def _refuse(self, key: str) -> NoReturn:
        self._reader.refuse(f'a modification without a usable "{key}"')


def _is_address(value: Any) -> bool:  # noqa: ANN401 - a JSON value
    return type(value) is int and 0 <= value < 1 << 64
