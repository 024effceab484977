"""A guest with page tables of its own that does what it is told: store, call, map, change its address space.

The guest is a loop that asks a device for its next operation. The device hands over one after the other, and does the
host's operations itself, between two instructions.
"""

from __future__ import annotations

import tiny
from attrs import define, field
from tiny import CODE, PAGE, STACK, map_page

from vmm.exits import ExceptionExit, RefusedAccess
from vmm.guest.manifest import Policy
from vmm.guest.pagetables import FOUR_LEVEL, PageTables
from vmm.machine import RunOptions

PORT = 0x100
FIRST, FRAMES = 0x20000, 3
#: Linear pages that the guest maps as it is told; not mapped at first.
PAGES = (0x100000, 0x101000, 0x102000, 0x40_0000_0000)
#: The page tables of the two address spaces.
SPACES = (0x60000, 0x70000)
RET, NOP = 0xC3, 0x90
#: Bytes of the instruction that loads, stores or exchanges.
ACCESS_LENGTH = 2
#: What a store changes; calls go to offset 0.
STORED = 0x10

LOOP = f"""
again:  mov edx, {PORT}
        in eax, dx
        mov edi, eax
        in eax, dx
        mov ecx, eax
        in eax, dx
        mov esi, eax
        in eax, dx
        shl rax, 32
        or rsi, rax
        cmp edi, 1; je call
        cmp edi, 2; je map
        cmp edi, 3; je switch
        cmp edi, 4; je load
        cmp edi, 5; je modify
        cmp edi, 6; je end
store:  mov byte ptr [rsi], cl
        jmp again
load:   mov al, byte ptr [rsi]
        jmp again
modify: xchg byte ptr [rsi], cl
        jmp again
call:   call rsi
        jmp again
map:    mov rax, 0x8000000000000000
        test cl, 2
        jz write
        or rcx, rax
write:  and rcx, -3
        test ch, 8
        jz tell
        or rcx, 2
tell:   mov qword ptr [rsi], rcx
        mov rax, cr3
        mov cr3, rax
        jmp again
switch: mov cr3, rsi
        jmp again
end:    out 0xf4, al
"""
KINDS = {"store": 0, "call": 1, "map": 2, "switch": 3, "load": 4, "modify": 5, "end": 6}
#: In the word that a "map" gets: what becomes XD, and what becomes R/W.
NO_EXECUTE, WRITABLE = 1 << 1, 1 << 11
ACCESSED_DIRTY = 1 << 5 | 1 << 6


def tables() -> dict[int, bytes]:
    """Both address spaces: everything but the frames to play with is mapped, never writable and executable."""
    made = {}
    for base in SPACES:
        space = PageTables(base, FOUR_LEVEL)
        space.map(map_page(CODE, CODE, "rx"))
        space.map(map_page(STACK - PAGE, STACK - PAGE, "rw"))
        for where in SPACES:
            space.map(map_page(where, where, "rw", pages=8))
        for page in PAGES:
            space.map(map_page(page, FIRST, "r"))
        made[base] = space.to_bytes()
        assert len(made[base]) <= 8 * PAGE
    return made


def entry_of(machine, space: int, page: int) -> int:
    """Where the page-table entry of a linear page is."""
    table = SPACES[space]
    for shift in (39, 30, 21):
        entry = int.from_bytes(machine.read(table + (page >> shift & 511) * 8, 8), "little")
        table = entry & 0xF_FFFF_FFFF_F000
    return table + (page >> 12 & 511) * 8


@define
class Director:
    """The device. ``done`` gets, for each operation of the guest, what came of it."""

    pending: list
    machine: object = None
    exact = True
    words: list[int] = field(factory=list)
    done: list[str] = field(factory=list)

    def read(self, port: int, size: int) -> int:
        if not self.words:
            while self.pending and self.pending[0][0] not in KINDS:
                self.host(*self.pending.pop(0))
            kind, *rest = self.pending.pop(0) if self.pending else ("end",)
            self.done.append("done")
            where, value = getattr(self, kind)(*rest)
            self.words = [KINDS[kind], value, where & 0xFFFF_FFFF, where >> 32]
        return self.words.pop(0)

    def write(self, port: int, size: int, value: int) -> None:
        raise AssertionError("nothing is sent here")

    def host(self, kind: str, frame: int) -> None:
        gpa = FIRST + frame * PAGE
        if kind == "approve":
            self.machine.approve(gpa, PAGE)
        else:
            self.machine.write(gpa + STORED, bytes([NOP]))

    # What the guest does: (where, value)

    def store(self, page: int, value: int = RET) -> tuple[int, int]:
        return PAGES[page] + STORED, value

    modify = store

    def load(self, page: int) -> tuple[int, int]:
        return PAGES[page] + STORED, 0

    def call(self, page: int) -> tuple[int, int]:
        return PAGES[page], 0

    def map(self, space: int, page: int, frame: int | None, access: str = "") -> tuple[int, int]:
        word = 0 if frame is None else FIRST + frame * PAGE | 1
        word |= ACCESSED_DIRTY if page % 2 else 0
        word |= (0 if "x" in access else NO_EXECUTE) | (WRITABLE if "w" in access else 0)
        return entry_of(self.machine, space, PAGES[page]), word

    def switch(self, space: int) -> tuple[int, int]:
        return SPACES[space], 0

    def end(self) -> tuple[int, int]:
        return 0, 0

    # What becomes of it

    def see(self, record) -> None:
        if isinstance(record, RefusedAccess):
            self.done[-1] = record.rule

    def skip(self, exit_record: ExceptionExit) -> bool:
        """Skip what faulted: a store, or the call whose target could not be fetched."""
        if self.done[-1] == "done":
            self.done[-1] = "fault"
        context = self.machine.vcpu.context
        if exit_record.vector == 14 and exit_record.error_code & 0x10:
            context.rip = int.from_bytes(self.machine.read(context.rsp, 8), "little")
            context.rsp += 8
        else:
            context.rip += ACCESS_LENGTH
        return True


def run(operations: list, options: RunOptions, **policy):
    """Run the operations under the policy; what came of each, the run, and the bytes of the frames at the end."""
    parts = {CODE: LOOP, FIRST: bytes([RET]) * PAGE * FRAMES, **tables()}
    made = tiny.build(
        parts,
        paging=False,
        code=(CODE, FIRST),
        registers={"cr3": SPACES[0]},
        options=options,
        policy=Policy(**{"code": "load", "wx": "fault", **policy}),
    )
    director = Director(list(operations), made.machine)
    made.machine.ports.attach(director, PORT)
    made.machine.observe(director.see)
    made.machine.on(ExceptionExit)(director.skip)
    end = made.run()
    assert end.reason == "port", end
    assert director.done.pop() == "done"
    made.machine.verify()
    return director.done, made

