"""Virtual-TLB mode with a fill callback: what makes it an EPT, and where it is less exact than one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from unicorn.unicorn_const import UC_MEM_FETCH, UC_MEM_READ, UC_MEM_WRITE, UC_MODE_32

from .bare_unicorn import CODE, DATA, HLT, OK, PAGE, REFUSED, STACK, Bare, R, W, X, register_id
from .raw_context import CR0, HFLAGS, field, poke, raw

if TYPE_CHECKING:
    from unicorn.unicorn_py3.unicorn import Uc

FILLER = b"\xee"
NEXT = DATA + PAGE

# name: (code, bytes of the operand on the first page, registers). RDI points to the operand.
WHOLE = {
    "mov": (b"\x48\x89\x07", 4, {}),
    "add": (b"\x48\x01\x07", 4, {}),
    "lock add": (b"\xf0\x48\x01\x07", 4, {}),
    "xchg": (b"\x48\x87\x07", 4, {}),
    "bts": (b"\x48\x0f\xab\x07", 4, {}),
    "cmpxchg8b": (b"\x0f\xc7\x0f", 4, {"rax": 0xEEEEEEEE, "rdx": 0xEEEEEEEE, "rbx": 1}),
    "cmpxchg16b": (b"\x48\x0f\xc7\x0f", 8, {}),
    "cmpxchg16b, equal": (b"\x48\x0f\xc7\x0f", 8, {"rax": 0xEEEEEEEEEEEEEEEE, "rbx": 1}),
    "enter": (b"\xc8\x10\x00\x00", 4, {}),
    "fbstp": (b"\xdf\x37", 4, {}),
    "movdqu, 4 bytes on the first page": (b"\xf3\x0f\x7f\x07", 4, {}),
    "push": (b"\x50", 4, {}),
    "call": (b"\xe8\x00\x00\x00\x00", 4, {}),
    "stosq": (b"\x48\xab", 4, {}),
}
# The same with a number of bytes that is written before the second page is refused.
IN_PIECES = {
    "movups": (b"\x0f\x11\x07", 8, 8),
    "movdqu": (b"\xf3\x0f\x7f\x07", 8, 8),
    "maskmovdqu": (b"\x66\x0f\xf7\xc1", 8, 8),
    "fstp m80": (b"\xdb\x3f", 8, 8),
    "fnstenv": (b"\xd9\x37", 14, 12),
    "fnsave": (b"\xdd\x37", 50, 48),
    "fxsave": (b"\x0f\xae\x07", 256, None),
}


def straddling(code: bytes, head: int) -> tuple[Bare, int, int]:
    """A store at the end of a page whose successor is read-only: (engine, its address, its operand)."""
    b = Bare()
    start = b.put(CODE, b"\xd9\xeb") + CODE  # fldpi: something for the x87 stores
    b.put(start, code + HLT)
    b.refuse(NEXT)
    operand = NEXT - head
    b.ram[operand:NEXT] = FILLER * head
    b["rdi"], b["xmm0"], b["xmm1"] = operand, int("11" * 16, 16), int("80" * 16, 16)
    return b, start, operand


def changed(b: Bare, operand: int) -> int:
    return sum(byte != FILLER[0] for byte in b.ram[operand:NEXT])


@pytest.mark.parametrize("name", WHOLE)
def test_q01_a_refused_fill_unwinds_the_instruction(name: str) -> None:
    code, head, registers = WHOLE[name]
    b, start, operand = straddling(code, head)
    for register, value in registers.items():
        b[register] = value
    b["rsp"] = operand + 8  # for push and call: the pushed value straddles
    before = {r: b[r] for r in ("rax", "rcx", "rdx", "rdi", "rsp")}
    assert b.run() == REFUSED
    assert b.pc == start
    assert changed(b, operand) == 0
    assert {r: b[r] for r in before} == before


@pytest.mark.parametrize("name", IN_PIECES)
def test_q02_a_store_made_of_several_accesses_keeps_the_pieces_before_the_refusal(name: str) -> None:
    code, head, written = IN_PIECES[name]
    b, start, operand = straddling(code, head)
    assert b.run() == REFUSED
    assert b.pc == start
    count = changed(b, operand)
    assert count == written if written is not None else count > 100


@pytest.mark.parametrize(("code", "size"), [(b"\x60", 4), (b"\x66\x60", 2)], ids=["pushad", "pushaw"])
def test_q02_pusha_keeps_the_values_below_the_refused_page(code: bytes, size: int) -> None:
    b = Bare(mode=UC_MODE_32)
    b.put(CODE, code + HLT)
    b.refuse(STACK)
    b["esp"], b["edi"] = STACK + size, 0x11111111  # EAX is pushed first, EDI is written first
    assert b.run() == REFUSED
    assert (b.pc, b["esp"]) == (CODE, STACK + size)
    assert b.ram[STACK - 7 * size : STACK - 6 * size] == b"\x11" * size


def test_q03_a_refused_rep_stops_at_an_iteration_boundary() -> None:
    b = Bare()
    b.put(CODE, b"\xf3\xaa" + HLT)  # rep stosb
    b.refuse(NEXT)
    b["rdi"], b["rcx"], b["rax"] = NEXT - 3, 10, 0x41
    assert b.run() == REFUSED
    assert (b.pc, b["rcx"], b["rdi"]) == (CODE, 7, NEXT)
    assert b.ram[NEXT - 3 : NEXT + 1] == b"AAA\0"


def test_q04_the_callback_gets_the_page_and_can_read_rip() -> None:
    seen: list[tuple[int, int, int]] = []

    class Watching(Bare):
        def fill(self, uc: Uc, page: int, access: int, entry: Any, data: object) -> bool:
            seen.append((page, access, self.pc))
            return super().fill(uc, page, access, entry, data)

    b = Watching()
    b.put(CODE, "nop; mov eax, [rdi]; mov [rsi], eax; hlt")
    b["rdi"], b["rsi"] = DATA + 0x123, NEXT + 0x456
    assert b.run() == OK
    assert seen == [(CODE, UC_MEM_FETCH, CODE), (DATA, UC_MEM_READ, CODE + 1), (NEXT, UC_MEM_WRITE, CODE + 3)]


def test_q05_addresses_that_are_not_canonical_reach_the_callback() -> None:
    b = Bare()
    b.put(CODE, b"\x89\x01" + HLT)
    b["rcx"] = 0x8000_0000_0000_1234
    exceptions = b.interrupts()
    assert b.run() == REFUSED
    assert b.fills[-1] == (0x8000_0000_0000_1000, UC_MEM_WRITE)
    assert exceptions == []  # a processor raises #GP


def test_q06_two_engines_over_one_mapping_see_one_memory() -> None:
    one = Bare()
    two = Bare(ram=one.ram)
    one.put(CODE, "mov dword ptr [rdi], 0x1234; hlt")
    one.put(CODE + 0x100, "mov eax, [rdi]; hlt")
    one["rdi"] = two["rdi"] = DATA
    assert one.run() == two.run(CODE + 0x100) == OK
    assert two["rax"] == 0x1234


def test_q06_a_context_moves_between_engines() -> None:
    one = Bare()
    two = Bare(ram=one.ram)
    one.put(CODE, "mov eax, 5; add eax, 0x7ffffffb; movd xmm3, eax; fldpi; hlt; pushfq; pop rcx; hlt")
    assert one.run() == OK
    two.uc.context_restore(one.uc.context_save())
    assert two.run(one.pc) == OK
    assert two["rax"] == two["xmm3"] == 0x8000_0000
    assert two.uc.reg_read(register_id("st0")) == one.uc.reg_read(register_id("st0"))
    assert two["rcx"] == 0x896  # OF, SF, AF, PF of the addition


def test_q07_translation_asks_for_the_next_page_before_the_first_instruction_runs() -> None:
    b = Bare()
    b.put(NEXT - 2, b"\xff\xc0" + b"\x90" + HLT)  # inc eax | nop; hlt
    b.refuse(NEXT, R | W)
    assert b.run(NEXT - 2) == REFUSED
    assert (b.pc, b["rax"]) == (NEXT - 2, 0)  # a processor executes the INC and faults at the NOP


def test_q07_stepping_with_count_asks_for_the_next_page_as_well() -> None:
    b = Bare()
    b.put(NEXT - 2, b"\xff\xc0" + b"\x90" + HLT)
    b.refuse(NEXT, R | W)
    assert b.run(NEXT - 2, count=1) == REFUSED
    assert b["rax"] == 0


def test_q07_an_exit_point_at_the_page_end_keeps_translation_on_its_page() -> None:
    b = Bare()
    b.put(NEXT - 2, b"\xff\xc0" + b"\x90" + HLT)
    b.refuse(NEXT, R | W)
    b.uc.ctl_set_exits([NEXT])
    assert b.run(NEXT - 2) == OK
    assert (b.pc, b["rax"]) == (NEXT, 1)
    assert b.fills == [(NEXT - PAGE, UC_MEM_FETCH)]


def test_q04_permissions_of_a_fill_are_exact() -> None:
    b = Bare()
    b.put(CODE, "mov eax, [rdi]; mov [rdi], eax; hlt")
    b["rdi"] = DATA
    b.pages[DATA] = (DATA, X)
    assert (b.run(), b.pc) == (REFUSED, CODE)
    b.pages[DATA] = (DATA, R)
    assert (b.run(), b.pc) == (REFUSED, CODE + 2)
    b.pages[DATA] = (DATA, R | W)
    assert b.run() == OK
    assert b.run(DATA) == REFUSED


@pytest.mark.parametrize(
    ("text", "paging", "filled_again"),
    [
        ("mov cr3, rcx", True, [DATA, NEXT]),
        ("mov cr3, rcx", False, []),
        ("invlpg [rdi]", True, [DATA]),
        ("nop", True, []),
    ],
)
def test_q08_with_paging_on_cr3_writes_and_invlpg_lead_to_new_fills(
    text: str, paging: bool, filled_again: list[int]
) -> None:
    b = Bare()
    loads = "mov al, [rdi]; mov al, [rsi]; "
    b.put(CODE, loads + text + "; jmp l; l: " + loads + "hlt")
    b["rdi"], b["rsi"] = DATA, NEXT
    poke(b, CR0, field(raw(b), CR0) | paging << 31)
    assert b.run() == OK
    fills = [page for page, access in b.fills if access == UC_MEM_READ]
    assert fills == [DATA, NEXT, *filled_again]


def test_q08_each_privilege_level_has_fills_of_its_own() -> None:
    b = Bare()
    b.put(CODE, "mov al, [rdi]; hlt")
    b["rdi"] = DATA
    for _ in range(2):
        assert b.run() == OK
    assert b.fills.count((DATA, UC_MEM_READ)) == 1
    b.put(CODE + 0x100, "mov al, [rdi]; int 0x30")
    b.interrupts()
    poke(b, HFLAGS, field(raw(b), HFLAGS) | 3)
    assert b.run(CODE + 0x100) == OK
    assert b.fills.count((DATA, UC_MEM_READ)) == 2


def test_q08_restoring_a_context_keeps_the_tlb() -> None:
    b = Bare()
    b.put(CODE, "mov al, [rdi]; hlt")
    b["rdi"] = DATA
    saved = b.uc.context_save()
    b.run()
    saved.reg_write(register_id("cr3"), 0x7000)
    b.uc.context_restore(saved)
    b.run()
    assert b.fills.count((DATA, UC_MEM_READ)) == 1


def test_q09_descriptor_reads_of_user_code_look_like_its_own() -> None:
    b = Bare()
    gdt = 0x9000
    b.uc.reg_write(register_id("gdtr"), (0, gdt, 0xFF, 0))
    b.ram[gdt + 0x18 : gdt + 0x20] = bytes.fromhex("ffff000000f3cf00")  # a ring-3 data segment
    poke(b, HFLAGS, field(raw(b), HFLAGS) | 3)
    b.put(CODE, "mov ds, eax; int 0x30")
    b["rax"] = 0x1B
    exceptions = b.interrupts()
    assert b.run() == OK
    assert exceptions == [(0x30, CODE + 4)]
    assert (gdt, UC_MEM_READ) in b.fills
