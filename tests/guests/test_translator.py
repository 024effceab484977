"""The translator inside of the guest is right for any bytecode, not only for the one that it brings.

Random programs that store into themselves are put in place of its own. What the guest computes by interpreter and by
translator is compared with a third opinion, a model of the bytecode machine.
"""

from __future__ import annotations

import re
import struct

import pytest
import tiny
from attrs import define, field, frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmm.machine import Machine

#: From STORE on, an operation ends a block.
ADD, XOR, MUL, SET, STORE, LOOP, YIELD, HALT = range(8)
ARITHMETIC = (ADD, XOR, MUL)
LENGTH = 14
SIZE = 8
#: The instruction whose operand the guest patches at each YIELD.
PATCHED = 6
ALIAS = 0x5000_0000
BYTECODE = 0x14000
BLOCK_LIMIT = 8
MASK = 0xFFFF_FFFF


@frozen
class Instruction:
    operation: int
    operand: int = 0

    def encode(self) -> bytes:
        return struct.pack("<II", self.operation, self.operand & MASK)


def arithmetic():
    return st.builds(Instruction, st.sampled_from(ARITHMETIC), st.integers(0, MASK))


@st.composite
def programs(draw) -> list[Instruction]:
    """SET, a body with one LOOP back into it, HALT. Stores go to operands of arithmetic, so that all of them end."""
    program = [Instruction(SET, draw(st.integers(1, 4)))]
    program += [draw(arithmetic()) for _ in range(LENGTH - 2)]
    program.append(Instruction(HALT))
    loop = draw(st.integers(PATCHED + 1, LENGTH - 2))
    others = [index for index in range(1, LENGTH - 1) if index not in (PATCHED, loop)]
    stores = draw(st.sets(st.sampled_from(others), max_size=3))
    targets = [index for index in range(1, LENGTH - 1) if index not in stores and index != loop]
    for index in stores:
        target = BYTECODE + draw(st.sampled_from(targets)) * SIZE + 4
        program[index] = Instruction(STORE, target + draw(st.sampled_from((0, ALIAS))))
    if draw(st.booleans()):
        program[draw(st.sampled_from([index for index in targets if index != PATCHED]))] = Instruction(YIELD)
    program[loop] = Instruction(LOOP, (draw(st.integers(1, loop)) - loop) * SIZE)
    return program


@define
class Model:
    """The bytecode machine and a translator's bookkeeping: two passes of a program, block by block."""

    code: list[list[int]]
    accumulator: int = 1
    counter: int = 0
    #: First instruction and end of each block that a translation is there of.
    live: dict[int, int] = field(factory=dict)
    made: int = 0
    dropped: int = 0
    executed: int = 0

    @classmethod
    def run(cls, program: list[Instruction]) -> Model:
        model = cls([[instruction.operation, instruction.operand] for instruction in program])
        for _ in range(2):
            at = 0
            while at is not None:
                at = model.block(at)
        return model

    def block(self, at: int) -> int | None:
        """Execute a block; where the next one begins, or None at HALT."""
        end = next(
            (index + 1 for index in range(at, at + BLOCK_LIMIT) if self.code[index][0] >= STORE), at + BLOCK_LIMIT
        )
        self.executed += 1
        if at not in self.live:
            self.made += 1
            self.live[at] = end
        for operation, operand in self.code[at : end - 1]:
            self.compute(operation, operand)
        operation, operand = self.code[end - 1]
        if operation == STORE:
            self.change((operand - BYTECODE & 0xFFF) // SIZE, self.accumulator)
        elif operation == YIELD:
            self.change(PATCHED, self.counter * 9 & MASK)
        elif operation == LOOP:
            self.counter = self.counter - 1 & MASK
            return end - 1 + operand // SIZE if self.counter else end
        elif operation == HALT:
            return None
        else:
            self.compute(operation, operand)
        return end

    def compute(self, operation: int, operand: int) -> None:
        if operation == ADD:
            self.accumulator = self.accumulator + operand & MASK
        elif operation == XOR:
            self.accumulator ^= operand
        elif operation == MUL:
            self.accumulator = self.accumulator * operand & MASK
        else:
            self.counter = operand

    def change(self, index: int, operand: int) -> None:
        """Give an instruction another operand: the blocks that it lies in are dropped, and no other."""
        self.code[index][1] = operand
        for first, end in list(self.live.items()):
            if first <= index < end:
                del self.live[first]
                self.dropped += 1


def machine_with(program: list[Instruction] | None, name: str = "translator") -> Machine:
    machine = Machine.from_manifest(name, tiny.STRICT)
    if program is not None:
        machine.write(place(machine, "program"), b"".join(instruction.encode() for instruction in program))
    return machine


def place(machine: Machine, name: str) -> int:
    address = machine.guest.image.symbols.address(name)
    assert address is not None
    return address


def number(machine: Machine, name: str) -> int:
    return int.from_bytes(machine.read(place(machine, name), 4), "little")


def results(machine: Machine) -> tuple[int, int]:
    """What the interpreter and the translator came to, as printed."""
    text = bytes(machine.console.output).decode()
    found = re.match(r"translator interpreted (\d+) translated (\d+) ", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


#: Blocks 2 and 4 hold the instruction 5 that the STORE of the second pass changes, both are there by then.
OVERLAPPING = [
    Instruction(SET, 2),
    Instruction(STORE, BYTECODE + ALIAS + 5 * SIZE + 4),
    *(Instruction(ADD, index) for index in range(2, 7)),
    Instruction(LOOP, -3 * SIZE),
    *(Instruction(MUL, index) for index in range(8, LENGTH - 1)),
    Instruction(HALT),
]


@settings(max_examples=60, deadline=None)
@given(programs())
@example(OVERLAPPING)
def test_any_program_comes_to_the_same_in_three_ways(program):
    """And exactly the stale translations are dropped: neither fewer nor more."""
    model = Model.run(program)
    with machine_with(program) as machine:
        assert machine.run().reason == "port"
        assert results(machine) == (model.accumulator,) * 2
        counted = [number(machine, name) for name in ("made", "dropped", "executed")]
        assert counted == [model.made, model.dropped, model.executed]


@pytest.mark.parametrize(("name", "same"), [("translator", True), ("translator-by-address", False)])
def test_the_program_that_it_brings_tells_right_from_wrong(name, same):
    with machine_with(None, name) as machine:
        machine.run()
        interpreted, translated = results(machine)
        assert (interpreted == translated) is same


def test_the_model_knows_the_program_that_it_brings():
    with machine_with(None) as machine:
        data = machine.read(place(machine, "program"), LENGTH * SIZE)
        model = Model.run([Instruction(*struct.unpack_from("<Ii", data, at)) for at in range(0, LENGTH * SIZE, SIZE)])
        machine.run()
        assert model.accumulator == results(machine)[0]
        assert (model.made, model.dropped, len(model.live)) == (26, 23, 3)


def test_a_store_can_end_several_translations():
    assert Model.run(OVERLAPPING).dropped == 2
