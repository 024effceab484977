"""Random sequences of guest accesses and of what a host does with views: every access is what a plain model says, no
host page is ever writable and executable together, and no translation outlives what ends it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import tiny
from attrs import define, field
from hypothesis import example, given, settings
from manual import Processor
from test_tables import reference
from tiny import CODE, PAGE, STRICT, map_page

from vmm.ept import EptProfile, Permission
from vmm.errors import OptionError
from vmm.exits import EptViolation
from vmm.guest.manifest import Policy

PORT = 0x100
FIRST, FRAMES, VIEWS = 0x20000, 3, 3
RWX = Permission(7)
RET = 0xC3
NOP, CLC, STC = 0x90, 0xF8, 0xF9

LOOP = f"""
again:  mov edx, {PORT}
        in eax, dx
        mov esi, eax
        in eax, dx
        mov ecx, eax
        in eax, dx
        cmp eax, 1; je load
        cmp eax, 2; je call
        cmp eax, 3; je end
        cmp eax, 4; je switch
        mov byte ptr [rsi], cl
        jmp again
load:   mov al, byte ptr [rsi]
        out dx, al
        jmp again
call:   clc
        call rsi
        setc al
        out dx, al
        jmp again
switch: xor eax, eax
        .byte 0x0f, 0x01, 0xd4
        jmp again
