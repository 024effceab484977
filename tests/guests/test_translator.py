"""The translator inside of the guest is right for any bytecode, not only for the one that it brings.

Random programs that store into themselves are put in place of its own. What the guest computes by interpreter and by
translator is compared with a third opinion, a model of the bytecode machine.
"""

from __future__ import annotations

import re
import struct

import pytest
import tiny
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.machine import Machine

ADD, XOR, MUL, SET, STORE, LOOP, YIELD, HALT = range(8)
ARITHMETIC = (ADD, XOR, MUL)
LENGTH = 14
SIZE = 8
#: The instruction whose operand the guest patches at each YIELD.
PATCHED = 6
ALIAS = 0x5000_0000
BYTECODE = 0x14000
SLOTS = 16
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
    stores = draw(st.sets(st.sampled_from(others), min_size=1, max_size=5))
    targets = [index for index in range(1, LENGTH - 1) if index not in stores and index != loop]
    for index in stores:
        target = BYTECODE + draw(st.sampled_from(targets)) * SIZE + 4
        program[index] = Instruction(STORE, target + draw(st.sampled_from((0, ALIAS))))
    if draw(st.booleans()):
        program[draw(st.sampled_from([index for index in targets if index != PATCHED]))] = Instruction(YIELD)
    program[loop] = Instruction(LOOP, (draw(st.integers(1, loop)) - loop) * SIZE)
    return program


def model(program: list[Instruction]) -> int:
    """What two passes of a program leave in the accumulator."""
    code = [[instruction.operation, instruction.operand] for instruction in program]
    accumulator, counter = 1, 0
    for _ in range(2):
        at = 0
        while code[at][0] != HALT:
            operation, operand = code[at]
            at += 1
            if operation == ADD:
                accumulator = accumulator + operand & MASK
            elif operation == XOR:
                accumulator ^= operand
            elif operation == MUL:
                accumulator = accumulator * operand & MASK
            elif operation == SET:
                counter = operand
            elif operation == STORE:
                code[(operand - BYTECODE & 0xFFF) // SIZE][1] = accumulator
            elif operation == YIELD:
                code[PATCHED][1] = counter * 9 & MASK
            else:
                counter = counter - 1 & MASK
                at += operand // SIZE - 1 if counter else 0
    return accumulator


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


@settings(max_examples=40, deadline=None)
@given(programs())
def test_any_program_comes_to_the_same_in_three_ways(program):
    with machine_with(program) as machine:
        assert machine.run().reason == "port"
        assert results(machine) == (model(program),) * 2


@settings(max_examples=10, deadline=None)
@given(programs())
def test_translations_that_were_made_are_live_or_dropped(program):
    with machine_with(program) as machine:
        machine.run()
        slots = struct.unpack(f"<{2 * SLOTS}I", machine.read(place(machine, "slots"), 8 * SLOTS))
        live = sum(bool(physical) for physical in slots[::2])
        assert number(machine, "made") == number(machine, "dropped") + live


@pytest.mark.parametrize(("name", "same"), [("translator", True), ("translator-by-address", False)])
def test_the_program_that_it_brings_tells_right_from_wrong(name, same):
    with machine_with(None, name) as machine:
        machine.run()
        interpreted, translated = results(machine)
        assert (interpreted == translated) is same


def test_the_model_knows_the_program_that_it_brings():
    with machine_with(None) as machine:
        data = machine.read(place(machine, "program"), LENGTH * SIZE)
        program = [Instruction(*struct.unpack_from("<Ii", data, at)) for at in range(0, LENGTH * SIZE, SIZE)]
        machine.run()
        assert model(program) == results(machine)[0]
