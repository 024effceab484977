"""Who wrote, where, through which address: what runs next, what is on record, which blocks died and which lived.

Three functions lie back to back, with no byte between them; the middle one also has a second entry, so that
blocks overlap. Each is called through every alias, then two bytes are stored, then each is called again::

    offset  0           6           12          18   19
            add al, 1   add al, 16  add al, 64  ret  xor al, 0x80
            add al, 2   add al, 32  add al, 3        ret
            jmp 18      jmp 18      jmp 18
    entries ^           ^  ^+2      ^

Every function, entry and alias has a block of its own. A model of the six opcodes says what each call gives.
"""

from __future__ import annotations

from itertools import product

import pytest
import tiny
from tiny import CODE, DATA, PAGE, map_page

from vmm.exits import ExitReason, Vmcall

ALIASES = (1, 2, 3)
WRITERS = ("executing alias", "another alias", "physical alias", "host")
PLACES = ("same page", "other page", "straddling")
#: Where the two stored bytes start, as an offset into the functions.
POSITIONS = {"inside": 8, "first byte": 6, "last byte": 10, "next before": 4, "next after": 12}
CONTENTS = ("other bytes", "same bytes")
CELLS = list(product(ALIASES, WRITERS, PLACES, POSITIONS, CONTENTS))

ENTRIES = (0, 6, 8, 12)
FUNCTIONS = bytes.fromhex("0401 0402 eb0c  0410 0420 eb06  0440 0403 eb00  c3 3480 c3")
#: (start, size) of every block that calling the entries can make.
BLOCKS = ((0, 6), (6, 6), (8, 4), (12, 6), (18, 1), (19, 3))

#: Linear address of each alias, of a view that only writes, and of the view through a second GPA.
BASES = (0x20000, 0x4000_0000, 0x5000_0000)
VIEW, PHYSICAL_VIEW = 0x6000_0000, 0x7000_0000
#: The frames, far from each other, and the second GPAs that reach them, next to each other.
FRAMES = (0x20000, 0x31000)
SECOND_GPA = 0x80000
TABLE, RESULTS = DATA, DATA + 0x800
BEFORE, WRITE = 1, 2


def interpret(code: bytes, start: int) -> int:
    """AL after a call of the function at an offset, from AL = 0."""
    al, at = 0, start
    while code[at] != 0xC3:
        operand = code[at + 1]
        at += 2
        match code[at - 2]:
            case 0x04:
                al += operand
            case 0x2C:
                al -= operand
            case 0x34:
                al ^= operand
            case 0xEB:
                at += operand
    return al & 0xFF


def stored(position: str) -> bytes:
    """What is stored: another instruction, or a jump to the other exit."""
    at = POSITIONS[position]
    if FUNCTIONS[at] == 0xEB:
        return bytes((0xEB, FUNCTIONS[at + 1] + 1))
    return bytes((0x2C, FUNCTIONS[at + 1] + 4))


class Cell:
    """One guest of the matrix, run."""

    def __init__(self, aliases: int, writer: str, place: str, position: str, content: str) -> None:
        self.writer, self.place = writer, place
        self.offset = POSITIONS[position]
        self.old = FUNCTIONS[self.offset : self.offset + 2]
        self.new = stored(position) if content == "other bytes" else self.old
        self.frames = (CODE,) if place == "same page" else FRAMES
        self.bases = (CODE, *BASES[1:])[:aliases] if place == "same page" else BASES[:aliases]
        self.views = self.bases + ((VIEW,) if writer == "another alias" and aliases == 1 else ())
        if writer == "physical alias":
            self.views += (PHYSICAL_VIEW,)
        #: Where the functions start, as an offset into the first frame.
        self.start = PAGE - self.offset - 1 if place == "straddling" else 0xB7A
        self.live: dict[int, dict[tuple[int, int], int]] = {}
        self.tiny = self._build()
        self.tiny.run()

    @property
    def written(self) -> int:
        """The linear address that the guest stores to."""
        base = {"executing alias": self.bases[0], "another alias": self.views[-1]}.get(self.writer, PHYSICAL_VIEW)
        return base + self.start + self.offset

    def _build(self):
        maps = [
            map_page(base + PAGE * i, frame if base != PHYSICAL_VIEW else SECOND_GPA + PAGE * i)
            for base in self.views
            for i, frame in enumerate(self.frames)
        ]
        table = b"".join((base + self.start + entry).to_bytes(8, "little") for base in self.bases for entry in ENTRIES)
        made = tiny.build(
            {CODE: self._driver(), **self._functions(), TABLE: table},
            maps=maps,
            code=(CODE, *(gpa for gpa in self._functions())),
        )
        for i, frame in enumerate(self.frames):
            made.machine.alias(SECOND_GPA + PAGE * i, frame, PAGE)
        made.machine.on(Vmcall)(self._vmcall)
        return made

    def _functions(self) -> dict[int, bytes]:
        first = self.frames[0] + self.start
        if self.place != "straddling":
            return {first: FUNCTIONS}
        room = PAGE - self.start
        return {first: FUNCTIONS[:room], self.frames[1]: FUNCTIONS[room:]}

    def _driver(self) -> str:
        store = f"mov rbx, {self.written}; mov word ptr [rbx], {int.from_bytes(self.new, 'little')}"
        return f"""
            mov edi, {RESULTS}
            call pass
            mov eax, {BEFORE}; vmcall
            {"nop" if self.writer == "host" else store}
            mov eax, {WRITE}; vmcall
            call pass
            xor eax, eax
            out 0xf4, al
        pass:
            mov esi, {TABLE}; mov ecx, {len(self.bases) * len(ENTRIES)}
        next:
            lodsq
            mov rbx, rax
            xor eax, eax
            call rbx
            stosb
            loop next
            ret
        """

    def _vmcall(self, call: Vmcall) -> None:
        if call.rax == WRITE and self.writer == "host":
            self.tiny.machine.write(self.host_gpa, self.new)
        self.live[call.rax] = {
            where: number
            for where, number in tiny.translations(self.tiny).items()
            if self.offset_of(where[0]) is not None
        }

    @property
    def host_gpa(self) -> int:
        """Where the host writes: a straddling write needs GPAs that are next to each other."""
        home = SECOND_GPA if self.place == "straddling" else self.frames[0]
        return home + self.start + self.offset

    def offset_of(self, gva: int) -> int | None:
        """The offset into the functions of a linear address in one of their aliases."""
        for base in self.bases:
            if 0 <= gva - base - self.start < len(FUNCTIONS):
                return gva - base - self.start
        return None

    # What the rules say

    @property
    def changed(self) -> range:
        """The offsets of the bytes that really changed."""
        different = [self.offset + i for i in range(2) if self.old[i] != self.new[i]]
        return range(different[0], different[-1] + 1) if different else range(0)

    def expected_blocks(self) -> set[tuple[int, int]]:
        """Every block that the first pass makes, as (linear address, size)."""
        reached = {(start, size) for start, size in BLOCKS if start in (*ENTRIES, 18)}
        return {(base + self.start + start, size) for base in self.bases for start, size in reached}

    def is_hit(self, gva: int, size: int) -> bool:
        start = self.offset_of(gva)
        assert start is not None
        return any(start <= byte < start + size for byte in self.changed)

    def expected_results(self) -> bytes:
        after = FUNCTIONS[: self.offset] + self.new + FUNCTIONS[self.offset + 2 :]
        return bytes(interpret(code, entry) for code in (FUNCTIONS, after) for _ in self.bases for entry in ENTRIES)

    def gpas(self) -> list[tuple[int, int]]:
        """(GPA, bytes) of each frame's part of the store, by which the record names it."""
        at = self.start + self.offset
        if self.writer == "physical alias":
            first = SECOND_GPA + at
        else:
            first = self.host_gpa if self.writer == "host" else self.frames[0] + at
        if self.place != "straddling":
            return [(first, 2)]
        second = SECOND_GPA + PAGE if self.writer in ("physical alias", "host") else self.frames[1]
        return [(first, 1), (second, 1)]