end:    out 0xf4, al
"""
KINDS = {"store": 0, "load": 1, "call": 2, "end": 3, "vmfunc": 4}
#: Bytes of the store and of the load.
ACCESS_LENGTH = 2

numbers = st.integers(0, FRAMES - 1)
views = st.integers(0, VIEWS - 1)
offsets = st.sampled_from([0, 1, PAGE - 2])
places = st.builds(lambda number, offset: FIRST + number * PAGE + offset, numbers, offsets)
limits = st.sampled_from([Permission.parse(text) for text in ("---", "r--", "rw-", "--x", "r-x", "rwx")])
guest_operations = st.one_of(
    st.tuples(st.just("store"), places, st.sampled_from([NOP, CLC, STC, RET])),
    st.tuples(st.just("load"), places),
    st.tuples(st.just("call"), places),
    st.tuples(st.just("vmfunc"), views),
)
operations = st.one_of(
    guest_operations,
    guest_operations,
    st.tuples(st.just("switch"), views),
    st.tuples(st.just("restrict"), views, numbers, limits),
    st.tuples(st.just("remap"), st.integers(1, VIEWS - 1), numbers, numbers),
    st.tuples(st.just("protect"), numbers, limits.filter(lambda access: access != RWX)),
    st.tuples(st.just("poke"), places, st.sampled_from([NOP, STC])),
    st.tuples(st.just("split"), views),
    st.tuples(st.just("join"), views),
)


@define
class Director:
    """The device that draws commands, and the model: bytes by frame, and by view limits and frames."""

    pending: list
    exact = True
    machine: object = None
    view: int = 0
    words: list[int] = field(factory=list)
    expected: list[int] = field(factory=list)
    seen: list[int] = field(factory=list)
    content: list[bytearray] = field(factory=lambda: [bytearray([RET]) * PAGE for _ in range(FRAMES)])
    limits: list[dict] = field(factory=lambda: [{} for _ in range(VIEWS)])
    frames: list[list] = field(factory=lambda: [list(range(FRAMES)) for _ in range(VIEWS)])
    #: (view, GPA) of each violation that a view must cause.
    denied: list[tuple[int, int]] = field(factory=list)

    def read(self, port: int, size: int) -> int:
        if not self.words:
            self.check()
            while self.pending and self.pending[0][0] not in KINDS:
                getattr(self, self.pending[0][0])(*self.pending.pop(0)[1:])
                self.check()
            kind, *arguments = self.pending.pop(0) if self.pending else ("end",)
            getattr(self, f"guest_{kind}")(*arguments)
            where, value = (0, arguments[0]) if kind == "vmfunc" else (*arguments, 0, 0)[:2]
            self.words = [KINDS[kind], value, where]
        return self.words.pop()

    def write(self, port: int, size: int, value: int) -> None:
        self.seen.append(value)

    def reach(self, gpa: int, needed: Permission) -> bytearray | None:
        """The frame that an access reaches; None if the view is against it."""
        number = (gpa - FIRST) // PAGE
        if needed & ~self.limits[self.view].get(number, RWX):
            self.denied.append((self.view, gpa))
            return None
        return self.content[self.frames[self.view][number]]

    # What the guest does

    def guest_store(self, gpa: int, value: int) -> None:
        frame = self.reach(gpa, Permission.W)
        if frame is not None:
            frame[gpa % PAGE] = value

    def guest_load(self, gpa: int) -> None:
        frame = self.reach(gpa, Permission.R)
        # Skipped, the OUT shows what is left in EAX: the number of the command.
        self.expected.append(KINDS["load"] if frame is None else frame[gpa % PAGE])

    def guest_call(self, gpa: int) -> None:
        frame = self.reach(gpa, Permission.X)
        carry = 0
        for opcode in frame[gpa % PAGE :] if frame is not None else ():
            if opcode == RET:
                break
            carry = {NOP: carry, CLC: 0, STC: 1}[opcode]
        self.expected.append(carry)

    def guest_vmfunc(self, view: int) -> None:
        self.view = view

    def guest_end(self) -> None:
        pass

    # What the host does

    def switch(self, view: int) -> None:
        self.machine.views.switch(view)
        self.view = view

    def restrict(self, view: int, number: int, limit: Permission) -> None:
        self.machine.views.restrict(view, FIRST + number * PAGE, PAGE, limit)
        self.limits[view][number] = limit

    def remap(self, view: int, number: int, target: int) -> None:
        self.machine.views.remap(view, FIRST + number * PAGE, FIRST + target * PAGE, PAGE)
        self.frames[view][number] = target

    def protect(self, number: int, access: Permission) -> None:
        self.machine.protect(FIRST + number * PAGE, PAGE, access)

    def poke(self, gpa: int, value: int) -> None:
        self.machine.write(gpa, bytes([value]))
        self.content[(gpa - FIRST) // PAGE][gpa % PAGE] = value

    def split(self, view: int) -> None:
        self.change(lambda ept: ept.split(0), view)

    def join(self, view: int) -> None:
        self.change(lambda ept: ept.join(0, size=2 << 20), view)

    def change(self, change, view: int) -> None:
        try:
            change(self.machine.views.ept(view))
        except OptionError:
            return  # no large page there, or pages that are not alike

    # The rules

    def check(self) -> None:
        machine = self.machine
        machine.verify()
        assert self.seen == self.expected
        assert machine.views.current() == self.view
        together: dict[int, int] = {}
        for number in range(VIEWS):
            ept = machine.views.ept(number)
            for gpa in range(FIRST, FIRST + FRAMES * PAGE, PAGE):
                leaf = ept.translate(gpa)
                assert leaf == reference(Processor(), ept, gpa)
                page = (gpa - FIRST) // PAGE
                assert not leaf & 7 & ~self.limits[number].get(page, RWX)
                assert ept.host_page(gpa) == FIRST + self.frames[number][page] * PAGE
                together[leaf & -PAGE] = together.get(leaf & -PAGE, 0) | leaf & 7
        assert not [hex(host) for host, bits in together.items() if bits & 2 and bits & 4]
        for number, content in enumerate(self.content):
            assert machine.memory.read(FIRST + number * PAGE, PAGE) == content


def run_sequence(sequence: list, policy: Policy) -> None:
    options = tiny.evolve(STRICT, ept=EptProfile(vm_functions=True))
    made = tiny.build(
        {CODE: LOOP, FIRST: bytes([RET]) * PAGE * FRAMES},
        maps=[map_page(FIRST, FIRST, pages=FRAMES)],
        options=options,
        code=(CODE,),
        policy=policy,
    )
    director = Director(list(sequence), machine=made.machine)
    machine = made.machine
    for _ in range(1, VIEWS):
        machine.views.add()
    machine.views.set_eptp_list([machine.views.ept(number).eptp for number in range(VIEWS)])
    machine.ports.attach(director, PORT)

    @machine.on(EptViolation)
    def skip_what_the_view_forbids(exit_record: EptViolation) -> bool | None:
        if (exit_record.view, exit_record.gpa) not in director.denied:
            return None
        director.denied.remove((exit_record.view, exit_record.gpa))
        context = machine.vcpu.context
        if exit_record.qualification & 4:
            context.rip = int.from_bytes(machine.read(context.rsp, 8), "little")
            context.rsp += 8
        else:
            context.rip += ACCESS_LENGTH
        return True

    end = made.run()
    assert end.reason == "port", end
    director.check()
    assert director.denied == []


@given(
    st.lists(operations, max_size=25),
    st.sampled_from(["step", "window"]),
    st.sampled_from(["step", "grant"]),
)
@settings(max_examples=60, deadline=None)
@example([("remap", 1, 0, 1), ("call", FIRST + PAGE), ("vmfunc", 1), ("store", FIRST, STC)], "step", "step")
@example([("restrict", 1, 0, Permission.NONE), ("load", FIRST), ("vmfunc", 1), ("load", FIRST)], "step", "step")
@example(
    [("call", FIRST), ("remap", 1, 0, 1), ("poke", FIRST + PAGE, STC), ("switch", 1), ("call", FIRST)], "step", "step"
)
@example([("restrict", 1, 0, Permission.R), ("call", FIRST), ("vmfunc", 1), ("call", FIRST)], "window", "grant")
def test_every_access_is_what_a_plain_model_says(sequence, writes, reads):
    run_sequence(sequence, Policy(reads=reads, writes=writes, code="fetch"))


@pytest.mark.long
@given(st.lists(operations, max_size=60), st.sampled_from(["step", "window"]), st.sampled_from(["step", "grant"]))
@settings(max_examples=1500, deadline=None)
def test_in_many_long_sequences_too(sequence, writes, reads):
    run_sequence(sequence, Policy(reads=reads, writes=writes, code="fetch"))
