"""Real guest accesses on a real machine, one case after another, each with its own EPT entries.

The guest lives in its first 2 MiB. What is tested lies in GPAs of its own, from ``REGION`` on, by a way of its own
through the EPT: the same host memory once more in 4 KiB pages, once in a 2 MiB page, once in a 1 GiB page. A case
writes the entries of one of these ways, has the guest make one access, and looks at what comes out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import manual
import tiny
from attrs import define, evolve, field, frozen
from manual import FETCH, MODIFY, READ, WRITE, Linear, Processor
from test_entries import profile_of

from vmm.ept import Permission
from vmm.exits import EptMisconfiguration, EptViolation, Vmcall
from vmm.guest.manifest import Limits, MachineSpec
from vmm.machine import Machine, RunOptions

PAGE, MIB_2, GIB = 0x1000, 2 << 20, 1 << 30
REGION = 1 << 39
#: By page size: where the way begins, and the levels that it has entries of.
WAYS = {PAGE: (REGION, (4, 3, 2, 1)), MIB_2: (REGION + GIB, (4, 3, 2)), GIB: (REGION + 2 * GIB, (4, 3))}
RWX = Permission.R | Permission.W | Permission.X

# Host pages (also GPAs of the guest's own 2 MiB).
PML5, PML4, FREE_TABLE = 0x5000, 0x2000, 0x3000
CR4_LA57 = 1 << 12
CODE, CODE_PAGE, DATA_PAGE = 0x10000, 0x11000, 0x12000
#: What the ways lead to: a page, and by level a table of the guest's paging structures, from page table to PML5 table.
FINAL, TABLES = 0x10_1000, {1: 0x10_2000, 2: 0x10_3000, 3: 0x10_4000, 4: 0x10_5000, 5: 0x10_6000}

P, RW, US, A, D, PS, XD = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
#: Index of each level in a linear address that is tested, so that entries are not at the start of their tables.
INDEX = {4: 9, 3: 7, 2: 6, 1: 5}
OFFSET = 0x803
_VMCALL = bytes.fromhex("0f01c1")
_STUBS = {
    READ: "mov al, [rdi]",
    WRITE: "mov [rdi], al",
    MODIFY: "inc byte ptr [rdi]",
    FETCH: "jmp rdi",
}


@frozen
class Case:
    """``level`` and ``bits`` say which entry of the way to a page of ``size`` gets which of bits 2:0 and 10.

    ``flip`` is what else is different in that entry.

    ``structure`` is 0 for the access itself, else the level of the guest's entry that is reached by this way;
    ``flags`` is then what is clear in the guest's entries: "" or "A" or "D". Where it is the table that CR3 refers to,
    the instruction itself is fetched by an entry of that table first.
    """

    size: int
    level: int
    bits: int
    access: str
    linear: Linear
    structure: int = 0
    flags: str = ""
    flip: int = 0


@define(slots=False)
class Bench:
    """One machine with one processor and one CPL; ``run`` has it do cases and gives back what differs.

    ``root`` is the level of the table that CR3 refers to: 4, or 5 in 5-level paging.
    """

    processor: Processor
    cpl: int
    single_step: bool = False
    root: int = 4
    deviations: list[str] = field(factory=list)
    count: int = 0
    _expected: tuple = ()
    _case: Case | None = None

    def __attrs_post_init__(self):
        stubs, at = {}, CODE + 0x10
        code = bytearray(_VMCALL.ljust(0x10, b"\x90"))
        for access, text in _STUBS.items():
            stubs[access] = at
            stub = (tiny.assemble(text, at) + _VMCALL).ljust(0x10, b"\xcc")
            code += stub
            at += len(stub)
        self.stubs = stubs
        segments = {CODE: bytes(code), CODE_PAGE: _VMCALL.ljust(PAGE, b"\xcc")}
        limits = Limits(exits=10_000_000, seconds=600.0)
        self.cr3 = {4: PML4, 5: PML5}[self.root]
        guest = tiny.guest(segments, cpl=self.cpl, paging=False, registers={"cr3": self.cr3}, limits=limits)
        guest = evolve(guest, manifest=evolve(guest.manifest, machine=MachineSpec(GIB, "long")))
        self.machine = Machine(guest, RunOptions(ept=profile_of(self.processor), single_step=self.single_step))
        if self.root == 5:
            self.machine.vcpu.context.cr4 |= CR4_LA57
        self._make_tables()
        self._map_ways()
        self.machine.on(Vmcall)(lambda exit_record: self._came_out(exit_record, ("fine",)))
        self.machine.on(EptViolation)(lambda e: self._came_out(e, (e.qualification, e.gpa, e.gva)))
        self.machine.on(EptMisconfiguration)(lambda e: self._came_out(e, ("misconfiguration", e.gpa)))

    def run(self, cases: Iterable[Case]) -> list[str]:
        self._left = deque(cases)
        self.machine.run()
        self.machine.close()
        return self.deviations

    # The guest's memory

    def _make_tables(self) -> None:
        word = self._word
        self._next_table = 0x20000
        word(PML4, FREE_TABLE | P | RW | US | A)
        word(PML5, PML4 | P | RW | US | A)
        for root, below in ((4, FREE_TABLE), (5, PML4)):
            word(TABLES[root], below | P | RW | US | A)
        word(FREE_TABLE, 0x4000 | P | RW | US | A)
        word(0x4000, P | RW | US | A | D | PS)
        self.machine.memory.write(FINAL, _VMCALL)
        #: The place of the guest's leaf entry that leads to the final page, by (size, structure).
        self.entries: dict[tuple[int, int], dict[int, int]] = {}
        self.linear: dict[tuple[int, int], int] = {}
        every = [(size, structure) for size in WAYS for structure in range(self.root + 1)]
        for number, (size, structure) in enumerate(every):
            self._make_address(number + 1, size, structure)

    def _make_address(self, number: int, size: int, structure: int) -> None:
        """A linear address whose translation goes through tables of its own, one of them by a way."""
        root = TABLES[self.root] if structure == self.root else self.cr3
        where, linear = {self.root: root + 8 * number}, number << 9 * self.root + 3
        for level in range(self.root - 1, 0, -1):
            host = TABLES[level]
            if level != structure:
                host = self._next_table
                self._next_table += PAGE
            where[level] = host + 8 * INDEX[level]
            linear |= INDEX[level] << 9 * level + 3
        self.entries[size, structure] = where
        self.linear[size, structure] = linear

    def _word(self, hpa: int, value: int) -> None:
        self.machine.memory.words[hpa >> 3] = value

    def _map_ways(self) -> None:
        ept = self.machine.ept
        for host in (FINAL, *TABLES.values()):
            ept.map(WAYS[PAGE][0] + host, host, RWX)
        for size in (MIB_2, GIB):
            ept.map(WAYS[size][0], 0, RWX, size=size)
        self.base = {
            (size, level): [ept.read_entry(start + host, level) for host in (FINAL, *TABLES.values())]
            for size, (start, levels) in WAYS.items()
            for level in levels
        }

    # One case

    def _begin(self, case: Case) -> None:
        machine, context = self.machine, self.machine.vcpu.context
        gpa = self._put_entries(case)
        linear = self._put_guest_entries(case)
        machine.invept()
        offset = 0 if case.access == FETCH else OFFSET
        context.set_gpr("rdi", linear | offset)
        context.rip = self.stubs[case.access]
        self._case = case
        self._walk = manual.walk(self.processor, lambda level: machine.ept.read_entry(gpa, level))
        context.cr3 = gpa if case.structure == self.root else self.cr3
        self._expect(case, gpa, linear | offset)
        self._gpa = gpa

    def _expect(self, case: Case, page: int, linear: int) -> None:
        """What comes of the first access that is not fine."""
        outcome, gpa = "fine", page
        if case.structure == self.root:  # the stub is at linear addresses that the table's first entry translates
            outcome = manual.structure_access(self.processor, self._walk, sets_flags=False)
            if outcome != "fine":
                linear = self.stubs[case.access]
        if outcome == "fine" and case.structure:
            sets = case.flags == "A" or (case.flags == "D" and case.access in (WRITE, MODIFY))
            outcome = manual.structure_access(self.processor, self._walk, sets_flags=sets)
            gpa = page | self.entries[case.size, case.structure][case.structure] & PAGE - 1
        elif not case.structure:
            outcome = manual.final_access(self.processor, self._walk, case.access, case.linear)
            gpa = page | linear & PAGE - 1
        match outcome:
            case "fine":
                self._expected = ("fine",)
            case "misconfiguration":
                self._expected = ("misconfiguration", gpa)
            case _:
                self._expected = (outcome, gpa, linear)

    def _put_entries(self, case: Case) -> int:
        start, levels = WAYS[case.size]
        pages = (FINAL, *TABLES.values())
        page = TABLES[case.structure] if case.structure else FINAL
        base = {level: self.base[case.size, level][pages.index(page)] for level in levels}
        for level in levels:  # from the top: the case before may have cut the way
            self.machine.ept.write_entry(start + page, level, base[level])
        raw = (base[case.level] & ~0x407 | case.bits) ^ case.flip
        self.machine.ept.write_entry(start + page, case.level, raw)
        return start + page

    def _put_guest_entries(self, case: Case) -> int:
        where = self.entries[case.size, case.structure]
        start = WAYS[case.size][0]
        rights = P | RW * case.linear.read_write | US * case.linear.user | A
        own = CODE_PAGE if case.access == FETCH else DATA_PAGE
        page = own if case.structure else start + FINAL
        leaf = rights | D | XD * case.linear.execute_disable | page
        entries = {1: leaf}
        for level in range(2, self.root + 1):
            table = start + TABLES[level - 1] if level - 1 == case.structure else where[level - 1] & -PAGE
            entries[level] = table | P | RW | US | A
        if case.flags:
            clear = {"A": A | (D if case.structure == 1 else 0), "D": D}[case.flags]
            entries[case.structure] &= ~clear
        for level, entry in entries.items():
            self._word(where[level], entry)
        return self.linear[case.size, case.structure]

    def _came_out(self, exit_record: object, found: tuple) -> bool:
        if self._case is not None:
            self.count += 1
            if found != self._expected:
                self._deviates(f"{_show(found)}, not {_show(self._expected)}")
            if self.processor.accessed_dirty:
                self._check_flags(found)
        if not self._left:
            self.machine.stop()
            return True
        self._begin(self._left.popleft())
        if isinstance(exit_record, Vmcall):
            self.machine.vcpu.context.rip -= len(_VMCALL)
        return True

    def _check_flags(self, found: tuple) -> None:
        """29.3.5: A in every entry used, D in the one that maps the page, on a write."""
        case = self._case
        reached = self._walk.end == "page"
        written = found == ("fine",) and (case.structure or case.access in (WRITE, MODIFY))
        for level, before in self._walk.used:
            now = self.machine.ept.read_entry(self._gpa, level)
            wanted = before | (1 << 8 if reached else 0) | (1 << 9 if written and level == self._walk.level else 0)
            if now != wanted:
                self._deviates(f"entry of level {level} is {now:#x}, not {wanted:#x}")

    def _deviates(self, how: str) -> None:
        self.deviations.append(f"{self.processor} CPL {self.cpl} {self._case}: {how}")


def _show(outcome: tuple) -> str:
    return " ".join(part if isinstance(part, str) else hex(part) for part in outcome)


ACCESSES = (READ, WRITE, MODIFY, FETCH)


def final_cases(cpl: int, combinations: Iterable[int]) -> Iterable[Case]:
    """All of them: each combination of permissions, at each level, for each page size and kind of access."""
    combinations = list(combinations)
    linears = [Linear(user=True)] if cpl == 3 else [Linear(user=False), Linear(user=True)]
    for size, (_, levels) in WAYS.items():
        for level in levels:
            for bits in combinations:
                for access in ACCESSES:
                    for linear in linears:
                        yield Case(size, level, bits, access, linear)


def linear_cases(cpl: int) -> Iterable[Case]:
    """What the guest's own paging makes of the address: read-only and execute-disable pages."""
    user = cpl == 3
    for size in WAYS:
        for bits in range(8):
            yield Case(size, 1 if size == PAGE else 3, bits, READ, Linear(user=user, read_write=False))
            yield Case(size, 1 if size == PAGE else 3, bits, READ, Linear(user=user, execute_disable=True))
            yield Case(size, 4, bits, WRITE, Linear(user=user, execute_disable=True))
            yield Case(size, 4, bits, FETCH, Linear(user=user, read_write=False))