def cell_name(cell: tuple) -> str:
    aliases, *rest = cell
    return ", ".join((f"{aliases} aliases", *rest))


@pytest.mark.parametrize("parameters", CELLS, ids=cell_name)
def test_cell(parameters):
    cell = Cell(*parameters)
    machine = cell.tiny.machine

    # Which version ran, through every alias, before and after.
    results = machine.read(RESULTS, 2 * len(cell.bases) * len(ENTRIES))
    assert results == cell.expected_results()

    # Which blocks there were, which died, which lived.
    before, after = cell.live[BEFORE], cell.live[WRITE]
    assert set(before) == cell.expected_blocks()
    dead = {where: number for where, number in before.items() if cell.is_hit(*where)}
    assert after == {where: number for where, number in before.items() if where not in dead}

    check_records(cell, sorted(dead.values()))
    check_exits(cell)
    invalidated = {event.block for event in cell.tiny.block_events if event.event == "invalidated"}
    assert invalidated == set(dead.values())
    counters = machine.blocks.counters
    assert counters.created == len(machine.blocks) + counters.invalidated + counters.evicted
    assert (counters.invalidated, counters.evicted) == (len(dead), 0)
    machine.verify()


def check_records(cell: Cell, dead: list[int]) -> None:
    """One record, or one for each of two frames that are not adjacent."""
    records, places = cell.tiny.modifications, cell.gpas()
    by_host = cell.writer == "host"
    if by_host or cell.writer == "physical alias":
        places = [(places[0][0], 2)] if len(records) == 1 and cell.place != "straddling" else places
    assert [(record.gpa, len(record.new)) for record in records] == places
    done = 0
    for record in records:
        size = len(record.new)
        assert record.old == cell.old[done : done + size]
        assert record.new == cell.new[done : done + size]
        assert record.cause == ("host" if by_host else "store")
        assert record.gva == (None if by_host else cell.written + done)
        assert record.aliases == tuple(sorted(view + cell.start + cell.offset + done for view in cell.views))
        done += size
    assert len({record.instruction for record in records}) == 1
    assert {record.rip for record in records} == {None if by_host else store_address(cell)}
    assert sorted(number for record in records for number in record.blocks) == dead


def store_address(cell: Cell) -> int:
    """RIP of the instruction behind the first VMCALL but one."""
    call = next(record for record in cell.tiny.of(Vmcall) if record.rax == BEFORE)
    bits = len(tiny.assemble(f"mov rbx, {cell.written}"))
    return call.rip + 3 + bits


def check_exits(cell: Cell) -> None:
    """One violation a frame, one stepped instruction; none for the host."""
    frames = 0 if cell.writer == "host" else len(cell.gpas())
    stores = [violation for violation in cell.tiny.violations if violation.qualification & 2]
    assert len(stores) == len(cell.tiny.violations) == frames
    assert cell.tiny.count(ExitReason.MTF) == (1 if frames else 0)


def test_the_matrix_is_whole():
    assert len(CELLS) == 3 * 4 * 3 * 5 * 2 == len(set(CELLS))
