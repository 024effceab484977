"""Exceptions: which hook sees them, with which RIP, and what Unicorn remembers of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from unicorn.unicorn_const import UC_ERR_INSN_INVALID, UC_HOOK_INSN_INVALID, UC_MODE_32, UC_MODE_64

from . import raw_context as at
from .bare_unicorn import CODE, DATA, HLT, OK, Bare
from .raw_context import field, poke, raw

if TYPE_CHECKING:
    from unicorn.unicorn_py3.unicorn import Uc

# name: (code after one NOP, vector, whether RIP is the next instruction's, mode, registers)
FAULTS = {
    "#DE": (b"\xf7\xf1", 0, False, UC_MODE_64, {}),
    "#GP": (b"\x8e\xd8", 13, False, UC_MODE_64, {"rax": 0x1234}),
    "BOUND": (b"\x62\x07", 5, False, UC_MODE_32, {"eax": 5, "edi": DATA}),
    "INT n": (b"\xcd\x30", 0x30, True, UC_MODE_64, {}),
    "INT3": (b"\xcc", 3, True, UC_MODE_64, {}),
    "INT 3": (b"\xcd\x03", 3, True, UC_MODE_64, {}),
    "INTO": (b"\xce", 4, True, UC_MODE_32, {"eflags": 0x802}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_q40_exceptions_reach_the_interrupt_hook_with_rip_at_or_behind_the_instruction(name: str) -> None:
    code, vector, behind, mode, registers = FAULTS[name]
    b = Bare(mode=mode)
    b.put(CODE, b"\x90" + code + HLT)
    for register, value in registers.items():
        b[register] = value
    seen = b.interrupts()
    assert b.run() == OK
    pc = CODE + 1 + (len(code) if behind else 0)
    assert seen == [(vector, pc)]
    assert b.pc == pc


INVALID = {"ud2": b"\x0f\x0b", "vmcall": b"\x0f\x01\xc1", "vmmcall": b"\x0f\x01\xd9", "rsm": b"\x0f\xaa"}


@pytest.mark.parametrize("name", INVALID)
def test_q41_invalid_instructions_and_vmcall_have_a_hook_of_their_own(name: str) -> None:
    b = Bare()
    b.put(CODE, b"\x90" + INVALID[name])
    exceptions, invalids = b.interrupts(), b.invalids()
    assert b.run() == OK
    assert (exceptions, invalids, b.pc) == ([], [CODE + 1], CODE + 1)


def test_q41_icebp_is_invalid_instead_of_a_debug_exception() -> None:
    b = Bare()
    b.put(CODE, b"\xf1")
    exceptions, invalids = b.interrupts(), b.invalids()
    assert b.run() == OK
    assert (exceptions, invalids) == ([], [CODE])


def test_q41_without_a_hook_or_with_one_that_declines_the_run_fails() -> None:
    b = Bare()
    b.put(CODE, b"\x0f\x0b")
    assert b.run() == UC_ERR_INSN_INVALID
    b.uc.hook_add(UC_HOOK_INSN_INVALID, lambda *_arguments: False)
    assert b.run() == UC_ERR_INSN_INVALID


def test_q41_a_hook_that_agrees_without_moving_rip_is_called_for_ever() -> None:
    b = Bare()
    b.put(CODE, b"\x0f\x0b")
    calls: list[int] = []

    def hook(uc: Uc, _data: object) -> bool:
        calls.append(b.pc)
        if len(calls) == 50:
            uc.emu_stop()
        return True

    b.uc.hook_add(UC_HOOK_INSN_INVALID, hook)
    assert b.run() == OK
    assert calls == [CODE] * 50


def divides_by_zero() -> Bare:
    b = Bare()
    b.put(CODE, b"\xf7\xf1" + HLT)
    return b


def test_q42_a_second_unrelated_fault_becomes_a_double_fault_and_a_third_looks_like_hlt() -> None:
    b = divides_by_zero()
    seen = b.interrupts()
    assert [b.run() for _ in range(3)] == [OK] * 3
    assert seen == [(0, CODE), (8, CODE)]


def test_q42_software_interrupts_in_between_do_not_clear_it() -> None:
    b = divides_by_zero()
    b.put(DATA, b"\xcd\x30" + HLT)
    seen = b.interrupts()
    for start in (CODE, DATA, CODE):
        b.run(start)
    assert [vector for vector, _ in seen] == [0, 0x30, 8]


def test_q42_resetting_the_raw_field_keeps_faults_apart() -> None:
    b = divides_by_zero()
    seen = b.interrupts()
    for _ in range(3):
        b.run()
        assert field(raw(b), at.OLD_EXCEPTION) == 0
        poke(b, at.OLD_EXCEPTION, at.NONE)
    assert seen == [(0, CODE)] * 3


def test_q43_nothing_is_delivered_through_the_idt() -> None:
    b = Bare()
    b.put(CODE, b"\xcd\x30" + b"\xff\xc0" + HLT)
    b.interrupts(limit=2)
    assert b.run() == OK
    assert (b["rax"], b.pc) == (1, CODE + 5)  # on behind the INT, as if it were not there


@pytest.mark.parametrize(("name", "text"), [("syscall", "syscall"), ("sysenter", "sysenter")])
def test_q44_syscall_only_calls_its_hook_and_ends_its_block(name: str, text: str) -> None:
    b = Bare()
    b.put(CODE, text + "; inc eax; hlt")
    before = b["rcx"], b["r11"], b["cs"]
    pcs: list[int] = []
    b.on_instruction(name, lambda *_arguments: pcs.append(b.pc))
    assert b.run() == OK
    assert (pcs, b["rax"], b["rcx"], b["r11"], b["cs"]) == ([CODE], 1, *before)
    b.on_instruction(name, lambda uc, _data: uc.emu_stop())
    assert (b.run(), b.pc, b["rax"]) == (OK, CODE + 2, 1)


def test_q45_popf_sets_the_trap_flag_for_the_instruction_after_the_next() -> None:
    b = Bare()
    b.put(CODE, "push 0x102; popfq; inc eax; inc eax; hlt")
    seen = b.interrupts()
    assert b.run() == OK
    assert seen == [(1, CODE + 8)]
    assert b["rax"] == 1


def test_q46_execution_breakpoints_work_if_the_guest_sets_them_and_not_through_the_api() -> None:
    b = Bare()
    b.put(CODE, "inc eax; inc eax; hlt")
    b["dr0"], b["dr7"] = CODE + 2, 0x401
    seen = b.interrupts()
    assert (b.run(), seen) == (OK, [])
    b.put(CODE, f"mov rcx, {CODE + 0x100}; mov dr0, rcx; mov ecx, 0x401; mov dr7, rcx; jmp {CODE + 0x100}")
    b.put(CODE + 0x100, "inc eax; hlt")
    b.uc.ctl_flush_tb()
    assert b.run() == OK
    assert (seen, b["dr6"] & 15) == ([(1, CODE + 0x100)], 1)


def test_q46_data_breakpoints_never_fire() -> None:
    b = Bare()
    b.put(CODE, "mov dr1, rdi; mov ecx, 0xd00404; mov dr7, rcx; jmp l; l: mov [rdi], eax; nop; hlt")
    b["rdi"] = DATA
    seen = b.interrupts()
    assert (b.run(), seen) == (OK, [])
