"""Return addresses at a modification: what the stack holds, told by rules that a reader of the records relies on."""

from __future__ import annotations

import struct

import pytest
import tiny
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CODE, DATA, PAGE, STACK, STRICT, map_page

from vmm.guest.manifest import Policy
from vmm.machine import RunOptions
from vmm.trap.callers import DEPTH, MOST, _ends_in_call

TARGET, VIEW, FRAME = 0x20000, 0x4000_0000, 0x20000
MAPS = (map_page(TARGET, FRAME), map_page(VIEW, FRAME, "rw"))
FUNCTION = bytes.fromhex("b001c3")  # mov al, 1; ret
WANTED = RunOptions(check=True, audit=True, callers=True)

#: ``main`` calls ``outer``, which has locals, and calls ``inner``, which stores.
NESTED = f"""
    call outer
    {tiny.END}
outer:
    sub rsp, 24
    call inner
    add rsp, 24
    ret
inner:
    push rbx
    mov ebx, {VIEW + 1}
    mov byte ptr [rbx], 7
    pop rbx
    ret
"""


def build(code: str = NESTED, options: RunOptions = WANTED, **rest):
    return tiny.build({CODE: code, FRAME: FUNCTION}, maps=MAPS, options=options, **rest)


def callers(made) -> list[tuple[int, ...] | None]:
    made.run()
    return [record.callers for record in made.modifications]


class TestWhatIsFound:
    def test_the_callers_innermost_first(self):
        inner_return, outer_return = callers(build())[0]
        code = tiny.assemble(NESTED)
        assert code[outer_return - CODE - 5] == code[inner_return - CODE - 5] == 0xE8
        assert outer_return == CODE + 5
        assert inner_return == CODE + code.index(0xE8, 5) + 5

    def test_nobody_looks_unless_asked(self):
        made = build(options=STRICT)
        assert callers(made) == [None]
        assert "callers" not in made.modifications[0].to_json()

    def test_a_store_outside_of_any_call_has_none(self):
        assert callers(build(f"mov ebx, {VIEW + 1}; mov byte ptr [rbx], 7; {tiny.END}")) == [()]

    def test_indirect_calls_count(self):
        code = NESTED.replace("call outer", "lea rax, [rip + outer]; mov [rsp + 64 - 64], rax; call [rsp]")
        assert len(callers(build(code, registers={"rsp": STACK - 8}))[0]) == 2

    def test_an_address_that_no_call_is_in_front_of_is_none(self):
        code = f"lea rax, [rip + here]; nop; here: push rax; mov ebx, {VIEW + 1}; mov byte ptr [rbx], 7; {tiny.END}"
        assert callers(build(code)) == [()]

    def test_an_address_of_data_is_none_though_a_call_is_in_front_of_it(self):
        code = f"push {DATA + 5}; mov ebx, {VIEW + 1}; mov byte ptr [rbx], 7; {tiny.END}"
        made = tiny.build({CODE: code, FRAME: FUNCTION, DATA: b"\xe8\0\0\0\0"}, code=[CODE, FRAME], maps=MAPS,
                          options=WANTED)
        assert callers(made) == [()]

    def test_what_is_too_deep_is_not_found(self):
        for room, found in ((DEPTH - 1, 2), (DEPTH, 1)):
            code = NESTED.replace("24", str(8 * (room - 2)))
            stack = {"rsp": STACK - PAGE + 8 * 400}
            assert len(callers(build(code, registers=stack))[0]) == found

    def test_there_are_never_more_than_the_most(self):
        calls = "".join(f"call f{i}; {tiny.END} f{i}:" for i in range(MOST + 3))
        found = callers(build(f"{calls} mov ebx, {VIEW + 1}; mov byte ptr [rbx], 7; {tiny.END}"))[0]
        assert len(found) == MOST
        assert list(found) == sorted(found, reverse=True)

    def test_a_call_across_two_pages_counts(self):
        start = CODE + PAGE - 3
        code = {
            CODE: f"mov eax, {start}; jmp rax",
            start: f"call f; {tiny.END} f: mov ebx, {VIEW + 1}; mov byte ptr [rbx], 7; {tiny.END}",
            FRAME: FUNCTION,
        }
        made = tiny.build(code, maps=(*MAPS, map_page(CODE + PAGE, CODE + PAGE)), options=WANTED)
        assert callers(made) == [(start + 5,)]

    def test_a_window_has_none(self):
        made = build(policy=Policy(writes="window", code="load"))
        assert callers(made) == [None]

    def test_user_code_has_none(self):
        assert callers(build(cpl=3)) == [()]

    @pytest.mark.parametrize(("mode", "paging"), [("protected", False), ("real", False)])
    def test_other_modes_have_none(self, mode, paging):
        code = "mov bx, 0x2000; mov ds, bx; mov byte ptr [1], 7;" if mode == "real" else f"mov byte ptr [{FRAME}], 7;"
        entry = 0x1000 if mode == "real" else CODE
        made = tiny.build({entry: f"{code} {tiny.END}", FRAME: FUNCTION}, mode=mode, paging=paging, entry=entry,
                          options=WANTED, registers={"rsp": 0x8000})
        assert callers(made) == [()]


    @pytest.mark.parametrize(
        "options", [evolve(WANTED, single_step=True), evolve(WANTED, capacity=1), evolve(WANTED, block_events=True)]
    )
    def test_they_are_the_same_however_the_guest_is_run(self, options):
        code = NESTED.replace("call outer", "mov r12d, 3; again: call outer; dec r12d; jnz again", 1)
        found = callers(build(code))
        assert [len(each) for each in found] == [2, 2, 2]
        assert callers(build(code, options)) == found


