"""Translated blocks: what makes them stale, what removes them, what reports them."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable

import pytest
from unicorn.unicorn_const import UC_ARCH_X86, UC_MODE_64
from unicorn.unicorn_py3.unicorn import Uc, UcError
from unicorn.x86_const import UC_X86_REG_RBX, UC_X86_REG_RCX, UC_X86_REG_RDI, UC_X86_REG_RIP, UC_X86_REG_RSP

from .bare_unicorn import (
    CODE,
    DATA,
    HLT,
    OK,
    PAGE,
    REFUSED,
    SIZE,
    STACK,
    Bare,
    R,
    W,
    X,
    address_of,
    asm,
    dies,
)

ALIAS = 0x700000
WINDOW = 0x7F00_0000_0000
RETURN = asm("mov eax, 1; hlt")
IMMEDIATE = 1  # offset of the byte that RETURN loads into EAX


def primed() -> Bare:
    b = Bare()
    b.prime()
    return b


def patched(b: Bare, value: int, at: int = CODE) -> Bare:
    """Change the immediate behind Unicorn's back."""
    b.ram[at + IMMEDIATE] = value
    return b


def result(b: Bare, start: int = CODE) -> int:
    b["rax"] = 0
    assert b.run(start) == OK
    return b["rax"]


def through_the_mapping(b: Bare) -> None:
    b.ram[CODE + IMMEDIATE] = 2


def through_mem_write(b: Bare) -> None:
    b.uc.mem_write(CODE + IMMEDIATE, b"\x02")


@pytest.mark.parametrize("write", [through_the_mapping, through_mem_write])
def test_q10_host_writes_never_invalidate(write: Callable[[Bare], None]) -> None:
    b = Bare()
    b.put(CODE, RETURN)
    assert result(b) == 1
    write(b)
    assert result(b) == 1
    b.uc.ctl_flush_tb()
    assert result(b) == 2


def test_q11_remove_cache_removes_the_blocks_of_all_aliases() -> None:
    b = Bare()
    b.put(CODE, RETURN)
    b.pages[ALIAS] = (CODE, R | X)
    assert result(b) == result(b, ALIAS) == 1
    patched(b, 2).uc.ctl_remove_cache(CODE, CODE + 1)
    assert result(b) == result(b, ALIAS) == 2


def test_q12_remove_cache_through_a_page_without_x_does_nothing_and_says_nothing() -> None:
    b = Bare()
    b.put(CODE, RETURN)
    assert result(b) == 1
    b.pages[ALIAS] = (CODE, R | W)
    patched(b, 2).uc.ctl_remove_cache(ALIAS, ALIAS + PAGE)
    assert result(b) == 1
    b.uc.ctl_remove_cache(CODE, CODE + PAGE)
    assert result(b) == 2


def test_q13_remove_cache_over_scattered_ram_removes_the_first_pages_blocks_only() -> None:
    b = Bare()
    other = 0x9000
    b.put(CODE, RETURN)
    b.put(other, RETURN)
    b.pages[ALIAS], b.pages[ALIAS + PAGE] = (CODE, R | X), (other, R | X)
    assert result(b) == result(b, other) == 1
    patched(patched(b, 2), 2, other).uc.ctl_remove_cache(ALIAS, ALIAS + 2 * PAGE)
    assert (result(b), result(b, other)) == (2, 1)


def test_q14_an_identity_window_known_to_the_callback_alone_reaches_every_frame() -> None:
    b = Bare()
    b.put(CODE, RETURN)
    b.pages[ALIAS] = (CODE, X)
    assert result(b, ALIAS) == 1
    b.pages[CODE] = (CODE, R | W)
    b.pages[WINDOW + CODE] = (CODE, X)
    patched(b, 2).uc.ctl_remove_cache(WINDOW + CODE, WINDOW + CODE + PAGE)
    assert result(b, ALIAS) == 2


def test_q14_remove_cache_takes_the_blocks_that_overlap_and_leaves_the_others() -> None:
    b = primed()
    b.put(CODE, "nop; nop; jmp next; next: hlt")
    b.put(CODE + 0x100, RETURN)
    b.run()
    b.run(CODE + 0x100)
    again = b.translations()
    b.uc.ctl_remove_cache(CODE + 3, CODE + 4)  # the last byte of the JMP
    b.run()
    b.run(CODE + 0x100)
    assert again == [(CODE, 4)]


def test_q15_a_new_engine_does_not_report_translations_until_a_block_has_returned() -> None:
    b = Bare()
    for page in range(1, 4):
        b.put(page * PAGE, b"\xff\xc0\xf4")  # inc eax; hlt: HLT does not return
    b.put(0x4000, b"\xeb\x00\xeb\x00\xf4")  # two jumps, then hlt
    seen = b.translations()
    for page in range(1, 5):
        assert b.run(page * PAGE) == OK
    assert seen == [(0x4002, 2), (0x4004, 1)]


