"""Saved contexts: the raw layout, and what a context saved inside a hook lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from unicorn.unicorn_const import UC_HOOK_INTR
from unicorn.x86_const import UC_X86_REG_EFLAGS

from . import raw_context as at
from .bare_unicorn import CODE, DATA, OK, Bare, asm, register_id
from .raw_context import field, poke, raw

if TYPE_CHECKING:
    from unicorn.unicorn_py3.unicorn import Uc

GPR_NAMES = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"] + [f"r{i}" for i in range(8, 16)]
SEGMENT_BASES = {"fs_base": 4, "gs_base": 5}
TABLES = {"ldtr": 6, "tr": 7, "gdtr": 8, "idtr": 9}


def test_q50_the_size_of_a_context() -> None:
    assert len(raw(Bare())) == at.SIZE


@pytest.mark.parametrize(
    ("register", "offset", "size"),
    [(name, at.GPRS + 8 * i, 8) for i, name in enumerate(GPR_NAMES)]
    + [(f"cr{i}", at.CR0 + 8 * i, 8) for i in (2, 3)]
    + [(f"dr{i}", at.DR0 + 8 * i, 8) for i in (0, 1, 2, 3)]
    + [(name, at.SEGMENTS + at.SEGMENT_SIZE * i + 8, 8) for name, i in SEGMENT_BASES.items()]
    + [("rip", at.RIP, 8), ("mxcsr", at.MXCSR, 4), ("fpcw", at.FCW, 2)],
)
def test_q50_registers_are_at_these_offsets(register: str, offset: int, size: int) -> None:
    b = Bare()
    value = {8: 0x0000_1234_5678_9000, 4: 0x1F80, 2: 0x37F}[size]
    assert field(raw(b), offset, size) != value
    b[register] = value
    assert field(raw(b), offset, size) == value


@pytest.mark.parametrize("name", TABLES)
def test_q50_descriptor_tables_are_at_these_offsets(name: str) -> None:
    b = Bare()
    b.uc.reg_write(register_id(name), (0x28, 0x123456789000, 0x67, 0x8900))
    start = at.SEGMENTS + at.SEGMENT_SIZE * TABLES[name]
    assert (field(raw(b), start + 8, 8), field(raw(b), start + 16)) == (0x123456789000, 0x67)


def stopped_by(code: bytes, **registers: int) -> bytes:
    b = Bare()
    b.put(CODE, code)
    for name, value in registers.items():
        b[name] = value
    b.interrupts()
    assert b.run() == OK
    return raw(b)


def test_q51_the_error_code_is_in_the_raw_state_only() -> None:
    state = stopped_by(b"\x8e\xd8", rax=0x1234)  # mov ds, ax
    assert field(state, at.ERROR_CODE) == 0x1234
    assert field(state, at.OLD_EXCEPTION) == 13


def test_q51_int_n_is_marked_and_carries_the_next_rip() -> None:
    state = stopped_by(b"\xcd\x30")
    assert field(state, at.EXCEPTION_IS_INT) == 1
    assert field(state, at.EXCEPTION_NEXT_EIP, 8) == CODE + 2
    assert field(state, at.OLD_EXCEPTION) == at.NONE


@pytest.mark.parametrize("segment", ["cs", "ss"])
def test_q52_writing_cs_or_ss_changes_the_selector_and_not_the_privilege(segment: str) -> None:
    b = Bare()
    b[segment] = 0x1B
    b.put(CODE, "mov rax, cr0; hlt")
    exceptions = b.interrupts()
    assert b[segment] == 0x1B
    assert b.run() == OK
    assert exceptions == []


def test_q52_the_privilege_is_in_the_raw_hflags() -> None:
    b = Bare()
    poke(b, at.HFLAGS, field(raw(b), at.HFLAGS) | 3)
    b.put(CODE, "mov rax, cr0; hlt")
    exceptions = b.interrupts()
    assert b.run() == OK
    assert exceptions == [(13, CODE)]


FLAGS = "mov eax, 5; add eax, 0x7ffffffb; std; "
FLAGS_VALUE = 0xC96  # OF, DF, SF, AF, PF and bit 1
STOPS = {"out": "out 0x80, al", "int": "int 0x30"}


def pushed_after_restore(kind: str, *, rewrite: bool) -> tuple[int, int]:
    """Save in a hook, restore into another engine, go on: (RFLAGS as the context shows, as PUSHFQ pushes)."""
    b = Bare()
    b.put(CODE, FLAGS + STOPS[kind] + "; pushfq; pop rcx; cld; hlt")
    saved = []

    def hook(uc: Uc, *_rest: object) -> None:
        saved.append(uc.context_save())

    if kind == "int":
        b.uc.hook_add(UC_HOOK_INTR, hook)
    else:
        b.on_instruction(kind, hook)
    assert b.run() == OK
    assert b["rcx"] == FLAGS_VALUE
    context = saved[0]
    shown = context.reg_read(UC_X86_REG_EFLAGS)
    if rewrite:
        context.reg_write(UC_X86_REG_EFLAGS, shown)
    other = Bare(ram=b.ram)
    other.uc.context_restore(context)
    assert other.run(CODE + len(asm(FLAGS + STOPS[kind]))) == OK
    return shown, other["rcx"]


@pytest.mark.parametrize("kind", STOPS)
def test_q53_a_context_saved_in_a_hook_shows_the_flags_but_does_not_carry_them(kind: str) -> None:
    assert pushed_after_restore(kind, rewrite=False) == (FLAGS_VALUE, 2)


@pytest.mark.parametrize("kind", STOPS)
def test_q53_writing_the_flags_back_makes_it_exact(kind: str) -> None:
    assert pushed_after_restore(kind, rewrite=True) == (FLAGS_VALUE, FLAGS_VALUE)


def test_q53_a_context_saved_after_a_refused_fill_is_exact() -> None:
    b = Bare()
    b.put(CODE, FLAGS + "mov [rdi], al; pushfq; pop rcx; cld; hlt")
    b.refuse(DATA)
    b["rdi"] = DATA
    b.run()
    other = Bare(ram=b.ram)
    other.uc.context_restore(b.uc.context_save())
    assert other.run(b.pc) == OK
    assert other["rcx"] == FLAGS_VALUE


@pytest.mark.parametrize(("kind", "carry"), [("out", 0), ("int", 1)])
def test_q54_arithmetic_flags_written_in_an_instruction_hook_are_lost(kind: str, carry: int) -> None:
    b = Bare()
    b.put(CODE, FLAGS + STOPS[kind] + "; pushfq; pop rcx; cld; hlt")

    def hook(_uc: Uc, *_rest: object) -> None:
        b["eflags"] ^= 0x401  # CF and DF

    if kind == "int":
        b.uc.hook_add(UC_HOOK_INTR, hook)
    else:
        b.on_instruction(kind, hook)
    assert b.run() == OK
    assert (b["rcx"] >> 10 & 1, b["rcx"] & 1) == (0, carry)


@pytest.mark.parametrize("code", [b"\xfb", b"\x8e\xd0"], ids=["sti", "mov ss"])
def test_q55_the_interrupt_shadow_is_in_the_raw_hflags_for_one_instruction(code: bytes) -> None:
    b = Bare()
    b.put(CODE, code + b"\x90\x90\xf4")
    assert b.run(count=1) == OK
    assert field(raw(b), at.HFLAGS) & 8
    assert b.run(b.pc, count=1) == OK
    assert not field(raw(b), at.HFLAGS) & 8
