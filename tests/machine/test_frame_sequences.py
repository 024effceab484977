"""Random sequences of guest accesses and host operations: the rules hold after every one, and every result is right.

The guest is a loop that asks a device what to do next: store, load or call somewhere. The device draws the
commands, does the host's operations (write, alias, protect, seal) by itself between two instructions, and
checks the machine against a model before it answers.
"""

from __future__ import annotations

import hypothesis.strategies as st
import tiny
from attrs import define, field
from hypothesis import example, given, settings
from tiny import CODE, PAGE, STRICT, map_page

from vmm.ept import Permission
from vmm.errors import OptionError
from vmm.exits import ExceptionExit
from vmm.guest.manifest import Policy
from vmm.memory.frames import FrameState

PORT = 0x100
FIRST, FRAMES = 0x20000, 4
#: GPAs that are made to reach one frame or another.
SPARE, SPARES = 0x80000, 3
#: The guest runs and writes everything at its identity address and at this alias.
ALIAS = 0x4000_0000
RET, NOP, CLC, STC, CMC = 0xC3, 0x90, 0xF8, 0xF9, 0xF5

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
end:    out 0xf4, al
"""
STORE_LENGTH = 2
KINDS = {"store": 0, "load": 1, "call": 2, "end": 3}

frames = st.integers(0, FRAMES - 1)
offsets = st.sampled_from([0, 1, 2, 3, 127, 128, PAGE - 3, PAGE - 2])
pages = st.one_of(
    frames.map(lambda n: FIRST + n * PAGE),
    frames.map(lambda n: ALIAS + FIRST + n * PAGE),
    st.integers(0, SPARES - 1).map(lambda n: SPARE + n * PAGE),
)
places = st.builds(int.__add__, pages, offsets)
opcodes = st.sampled_from([NOP, CLC, STC, CMC, RET])
#: Without W alone: that is an EPT misconfiguration, and the end of the run.
accesses = st.sampled_from([Permission(bits) for bits in range(8) if bits & 3 != Permission.W])
guest_operations = st.one_of(
    st.tuples(st.just("store"), places, opcodes),
    st.tuples(st.just("load"), places),
    st.tuples(st.just("call"), places),
)
operations = st.one_of(
    guest_operations,
    guest_operations,
    st.tuples(st.just("write"), places.filter(lambda gva: gva < ALIAS), opcodes),
    st.tuples(st.just("alias"), st.integers(0, SPARES - 1), frames),
    st.tuples(st.just("protect"), pages.filter(lambda gva: gva < ALIAS), accesses),
    st.tuples(st.just("seal"), frames),
)


@define
class Director:
    """The device that draws commands and knows what must come of them."""

    pending: list
    exact = True
    machine: object = None
    words: list[int] = field(factory=list)
    expected: list[int] = field(factory=list)
    seen: list[int] = field(factory=list)
    #: {frame: bytes} and {spare GPA: frame}
    content: dict[int, bytearray] = field(factory=lambda: {i: bytearray([RET]) * PAGE for i in range(FRAMES)})
    spares: dict[int, int] = field(factory=dict)
    seals: set[int] = field(factory=set)
    refused: int = 0

    def locate(self, gva: int) -> tuple[int, int]:
        """The frame and the offset that a linear address reaches."""
        page = gva % ALIAS & -PAGE
        frame = self.spares[page] if page >= SPARE else (page - FIRST) // PAGE
        return frame, gva % PAGE

    # The port

    def read(self, port: int, size: int) -> int:
        if not self.words:
            self.check()
            while self.pending and self.pending[0][0] not in KINDS:
                getattr(self, self.pending[0][0])(*self.pending.pop(0)[1:])
                self.check()
            kind, *arguments = self.pending.pop(0) if self.pending else ("end",)
            getattr(self, kind)(*arguments)
            where, value = (*arguments, 0, 0)[:2]
            self.words = [KINDS[kind], value, where]
        return self.words.pop()

    def write(self, port: int, size: int, value: int) -> None:
        self.seen.append(value)

    # What the guest does

    def store(self, gva: int, value: int) -> None:
        frame, offset = self.locate(gva)
        if frame in self.seals:
            self.refused += 1
        else:
            self.content[frame][offset] = value

    def load(self, gva: int) -> None:
        frame, offset = self.locate(gva)
        self.expected.append(self.content[frame][offset])

    def call(self, gva: int) -> None:
        frame, offset = self.locate(gva)
        carry = 0
        for opcode in self.content[frame][offset:]:
            if opcode == RET:
                break
            carry = {NOP: carry, CLC: 0, STC: 1, CMC: 1 - carry}[opcode]
        self.expected.append(carry)

    def end(self) -> None:
        pass

    # What the host does

    def write_memory(self, gpa: int, value: int) -> None:
        frame, offset = self.locate(gpa)
        if frame in self.seals:
            try:
                self.machine.write(gpa, bytes([value]))
            except OptionError:
                return
            raise AssertionError("a sealed frame was written")
        self.machine.write(gpa, bytes([value]))
        self.content[frame][offset] = value

    def alias(self, spare: int, frame: int) -> None:
        page = SPARE + spare * PAGE
        sealed = self.spares.get(page) in self.seals
        try:
            self.machine.alias(page, FIRST + frame * PAGE, PAGE)
        except OptionError:
            assert sealed
        else:
            assert not sealed
            self.spares[page] = frame

    def protect(self, gpa: int, access: Permission) -> None:
        frame, _ = self.locate(gpa)
        both = access & Permission.W and access & Permission.X
        sealed = frame in self.seals and access & Permission.W
        try:
            self.machine.protect(gpa, PAGE, access)
        except OptionError:
            assert both or sealed
        else:
            assert not both
            assert not sealed

    def seal(self, frame: int) -> None:
        self.machine.seal(FIRST + frame * PAGE, PAGE)
        self.seals.add(frame)

    # The rules

    def check(self) -> None:
        """No frame is writable and executable through its GPAs together, none with live blocks is writable."""
        machine = self.machine
        machine.verify()
        assert self.seen == self.expected
        together: dict[int, Permission] = {}
        for gpa in range(0, tiny.MEMORY, PAGE):
            leaf = machine.ept.translate(gpa)
            together[leaf & -PAGE] = together.get(leaf & -PAGE, Permission.NONE) | leaf & 7
        for host, allowed in together.items():
            assert not (allowed & Permission.W and allowed & Permission.X), f"{host:#x} is {Permission(allowed)}"
            assert machine.frames.at(host).state is not FrameState.STEPPING
            if allowed & Permission.W:
                assert not machine.blocks.overlapping(host, PAGE)
        for frame, content in self.content.items():
            host = FIRST + frame * PAGE
            assert machine.memory.read(host, PAGE) == content
            for block in machine.blocks.overlapping(host, PAGE):
                assert block.code == b"".join(machine.memory.read(*span) for span in block.spans)


def run_sequence(sequence: list, policy: Policy):
    maps = [map_page(FIRST, FIRST, pages=FRAMES), map_page(ALIAS + FIRST, FIRST, pages=FRAMES)]
    maps += [map_page(gpa, gpa) for gpa in range(SPARE, SPARE + SPARES * PAGE, PAGE)]
    ret = bytes([RET])
    made = tiny.build({CODE: LOOP, FIRST: ret * PAGE * FRAMES}, maps=maps, options=STRICT, code=(CODE,), policy=policy)
    director = Director([("alias", i, 0) for i in range(SPARES)] + list(sequence))
    # Not by its own name, which is that of the port's operation.
    director.pending = [
        ("write_memory", *rest) if kind == "write" else (kind, *rest) for kind, *rest in director.pending
    ]
    director.machine = made.machine
    made.machine.ports.attach(director, PORT)

    @made.machine.on(ExceptionExit)
    def skip_a_refused_store(exit_record: ExceptionExit) -> bool:
        assert (exit_record.vector, exit_record.error_code) == (13, 0)
        director.refused -= 1
        made.machine.vcpu.context.rip += STORE_LENGTH
        return True

    end = made.run()
    assert end.reason == "port", end
    director.check()
    assert director.refused == 0
    return made, director


HERE, THERE = FIRST, ALIAS + FIRST


@given(
    st.lists(operations, max_size=25),
    st.sampled_from(["step", "window", "adaptive"]),
    st.sampled_from(["step", "grant"]),
)
@settings(max_examples=80, deadline=None)
@example(
    [("call", HERE), ("protect", FIRST, Permission.R | Permission.W), ("store", HERE, STC), ("call", THERE)],
    "step",
    "step",
)
@example([("protect", FIRST, Permission.X), ("call", HERE), ("write", FIRST, STC), ("call", HERE)], "step", "step")
@example([("protect", FIRST, Permission.R), ("store", HERE, STC), ("call", HERE), ("call", HERE)], "step", "step")
@example([("call", HERE), ("store", HERE, STC), ("seal", 0), ("call", HERE), ("store", HERE, NOP)], "window", "step")
@example(
    [("alias", 0, 1), ("call", SPARE), ("alias", 0, 2), ("store", FIRST + PAGE, STC), ("call", SPARE)], "step", "grant"
)
def test_rules_hold_and_results_are_right(sequence, writes, reads):
    run_sequence(sequence, Policy(reads=reads, writes=writes, code="fetch"))
