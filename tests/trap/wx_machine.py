"""A guest with page tables of its own that does what it is told: store, load, call, map, change its address space.

The guest reads its operations from memory, so that its TLB is left alone between them. For those of the host it
makes a VMCALL.
"""

from __future__ import annotations

import struct

import tiny
from attrs import define, field
from tiny import CODE, PAGE, STACK, map_page

from vmm.exits import ExceptionExit, Vmcall
from vmm.guest.manifest import Policy
from vmm.guest.pagetables import FOUR_LEVEL, PageTables
from vmm.machine import Machine, RunOptions
from vmm.records import RefusedAccess

FIRST, FRAMES = 0x20000, 3
#: Where the operations are.
ORDERS = 0x30000
#: Linear pages that the guest maps as it is told; not mapped at first.
PAGES = (0x100000, 0x101000, 0x102000, 0x40_0000_0000)
#: The page tables of the two address spaces.
SPACES = (0x60000, 0x70000)
RET, NOP = 0xC3, 0x90
#: Bytes of the instruction that loads, stores or exchanges.
ACCESS_LENGTH = 2
#: What a store changes; calls go to offset 0.
STORED = 0x10
KINDS = ("store", "load", "modify", "call", "map", "switch", "host", "end")

LOOP = f"""
        mov r12d, {ORDERS}
again:  mov edi, dword ptr [r12]
        mov ecx, dword ptr [r12 + 4]
        mov rsi, qword ptr [r12 + 8]
        add r12, 16
        cmp edi, 1; je load
        cmp edi, 2; je modify
        cmp edi, 3; je call
        cmp edi, 4; je map
        cmp edi, 5; je switch
        cmp edi, 6; je host
        cmp edi, 7; je end
store:  mov byte ptr [rsi], cl
        jmp again
load:   mov al, byte ptr [rsi]
        jmp again
modify: xchg byte ptr [rsi], cl
        jmp again
call:   call rsi
        jmp again
map:    mov rax, qword ptr [r12]
        add r12, 16
        mov qword ptr [rsi], rax
        mov rax, cr3
        mov cr3, rax
        jmp again
switch: mov cr3, rsi
        jmp again
host:   vmcall
        jmp again
end:    out 0xf4, al
"""

_PRESENT, _WRITABLE, _ACCESSED_DIRTY, _NO_EXECUTE = 1, 2, 0x60, 1 << 63


def tables() -> dict[int, bytes]:
    """Both address spaces: everything but the frames to play with is mapped, never writable and executable."""
    made = {}
    for base in SPACES:
        space = PageTables(base, FOUR_LEVEL)
        space.map(map_page(CODE, CODE, "rx"))
        for where in (STACK - PAGE, ORDERS, *(table + PAGE * i for table in SPACES for i in range(8))):
            space.map(map_page(where, where, "rw"))
        for page in PAGES:
            space.map(map_page(page, FIRST, "r"))
        made[base] = space.to_bytes()
        assert len(made[base]) <= 8 * PAGE
    return made


def entry_of(space: int, page: int, made: dict[int, bytes]) -> int:
    """Where the page-table entry of a linear page is."""
    base = table = SPACES[space]
    for shift in (39, 30, 21):
        at = table - base + (page >> shift & 511) * 8
        table = int.from_bytes(made[base][at : at + 8], "little") & 0xF_FFFF_FFFF_F000
    return table + (page >> 12 & 511) * 8


def orders_for(operations: list, made: dict[int, bytes]) -> tuple[bytes, dict[int, int]]:
    """The operations as the guest reads them; and, by what its R12 is at each, their numbers."""
    out, numbers = b"", {}
    for number, (kind, *rest) in enumerate([*operations, ("end",)]):
        value = where = 0
        if kind in ("store", "modify"):
            where, value = PAGES[rest[0]] + STORED, rest[1]
        elif kind == "load":
            where = PAGES[rest[0]] + STORED
        elif kind == "call":
            where = PAGES[rest[0]]
        elif kind == "switch":
            where = SPACES[rest[0]]
        elif kind == "map":
            where = entry_of(rest[0], PAGES[rest[1]], made)
        known = kind if kind in KINDS else "host"
        out += struct.pack("<IIQ", KINDS.index(known), value, where)
        numbers[ORDERS + len(out)] = number
        if kind == "map":
            out += struct.pack("<QQ", entry_for(*rest[1:]), 0)
    assert len(out) <= PAGE
    return out, numbers


def entry_for(page: int, frame: int | None, access: str = "") -> int:
    """A page-table entry; for every other page it is accessed and dirty already."""
    if frame is None:
        return 0
    entry = FIRST + frame * PAGE | _PRESENT | (_ACCESSED_DIRTY if page % 2 else 0)
    return entry | (_WRITABLE if "w" in access else 0) | (0 if "x" in access else _NO_EXECUTE)


@define
class Director:
    """Does the host's operations, skips what faults, and notes what came of each."""

    machine: Machine
    operations: list
    numbers: dict[int, int]
    done: list[str] = field(factory=list)

    def now(self) -> int:
        return self.numbers[self.machine.register("r12")]

    def host(self, _call: Vmcall) -> None:
        kind, frame = self.operations[self.now()]
        gpa = FIRST + frame * PAGE
        if kind == "approve":
            self.machine.approve(gpa, PAGE)
        else:
            self.machine.write(gpa + STORED, bytes([NOP]))

    def see(self, record) -> None:
        if isinstance(record, RefusedAccess):
            assert self.done[self.now()] == "done"
            self.done[self.now()] = record.rule

    def skip(self, fault: ExceptionExit) -> bool:
        """Skip a load or store, or the call whose target could not be fetched."""
        if self.done[self.now()] == "done":
            self.done[self.now()] = "fault"
        context = self.machine.vcpu.context
        if fault.vector == 14 and fault.error_code & 0x10:
            context.rip = int.from_bytes(self.machine.read(context.rsp, 8), "little")
            context.rsp += 8
        else:
            context.rip += ACCESS_LENGTH
        return True


def run(operations: list, options: RunOptions, **policy):
    """Run the operations under a policy: what came of each, and the run."""
    space = tables()
    orders, numbers = orders_for(operations, space)
    made = tiny.build(
        {CODE: LOOP, FIRST: bytes([RET]) * PAGE * FRAMES, ORDERS: orders, **space},
        paging=False,
        code=(CODE, FIRST),
        registers={"cr3": SPACES[0]},
        options=options,
        policy=Policy(**{"code": "load", "wx": "fault", **policy}),
    )
    director = Director(made.machine, operations, numbers, ["done"] * len(operations))
    made.machine.observe(director.see)
    made.machine.on(Vmcall)(director.host)
    made.machine.on(ExceptionExit)(director.skip)
    end = made.run()
    assert end.reason == "port", end
    made.machine.verify()
    return director.done, made