class TestHostileStacks:
    @pytest.mark.parametrize(
        "rsp", [0, 1, 8, (1 << 64) - 8, (1 << 64) - 1, 1 << 63, 1 << 47, STACK - 1, STACK - 9, DATA]
    )
    def test_any_stack_pointer_is_survived_and_changes_nothing(self, rsp):
        code = f"mov ebx, {VIEW + 1}; mov byte ptr [rbx], 7; {tiny.END}"
        ends = []
        for options in (WANTED, STRICT):
            made = build(code, options, registers={"rsp": rsp})
            made.run()
            ends.append((made.state(), made.machine.reporter.total, [r.to_json() for r in made.exits]))
        assert ends[0] == ends[1]

    @given(st.lists(st.one_of(st.integers(0, (1 << 64) - 1), st.integers(CODE - 16, CODE + PAGE)), max_size=40))
    @settings(max_examples=40, deadline=None)
    def test_whatever_lies_on_the_stack_each_answer_stands_behind_a_call(self, words):
        data = struct.pack(f"<{len(words)}Q", *words)
        code = f"mov ebx, {VIEW + 1}; mov byte ptr [rbx], 7; call f; {tiny.END} f: ret"
        parts = {CODE: code, FRAME: FUNCTION, DATA: data.ljust(320, b"\0")}
        made = tiny.build(parts, code=[CODE, FRAME], maps=MAPS, options=WANTED, registers={"rsp": DATA})
        made.run()
        call = tiny.assemble(code).index(0xE8) + 5
        assert made.modifications[0].callers == ((CODE + call,) if CODE + call in words[:DEPTH] else ())


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("call 0x20000", True),
        ("call rax", True),
        ("call r11", True),
        ("call [rax]", True),
        ("call [rax + 8]", True),
        ("call [rsp + 8]", True),
        ("call [rax + 8*rcx + 0x12345678]", True),
        ("call [rip + 0x100]", True),
        ("jmp 0x20000", False),
        ("jmp [rax + 0x12345678]", False),
        ("inc rax", False),
        ("push [rax]", False),
        ("ret", False),
    ],
)
def test_which_instructions_count_as_calls(text, counts):
    code = tiny.assemble(text)
    assert _ends_in_call((b"\x90" * 7 + code)[-7:]) is counts