def flipped_cases(processor: Processor, cpl: int) -> Iterable[Case]:
    """Each other bit of each entry, but those that would have it lead elsewhere: ignored, reserved or misconfigured."""
    for size, (_, levels) in WAYS.items():
        for level in levels:
            leaf = level == levels[-1]
            address = range({True: 9 * level + 3, False: 12}[leaf], processor.width)
            for bit in set(range(3, 64)) - set(address) - ({7} if leaf and level > 1 else set()):
                for access in ACCESSES:
                    yield Case(size, level, 7, access, Linear(user=cpl == 3), flip=1 << bit)
            for memory_type in range(8):
                yield Case(size, level, 7, READ, Linear(user=cpl == 3), flip=(memory_type ^ 6 * leaf) << 3)


def structure_cases(cpl: int, combinations: Iterable[int], root: int = 4) -> Iterable[Case]:
    """The same for the processor's accesses to the guest's entries of each level, from ``root`` down."""
    combinations = list(combinations)
    for structure in range(root, 0, -1):
        for flags in ("", "A", "D") if structure == 1 else ("", "A"):
            for size, (_, levels) in WAYS.items():
                for level in levels:
                    for bits in combinations:
                        for access in ACCESSES:
                            yield Case(size, level, bits, access, Linear(user=cpl == 3), structure, flags)
