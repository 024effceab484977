"""Delivery undone by the processor's own IRETQ, on bare Unicorn."""

import pytest
from delivery_fakes import CODE64, DATA32, IF, LMA, FakeMemory, FakeState, descriptor, gate64
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
from unicorn import x86_const as x86

from vmm.cpu.delivery import Event, EventType, deliver
from vmm.cpu.state import Segment

GDT, IDT, HANDLER, PROGRAM = 0x1000, 0x2000, 0x6000, 0x5000
SIZE = 0x20000
REGISTERS = (
    x86.UC_X86_REG_RIP,
    x86.UC_X86_REG_RSP,
    x86.UC_X86_REG_EFLAGS,
    x86.UC_X86_REG_CS,
    x86.UC_X86_REG_SS,
)
IRETQ = bytes.fromhex("48cf")
ADD_RSP_8_IRETQ = bytes.fromhex("4883c408") + IRETQ


def run_handler(state: FakeState, memory: FakeMemory, instructions: int) -> list[int]:
    """The registers after the handler's ``instructions``, executed from the delivered state at ring 0."""
    engine = Uc(UC_ARCH_X86, UC_MODE_64)
    engine.mem_map(0, SIZE)
    engine.mem_write(0, bytes(memory.data))
    engine.reg_write(x86.UC_X86_REG_GDTR, (0, GDT, 0xFFF, 0))
    engine.reg_write(x86.UC_X86_REG_CS, state.segment("cs").selector)
    engine.reg_write(x86.UC_X86_REG_SS, state.segment("ss").selector)
    engine.reg_write(x86.UC_X86_REG_EFLAGS, state.rflags)
    engine.reg_write(x86.UC_X86_REG_RSP, state.rsp)
    engine.emu_start(state.rip, SIZE, count=instructions)
    return [engine.reg_read(register) for register in REGISTERS]


@pytest.mark.parametrize("rsp", [0x8000, 0x8007, 0x8008])
@pytest.mark.parametrize("rflags", [IF | 2, 0x8D7 | IF, 0x400 | 2])
@pytest.mark.parametrize("error_code", [None, 0x55])
@pytest.mark.parametrize("kind", [0xE, 0xF])
def test_iretq_returns_to_the_interrupted_state(rsp, rflags, error_code, kind):
    memory = FakeMemory()
    memory.put(GDT + 8, descriptor(CODE64) + descriptor(DATA32))
    memory.put(IDT + 0x40 * 16, gate64(HANDLER, kind=kind))
    memory.put(HANDLER, IRETQ if error_code is None else ADD_RSP_8_IRETQ)
    state = FakeState(efer=LMA, rip=PROGRAM, rsp=rsp, rflags=rflags)
    state.segments["cs"] = Segment(8, 0, 0xFFFF_FFFF, CODE64)
    state.segments["ss"] = Segment(0x10, 0, 0xFFFF_FFFF, DATA32)
    deliver(state, memory, Event(0x40, EventType.HARDWARE_EXCEPTION, error_code))
    assert state.rip == HANDLER
    after = run_handler(state, memory, instructions=1 if error_code is None else 2)
    assert after == [PROGRAM, rsp, rflags, 8, 0x10]
