"""Stores that belong together: the pieces of one copy, and the three steps of text_poke_bp.

A routine that copies memory stores five bytes as two words that overlap, or byte by byte, so that one patch is several
modifications. text_poke_bp puts an INT3 over the first byte of an instruction, then writes the rest, then the first
byte: whoever executes it meanwhile is caught, and the patch is one all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from attrs import define, field

from vmm.memory import PAGE
from vmm.patches.mapping import Mapping, classify
from vmm.patches.stores import Store

INT3: Final = b"\xcc"
#: How many patches can be behind a breakpoint at a time: as many as fit into a page of the kernel's (text_poke_queue).
_BREAKPOINTS: Final = 1024


@define(slots=True, eq=False)
class Patch:
    """Bytes of code that were replaced, ``old`` by ``new``, by ``stores`` modifications.

    ``first`` is the one that it began with, and ``last_seq`` the number of the last. ``size`` is how many bytes were
    stored, some of them perhaps more than once. ``behind_int3`` says that text_poke_bp did it, in its three steps.
    """

    first: Store
    mapping: Mapping
    start: int
    old: bytes
    new: bytes
    last_seq: int
    stores: int = 1
    size: int = 0
    behind_int3: bool = False

    @classmethod
    def of(cls, store: Store) -> Patch:
        """A patch of one store."""
        start = store.gpa if store.gva is None else store.gva
        return cls(store, classify(store), start, store.old, store.new, store.seq, size=len(store.new))

    @property
    def gpa(self) -> int:
        """The guest-physical address of its first byte."""
        return self.first.gpa + self.start - (self.first.gpa if self.first.gva is None else self.first.gva)

    @property
    def executed_at(self) -> int | None:
        """The linear address by which its first byte is executed, None if nobody knows."""
        place = self.first.executed_at
        return None if place is None else place + self.gpa - self.first.gpa

    def goes_on_with(self, store: Store) -> bool:
        """Whether a store is another piece of the same copy: by the same code, called alike, next to it or over it."""
        first = self.first
        if store.gva is None or first.gva is None or store.rip is None or first.rip is None:
            return False
        alike = store.callers == first.callers and store.rip & -PAGE == first.rip & -PAGE
        if not alike or store.gva - first.gva != store.gpa - first.gpa or INT3 in (self.new, store.old):
            return False
        end, other = self.start + len(self.new), store.gva + len(store.new)
        near = store.gva <= end and self.start <= other
        return near and max(end, other) - min(self.start, store.gva) <= PAGE

    def add(self, store: Store) -> None:
        """Take another piece: of bytes that were stored twice, the first old and the last new ones count."""
        assert store.gva is not None
        start = min(self.start, store.gva)
        at, other = self.start - start, store.gva - start
        length = max(at + len(self.new), other + len(store.new))
        old, new = bytearray(length), bytearray(length)
        old[other : other + len(store.old)] = store.old
        old[at : at + len(self.old)] = self.old
        new[at : at + len(self.new)] = self.new
        new[other : other + len(store.new)] = store.new
        self.start, self.old, self.new = start, bytes(old), bytes(new)
        self._count(store.seq, 1, len(store.new))

    def append(self, rest: Patch) -> None:
        """Take the bytes behind an INT3."""
        self.old += rest.old
        self.new += rest.new
        self._count(rest.last_seq, rest.stores, rest.size)

    def complete(self, first_byte: Patch) -> None:
        """Take the byte that replaces an INT3."""
        self.new = first_byte.new + self.new[1:]
        self.behind_int3 = True
        self._count(first_byte.last_seq, first_byte.stores, first_byte.size)

    def _count(self, seq: int, stores: int, size: int) -> None:
        self.last_seq = seq
        self.stores += stores
        self.size += size


def join(stores: Iterable[Store]) -> Iterator[Patch]:
    """The patches that stores make, in the order in which they are complete."""
    joiner = _Joiner()
    for store in stores:
        yield from joiner.take(store)
    yield from joiner.rest()


@define(slots=True)
class _Joiner:
    open: Patch | None = None
    #: Patches whose INT3 is in place, by the GPA of it.
    breakpoints: dict[int, Patch] = field(factory=dict)

    def take(self, store: Store) -> Iterator[Patch]:
        if self.open is not None and self.open.goes_on_with(store):
            self.open.add(store)
            return
        yield from self._close()
        self.open = Patch.of(store)

    def rest(self) -> Iterator[Patch]:
        yield from self._close()
        yield from self.breakpoints.values()

    def _close(self) -> Iterator[Patch]:
        patch, self.open = self.open, None
        if patch is None:
            return
        if patch.mapping is Mapping.POKE:
            yield from self._poked(patch)
        else:
            yield patch

    def _poked(self, patch: Patch) -> Iterator[Patch]:
        if patch.new == INT3:
            yield from self._put_breakpoint(patch)
        elif patch.old == INT3 and patch.gpa in self.breakpoints:
            whole = self.breakpoints.pop(patch.gpa)
            whole.complete(patch)
            yield whole
        elif (before := self.breakpoints.get(patch.gpa - 1)) is not None and before.new == INT3:
            before.append(patch)
        else:
            yield patch

    def _put_breakpoint(self, patch: Patch) -> Iterator[Patch]:
        before = self.breakpoints.pop(patch.gpa, None)
        if before is not None:
            yield before
        elif len(self.breakpoints) >= _BREAKPOINTS:
            yield self.breakpoints.pop(next(iter(self.breakpoints)))
        self.breakpoints[patch.gpa] = patch
