"""What one stepped instruction did to memory, put together from what the engine tells of it."""

from __future__ import annotations

from attrs import define

from vmm.cpu.stepping import SteppingEngine
from vmm.memory import PAGE, GuestMemory
from vmm.mmu import StepMemory
from vmm.translation import Span

_OFFSET = PAGE - 1
_LINEAR = 0xFFFF_FFFF_FFFF_FFFF

#: Linear page -> (GPA page, host page).
Pages = dict[int, tuple[int, int]]


@define(slots=True)
class Access:
    """Bytes from a linear address on that were read or written. ``pages`` says where its linear pages lead."""

    kind: str
    gva: int
    size: int
    pages: Pages

    @property
    def gpa(self) -> int:
        """The GPA of its first byte."""
        return self.pages[self.gva & -PAGE][0] | self.gva & _OFFSET

    def places(self) -> list[Span]:
        """(HPA, bytes), page by page."""
        found, at = [], self.gva
        while at < self.gva + self.size:
            length = min(self.gva + self.size - at, PAGE - (at & _OFFSET))
            found.append((self.pages[at & _LINEAR & -PAGE][1] | at & _OFFSET, length))
            at += length
        return found

    def takes_in(self, other: Access) -> bool:
        """Grow by an access that touches it or overlaps it, as parts of one architectural access do."""
        if other.kind != self.kind or other.gva > self.gva + self.size or other.gva + other.size < self.gva:
            return False
        start = min(self.gva, other.gva)
        self.size = max(self.gva + self.size, other.gva + other.size) - start
        self.gva = start
        return True


def accesses_of(step: StepMemory, stepping: SteppingEngine) -> list[Access]:
    """What the instruction that was stepped last read and wrote, in order, contiguous runs as one."""
    raw = [(2 * before, "r", hpa, size) for before, hpa, size in stepping.reads]
    raw += [(2 * index + 1, "w", hpa, size) for index, (hpa, size) in enumerate(stepping.writes)]
    read = {**step.read, **{page: where for page, where in step.written.items() if page not in step.read}}
    found: list[Access] = []
    for _, kind, hpa, size in sorted(raw, key=lambda one: one[0]):
        pages = step.written if kind == "w" else read
        page = _linear_page(pages, hpa, size)
        access = Access(kind, page | hpa & _OFFSET, size, pages)
        if not (found and found[-1].takes_in(access)):
            found.append(access)
    return found


def _linear_page(pages: Pages, hpa: int, size: int) -> int:
    """The first linear page that an access can have used: its next page was used as well, if it has to be."""
    frame = hpa & -PAGE
    candidates = [page for page, (_, host) in pages.items() if host == frame]
    if size > PAGE - (hpa & _OFFSET):
        candidates = [page for page in candidates if page + PAGE & _LINEAR in pages] or candidates
    return candidates[0]


def before_and_after(places: list[Span], step: StepMemory, memory: GuestMemory) -> tuple[bytes, bytes]:
    """What places held before the instruction, and what they hold now."""
    old, new = [], []
    for hpa, size in places:
        now = memory.read(hpa, size)
        saved = step.undo.get(hpa & -PAGE)
        start = hpa & _OFFSET
        old.append(now if saved is None else saved[start : start + size])
        new.append(now)
    return b"".join(old), b"".join(new)
