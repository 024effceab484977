"""Executing exactly one instruction: what looks like it, and what does it."""

from __future__ import annotations

from unicorn.unicorn_const import UC_HOOK_MEM_READ, UC_HOOK_MEM_WRITE

from .bare_unicorn import CODE, DATA, HLT, OK, PAGE, Bare, R, W, X

TF = 1 << 8
LATCH = 0xE0000
SEVEN_AND_A_JUMP = "inc eax; " * 7 + "jmp next; next: inc eax; hlt"


def test_q21_count_one_runs_through_a_cached_block() -> None:
    b = Bare()
    b.put(CODE, SEVEN_AND_A_JUMP)
    assert b.run() == OK
    b["rax"] = 0
    assert b.run(count=1) == OK
    assert b["rax"] == 8  # all of it


def test_q21_count_one_is_exact_on_an_engine_that_only_ever_steps() -> None:
    b = Bare()
    b.put(CODE, SEVEN_AND_A_JUMP)
    for executed in range(1, 8):
        assert b.run(b.pc if executed > 1 else CODE, count=1) == OK
        assert (b.pc, b["rax"]) == (CODE + 2 * executed, executed)


def test_q22_going_back_from_count_to_free_running_drops_all_blocks() -> None:
    b = Bare()
    b.prime()
    b.put(CODE, "jmp next; next: hlt")
    b.put(DATA, HLT)
    b.run()
    again = b.translations()
    b.run(DATA, count=1)
    again.clear()
    b.run()
    assert [pc for pc, _ in again] == [CODE, CODE + 2]


def test_q27_the_end_of_a_rep_is_a_step_of_its_own() -> None:
    b = Bare()
    b.put(CODE, "rep stosb; hlt")
    b["rcx"], b["rdi"] = 2, DATA
    seen = []
    for _ in range(3):
        assert b.run(count=1) == OK
        seen.append((b.pc, b["rcx"], b["rdi"]))
    assert seen == [(CODE, 1, DATA + 1), (CODE, 0, DATA + 2), (CODE + 2, 0, DATA + 2)]


# A store into the block that it is in: mov byte [rdi], 0x90 turns "clc" into "nop".
OWN_BLOCK = b"\xc6\x07\x90" + b"\xf8" + HLT


def test_q23_a_step_over_a_store_into_its_own_block_never_ends() -> None:
    b = Bare()
    b.put(CODE, OWN_BLOCK)
    b["rdi"] = CODE + 3
    for _ in range(5):
        assert b.run(count=1) == OK
        assert (b.pc, b.ram[CODE + 3]) == (CODE, 0xF8)


def test_q23_a_step_that_fetches_from_a_latched_copy_completes() -> None:
    b = Bare()
    b.put(CODE, OWN_BLOCK)
    b.put(LATCH, OWN_BLOCK)
    writes: list[int] = []
    b.uc.hook_add(UC_HOOK_MEM_WRITE, lambda _uc, _access, address, *_rest: writes.append(address))
    alias = 0x700000
    b.pages[alias], b.pages[CODE] = (LATCH, X), (CODE, R | W)
    b["rdi"] = CODE + 3
    assert b.run(alias, count=1) == OK
    assert (b.pc, b.ram[CODE + 3], writes) == (alias + 3, 0x90, [CODE + 3])


def test_q24_the_trap_flag_steps_one_instruction_and_one_iteration() -> None:
    b = Bare()
    b.put(CODE, "inc eax; rep stosb; hlt")
    b["rcx"], b["rdi"], b["rflags"] = 2, DATA, TF | 2
    seen = b.interrupts(limit=10)
    assert b.run() == OK
    assert seen == [(1, CODE + 2), (1, CODE + 2), (1, CODE + 4)]


def test_q24_the_trap_flag_shows_in_pushf_and_skips_the_instruction_after_mov_ss() -> None:
    b = Bare()
    b.put(CODE, b"\x9c\x59" + b"\x8e\xd0" + b"\x90" + b"\x90" + HLT)  # pushfq; pop rcx; mov ss, ax; nop; nop
    b["rflags"] = TF | 2
    seen = b.interrupts(limit=10)
    assert b.run() == OK
    assert b["rcx"] & TF
    assert [pc for _, pc in seen] == [CODE + 1, CODE + 2, CODE + 5, CODE + 6]


def test_q25_a_write_hook_gets_the_ram_address_once_even_if_the_store_straddles() -> None:
    b = Bare()
    b.put(CODE, "mov [rdi], rax; hlt")
    alias, other = 0x700000, 0x9000
    b.pages[alias], b.pages[alias + PAGE] = (DATA, R | W), (other, R | W)
    b["rdi"], b["rax"] = alias + PAGE - 4, 0x1111_1111_2222_2222
    writes: list[tuple[int, int, int]] = []
    b.uc.hook_add(UC_HOOK_MEM_WRITE, lambda _uc, _access, *write: writes.append(write[:3]))
    assert b.run() == OK
    assert writes == [(DATA + PAGE - 4, 8, 0x1111_1111_2222_2222)]
    assert b.ram[other : other + 4] == b"\x11" * 4


def test_q26_a_read_hook_gets_the_ram_address_once_even_if_the_load_straddles() -> None:
    b = Bare()
    b.put(CODE, "mov rax, [rdi]; hlt")
    alias, other = 0x700000, 0x9000
    b.pages[alias], b.pages[alias + PAGE] = (DATA, R | W), (other, R | W)
    b["rdi"] = alias + PAGE - 4
    reads: list[tuple[int, int]] = []
    b.uc.hook_add(UC_HOOK_MEM_READ, lambda _uc, _access, address, size, _value, _data: reads.append((address, size)))
    assert b.run() == OK
    assert reads == [(DATA + PAGE - 4, 8)]


def test_q26_what_was_translated_before_the_hook_does_not_call_it() -> None:
    b = Bare()
    b.put(CODE, "mov rax, [rdi]; hlt")
    b["rdi"] = DATA
    assert b.run() == OK
    reads: list[int] = []
    b.uc.hook_add(UC_HOOK_MEM_READ, lambda _uc, _access, address, *_rest: reads.append(address))
    assert b.run() == OK
    assert reads == []
    b.uc.ctl_remove_cache(CODE, CODE + 1)
    assert b.run() == OK
    assert reads == [DATA]
