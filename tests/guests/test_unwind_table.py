"""The unwind table of shrink-wrap is true at every instruction, for every frame on the stack, while it is rewritten.

The judge is a shadow stack: what each caller had in its registers when it called. An unwinder that knows nothing but
the guest's registers and memory, and the table as it is at that moment, must come to the same.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from attrs import define, field, frozen
from iced_x86 import Mnemonic

from vmm.machine import Machine, RunOptions
from vmm.memory import GuestMemory
from vmm.trap.policy import Trap

GUESTS = Path(__file__).parents[2] / "guests"
FUNCTIONS = ("digest", "scale", "driver")
HANDLERS = ("divide_error", "invalid_opcode")
#: Numbers of registers, and which ones a function keeps.
RBX, RSP, RBP, R12, R13 = 3, 4, 5, 12, 13
KEPT = (RBX, R12, R13)
#: Where a register is on the stack: from the end of its push on, until the end of its pop.
PUSHED, POPPED = (1, 3, 5), (5, 4, 2)
#: The end of the epilogue: three pops, POP RBP, RET.
BEHIND_RET = 7


@frozen
class Frame:
    """Where a function goes on, and with what."""

    rip: int
    rsp: int
    rbp: int
    kept: tuple[int, ...]


@frozen
class Entry:
    """An entry of the unwind table (docs/jit.md)."""

    start: int
    end: int
    saves: int
    version: int
    pad: int
    places: tuple[int, int, int, int]

    @classmethod
    def read(cls, memory: GuestMemory, address: int) -> Entry:
        *numbers, a, b, c, d = struct.unpack("<5I4B", memory.read(address, 24))
        return cls(*numbers, (a, b, c, d))

    def is_saved(self, register: int, at: int) -> bool:
        into, out, cold_into, cold_out = self.places
        if register >= self.saves:
            return cold_into + PUSHED[register] <= at < cold_out + POPPED[register]
        return into + PUSHED[register] <= at < out + POPPED[register] or at >= out + BEHIND_RET

    def caller(self, memory: GuestMemory, frame: Frame) -> Frame:
        """The frame of the function that called this one."""

        def stack(address: int) -> int:
            return int.from_bytes(memory.read(address, 8), "little")

        at = frame.rip - self.start
        kept = tuple(
            stack(frame.rbp - 8 * (i + 1)) if self.is_saved(i, at) else value for i, value in enumerate(frame.kept)
        )
        if at < 6 or at == self.places[1] + BEHIND_RET - 1:
            top, rbp = frame.rsp, frame.rbp
        else:
            base = frame.rsp if at == 6 else frame.rbp
            top, rbp = base + 8, stack(base)
        return Frame(stack(top), top + 8, rbp, kept)


@define
class Judge:
    """Watches a guest that is executed one instruction at a time."""

    machine: Machine
    #: What the callers on the stack had, innermost last, each with the place of its return address.
    shadow: list[tuple[int, Frame]] = field(factory=list)
    #: (function, version, offset) of every frame that was unwound.
    seen: set[tuple[str, int, int]] = field(factory=set)
    wrong: list[str] = field(factory=list)
    #: What the guest had before a call that it has just executed.
    _calling: Frame | None = None
    _table: dict[str, int] = field(init=False)
    _handlers: set[int] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._table = {name: self.address(f"unwind_{name}") for name in FUNCTIONS}
        self._handlers = {self.address(name) for name in HANDLERS}

    def look(self) -> None:
        """See the guest before its next instruction."""
        now = self._now()
        self._follow(now)
        entries = {name: Entry.read(self.machine.memory, place) for name, place in self._table.items()}
        running = [*(frame for _, frame in self.shadow), now][1:]
        for frame, (_, caller) in zip(running, self.shadow, strict=True):
            for name, entry in entries.items():
                if entry.start <= frame.rip < entry.end:
                    self._judge(name, entry, frame, caller)
        self._calling = now if self.machine.vcpu.instruction.decoded.mnemonic == Mnemonic.CALL else None

    def _judge(self, name: str, entry: Entry, frame: Frame, caller: Frame) -> None:
        self.seen.add((name, entry.version, frame.rip - entry.start))
        found = entry.caller(self.machine.memory, frame)
        if found != caller:
            self.wrong.append(f"{name}+{frame.rip - entry.start:#x} version {entry.version}: {found}, not {caller}")

    def _now(self) -> Frame:
        context = self.machine.vcpu.context
        registers = context.gprs
        return Frame(context.pc, registers[RSP], registers[RBP], tuple([registers[i] for i in KEPT]))

    def address(self, name: str) -> int:
        address = self.machine.guest.image.symbols.address(name)
        assert address is not None
        return address

    def _follow(self, now: Frame) -> None:
        """Keep the shadow stack: calls and exceptions push; whatever takes RSP above an entry pops it."""
        while self.shadow and self.shadow[-1][0] < now.rsp:
            self.shadow.pop()
        if self._calling is not None:
            back = int.from_bytes(self.machine.memory.read(now.rsp, 8), "little")
            self.shadow.append((now.rsp, Frame(back, now.rsp + 8, self._calling.rbp, self._calling.kept)))
        elif now.rip in self._handlers:
            rip, _, _, rsp, _ = struct.unpack("<5Q", self.machine.memory.read(now.rsp, 40))
            self.shadow.append((now.rsp, Frame(rip, rsp, now.rbp, now.kept)))


def judged(name: str, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """A guest's run, judged before every instruction, up to the first that is wrong."""
    judge = Judge(Machine.from_manifest(GUESTS / name, RunOptions(single_step=True)))
    step = Trap.step

    def looking(trap: Trap, *arguments: object) -> object:
        judge.look()
        if judge.wrong:
            judge.machine.stop()
        return step(trap, *arguments)  # type: ignore[arg-type]  # whatever the run loop gives

    monkeypatch.setattr(Trap, "step", looking)
    judge.machine.run()
    return judge


@pytest.fixture(scope="module")
def right() -> Judge:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return judged("shrink-wrap", monkeypatch)


def test_every_frame_is_unwound_to_what_its_caller_had(right):
    assert right.wrong == []


@pytest.mark.parametrize("function", ["digest", "scale"])
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_at_every_instruction_that_is_rewritten(right, function, version):
    """At the entry, and before and after each save and restore, in the prologue's and the cold path's places."""
    places = {"in": (0, *PUSHED), "out": (0, *POPPED, BEHIND_RET - 1)}
    if version > 1:  # the cold path does not run before
        places |= {"cold_in": (0, *PUSHED), "cold_out": (0, *POPPED)}
    start = right.address(function)
    wanted = {right.address(f"{function}_{name}") - start + at for name, ats in places.items() for at in ats}
    assert {0, 5, 6} | wanted <= {at for name, seen, at in right.seen if (name, seen) == (function, version)}


@pytest.mark.parametrize("wrong", ["shrink-wrap-unwind", "shrink-wrap-clobber"])
def test_the_wrong_versions_are_found_out(wrong, monkeypatch):
    assert judged(wrong, monkeypatch).wrong