def test_what_is_too_short_is_no_call():
    assert not _ends_in_call(b"")
    assert not _ends_in_call(b"\xd0")


class TestAttribution:
    """Policy ``attribute``: a frame that something may execute is never a window."""

    HOT = f"""
        mov r12d, 40
    again:
        mov ebx, {VIEW + 1}
        mov byte ptr [rbx], r12b
        mov ebx, {TARGET}
        call rbx
        dec r12d
        jnz again
        {tiny.END}
    """

    def test_each_store_to_live_code_is_on_record_with_its_instruction(self):
        made = build(self.HOT, policy=Policy(writes="attribute", code="load"))
        assert len(callers(made)) == 40
        assert {record.cause for record in made.modifications} == {"store"}

    def test_what_nothing_executes_becomes_a_window_once_it_is_hot(self):
        code = f"mov ecx, 40; mov ebx, {VIEW}; again: mov byte ptr [rbx + rcx], cl; loop again; {tiny.END}"
        maps = (map_page(VIEW, FRAME, "rw"),)
        made = tiny.build({CODE: code, FRAME: FUNCTION}, maps=maps, options=WANTED,
                          policy=Policy(writes="attribute", code="load"))
        made.run()
        assert ("code", "window", "hot frame") in [(e.before, e.after, e.cause) for e in made.frame_events]

    def test_the_guest_ends_in_the_same_state_as_by_steps(self):
        ends = []
        for writes in ("attribute", "step"):
            made = build(self.HOT, policy=Policy(writes=writes, code="load"))
            made.run()
            ends.append((made.state(), made.architectural()))
        assert ends[0] == ends[1]

    def test_it_is_live_if_only_another_address_space_executes_it(self):
        """As with text_poke: the store is made in an address space that maps the frame writable and nothing else."""
        first, second = 0x70000, 0x78000
        tables = two_spaces(first, second)
        code = f"""
            mov ebx, {TARGET}; call rbx
            mov r12d, 40
        again:
            mov eax, {second}; mov cr3, rax
            mov ebx, {VIEW + 1}; mov byte ptr [rbx], r12b
            mov eax, {first}; mov cr3, rax
            dec r12d
            jnz again
            {tiny.END}
        """
        parts = {CODE: f"mov eax, {first}; mov cr3, rax; mov eax, {CODE + 0x100}; jmp rax", **tables}
        parts[CODE] = tiny.assemble(parts[CODE]).ljust(0x100, b"\x90") + tiny.assemble(code, CODE + 0x100)
        made = tiny.build({**parts, FRAME: FUNCTION}, code=[CODE, FRAME], options=WANTED,
                          policy=Policy(writes="attribute", code="fetch"))
        made.run()
        assert [record.cause for record in made.modifications] == ["store"] * 40


def two_spaces(first: int, second: int) -> dict[int, bytes]:
    """Page tables at two places: both map the first 2 MiB to themselves, the first for execution of TARGET, too.

    Each takes five pages: PML4, PDPT, PD, and page tables for the first 2 MiB and for VIEW.
    """
    out = {}
    for root, executes in ((first, True), (second, False)):
        pages = [bytearray(PAGE) for _ in range(6)]
        entries = [(0, 0, root + PAGE), (1, 0, root + 2 * PAGE), (2, 0, root + 3 * PAGE)]
        entries += [(1, VIEW >> 30, root + 4 * PAGE), (4, 0, root + 5 * PAGE)]
        for table, index, target in entries:
            struct.pack_into("<Q", pages[table], 8 * index, target | 7)
        for page in range(0x100):
            if page << 12 != TARGET or executes:
                struct.pack_into("<Q", pages[3], 8 * page, page << 12 | 7)
        if not executes:
            struct.pack_into("<Q", pages[5], 0, FRAME | 7 | 1 << 63)
        out[root] = b"".join(pages)
    return out