def test_q15_a_primed_engine_reports_every_translation_once() -> None:
    b = primed()
    b.put(CODE, "inc eax; call sub; push last; ret; sub: mov rbx, back; jmp rbx; back: ret; last: hlt")
    seen = b.translations()
    assert b.run() == OK
    first = list(seen)
    assert first[0][0] == CODE
    assert len(first) == 5
    b.uc.ctl_remove_cache(CODE, CODE + 1)
    assert b.run() == OK
    assert seen == [*first, first[0]]
    b.uc.ctl_flush_tb()
    assert b.run() == OK
    assert seen[-5:] == first


def test_q15_translations_depend_on_iopl_and_are_reported_for_each() -> None:
    b = primed()
    b.put(CODE, HLT)
    seen = b.translations()
    for flags in (0x2, 0x3002, 0x2, 0x3002):
        b["rflags"] = flags
        b.run()
    assert seen == [(CODE, 1)] * 2


def test_q16_request_cache_translates_without_a_report() -> None:
    b = primed()
    b.put(CODE, RETURN)
    seen = b.translations()
    b.uc.ctl_request_cache(CODE)
    assert result(patched(b, 2)) == 1
    assert seen == []


def test_q16_request_cache_of_a_refused_page_kills_the_process() -> None:
    assert dies("b = Bare(); b.refuse(0x5000); b.uc.ctl_request_cache(0x5000)")


# A loop that patches a function and calls it: ECX counts down, each result goes to [RBX].
FUNCTION = 0x9000
PATCH_AND_CALL = "l: mov byte ptr [rdi], cl; call 0x9000; mov [rbx], al; inc rbx; dec ecx; jnz l; hlt"
RIGHT = [4, 3, 2, 1]


Put = Callable[[int, bytes], object]
WriteRegister = Callable[[int, int], object]


def patch_and_call(put: Put, write: WriteRegister, through: int) -> None:
    """Lay out the loop; the function is patched through the address given."""
    put(CODE, asm(PATCH_AND_CALL))
    put(FUNCTION, asm("mov eax, 0; ret", FUNCTION))
    for register, value in ((UC_X86_REG_RDI, through + 1), (UC_X86_REG_RBX, DATA), (UC_X86_REG_RCX, 4)):
        write(register, value)
    write(UC_X86_REG_RSP, STACK)


@pytest.mark.parametrize(("permissions", "results"), [(R | W, [4, 4, 4, 4]), (R | W | X, RIGHT)])
def test_q17_stores_through_an_alias_without_x_leave_stale_code(permissions: int, results: list[int]) -> None:
    b = Bare()
    b.pages[FUNCTION], b.pages[ALIAS] = (FUNCTION, R | X), (FUNCTION, permissions)
    patch_and_call(b.put, b.uc.reg_write, ALIAS)
    assert b.run() == OK
    assert list(b.ram[DATA : DATA + 4]) == results


def plain() -> tuple[Uc, mmap.mmap]:
    """Unicorn as most programs use it: no virtual TLB."""
    ram = mmap.mmap(-1, SIZE)
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.mem_map_ptr(0, SIZE, R | W | X, address_of(ram))
    return uc, ram


def test_q18_flip_with_mem_protect_step_with_count_runs_stale_code() -> None:
    uc, ram = plain()
    patch_and_call(uc.mem_write, uc.reg_write, FUNCTION)
    end = CODE + len(asm(PATCH_AND_CALL)) - 1
    uc.mem_protect(FUNCTION, PAGE, R | X)
    pc = CODE
    for _ in range(20):
        try:
            uc.emu_start(pc, end)
        except UcError:
            pc = uc.reg_read(UC_X86_REG_RIP)
            uc.mem_protect(FUNCTION, PAGE, R | W)
            with contextlib.suppress(UcError):  # the "step" may run on into the function
                uc.emu_start(pc, end, count=1)
            uc.mem_protect(FUNCTION, PAGE, R | X)
        pc = uc.reg_read(UC_X86_REG_RIP)
        if pc == end:
            break
    results = list(ram[DATA : DATA + 4])
    assert results[0] == 4
    assert results != RIGHT


def test_q19_two_mappings_of_one_host_page_never_invalidate_each_other() -> None:
    uc, ram = plain()
    uc.mem_map_ptr(SIZE, SIZE, R | W | X, address_of(ram))
    patch_and_call(uc.mem_write, uc.reg_write, SIZE + FUNCTION)
    uc.emu_start(CODE, CODE + len(asm(PATCH_AND_CALL)) - 1)
    assert list(ram[DATA : DATA + 4]) == [4, 4, 4, 4]


def test_q19_what_one_engine_writes_another_does_not_know() -> None:
    one = Bare()
    two = Bare(ram=one.ram)
    one.put(CODE, RETURN)
    one.put(DATA, f"mov byte ptr [{CODE + IMMEDIATE}], 2; hlt")
    assert result(one) == 1
    assert two.run(DATA) == OK
    assert (result(one), result(two)) == (1, 2)


def test_q20_execute_only_pages_are_refused_to_loads_and_stores() -> None:
    b = Bare()
    b.pages[CODE] = (CODE, X)
    b.put(CODE, f"mov al, [{CODE}]; hlt")
    assert (b.run(), b.pc) == (REFUSED, CODE)
