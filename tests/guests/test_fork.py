"""cow-fork and dual-mapping keep their own rules, as their page tables show: nobody takes the guest's word for it."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest
import tiny
from attrs import frozen

from vmm.exits import IoInstruction
from vmm.guest.symbols import Symbols
from vmm.machine import Machine
from vmm.memory import PAGE
from vmm.records import Modification

PRESENT, WRITABLE, USER, NX = 1, 2, 4, 1 << 63
ADDRESS = 0x000F_FFFF_FFFF_F000
RIGHT = ("cow-fork", "dual-mapping")
PRIVATE = range(0x400000, 0x600000)


@frozen
class Leaf:
    """What a 4 KiB entry says of a linear page."""

    page: int
    frame: int
    writable: bool
    executable: bool
    user: bool


@cache
def present(table: bytes) -> list[tuple[int, int]]:
    """The entries of a table that are present, by their index."""
    return [(index, entry) for index, entry in enumerate(struct.unpack("<512Q", table)) if entry & PRESENT]


def leaves(machine: Machine, table: int, level: int = 4, base: int = 0) -> Iterator[Leaf]:
    """All pages of an address space, from its PML4 on. Upper levels of these guests forbid nothing."""
    for index, entry in present(machine.read(table, PAGE)):
        page = base + (index << 12 + 9 * (level - 1))
        if level > 1:
            assert entry & (WRITABLE | USER | NX) == WRITABLE | USER
            yield from leaves(machine, entry & ADDRESS, level - 1, page)
        else:
            yield Leaf(page, entry & ADDRESS, bool(entry & WRITABLE), not entry & NX, bool(entry & USER))


def address(symbols: Symbols, name: str) -> int:
    found = symbols.address(name)
    assert found is not None
    return found


class Watched:
    """A run whose page tables are read at every record but those of its printing."""

    def __init__(self, name: str) -> None:
        self.machine = Machine.from_manifest(name, tiny.STRICT)
        self.symbols = self.machine.guest.image.symbols
        self.both: set[int] = set()
        self.modifications: list[Modification] = []
        self.machine.observe(self.see)
        self.end = self.machine.run()

    def see(self, record) -> None:
        if isinstance(record, IoInstruction):
            return
        for page in self.pages():
            if page.writable and page.executable:
                self.both.add(page.page)
        if isinstance(record, Modification):
            self.modifications.append(record)

    def pages(self) -> list[Leaf]:
        """The pages of both processes."""
        return [page for process in ("process_1", "process_2") for page in self.process(process)]

    def process(self, name: str) -> list[Leaf]:
        return list(leaves(self.machine, address(self.symbols, name)))

    def owners(self) -> Counter[int]:
        """By frame: how many entries of the processes' own tables lead there."""
        return Counter(page.frame for page in self.pages() if page.page in PRIVATE)

    def counted(self) -> Counter[int]:
        """The same, as the kernel has counted."""
        counts = self.machine.read(address(self.symbols, "references"), 256)
        return Counter({number * PAGE: count for number, count in enumerate(counts) if count})


@cache
def watched(name: str) -> Watched:
    return Watched(name)


@pytest.fixture(params=RIGHT)
def right(request) -> Watched:
    return watched(request.param)


def test_no_page_is_ever_writable_and_executable(right):
    assert right.both == set()


def test_one_mapping_for_both_purposes_would_be_found():
    assert watched("dual-mapping-rwx").both == {0x402000}


def test_the_kernel_counts_the_owners_of_each_frame(right):
    assert right.counted() == right.owners()


def test_owners_that_are_not_counted_would_be_found():
    wrong = watched("cow-fork-stale")
    assert wrong.counted() != wrong.owners()


def test_the_kernel_is_out_of_reach_for_the_processes(right):
    """Below PRIVATE ring 3 has the program's text, read-execute, and its constants, read-only."""
    for name in ("process_1", "process_2"):
        open_pages = {
            page.page: page.executable for page in right.process(name) if page.user and page.page not in PRIVATE
        }
        assert open_pages == {address(right.symbols, "program"): True, 0x14000: False}
        assert not any(page.writable for page in right.process(name) if page.page in open_pages)


def test_after_fork_each_process_of_cow_fork_has_code_of_its_own():
    run = watched("cow-fork")
    jit = address(run.symbols, "jit")
    frames = {page.frame for page in run.pages() if page.page == jit}
    assert frames == {address(run.symbols, name) for name in ("jit_frame", "jit_copy")}
    assert {record.gpa & -PAGE for record in run.modifications} == frames


def test_the_processes_of_dual_mapping_have_one_frame_of_code():
    run = watched("dual-mapping")
    frame = address(run.symbols, "jit_frame")
    mapped = [(page.page, page.writable, page.executable) for page in run.pages() if page.frame == frame]
    view = [(frame, True, False), (0x402000, False, True), (0x410000, True, False)]  # the kernel's, then their own
    assert mapped == 2 * view
    assert {record.gpa & -PAGE for record in run.modifications} == {frame}
