"""How a run ends, and what has happened by then."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading

import pytest
from unicorn.unicorn_const import (
    UC_ARCH_X86,
    UC_HOOK_BLOCK,
    UC_HOOK_MEM_WRITE,
    UC_HOOK_MEM_WRITE_PROT,
    UC_MEM_FETCH,
    UC_MODE_64,
)
from unicorn.unicorn_py3.unicorn import Uc, UcContext, UcError, uclib
from unicorn.x86_const import UC_X86_REG_RCX, UC_X86_REG_RDI, UC_X86_REG_RDX, UC_X86_REG_RIP

from .bare_unicorn import CODE, DATA, OK, PAGE, REFUSED, Bare, R, address_of, asm

OUT_80 = "mov eax, 5; add eax, 0x7ffffffb; out 0x80, al; "
AT_OUT = CODE + 10
AFTER_OUT = CODE + 12


def test_q30_until_is_fetched_when_the_run_ends() -> None:
    b = Bare()
    b.uc.ctl_exits_enabled(False)
    b.put(CODE, "hlt")
    b.uc.emu_start(CODE, 0x5123)
    assert (0x5000, UC_MEM_FETCH) in b.fills


def test_q30_with_exits_enabled_and_none_set_nothing_is_fetched() -> None:
    b = Bare()
    b.put(CODE, "hlt")
    b.uc.emu_start(CODE, 0x5123)
    assert b.fills == [(CODE, UC_MEM_FETCH)]


def stopped_at_entry(number: int) -> Bare:
    """A counting loop, stopped in the hook of its block entry of that number."""
    b = Bare()
    b.put(CODE, "mov ecx, 9; l: inc rax; dec ecx; jnz l; hlt")
    entries: list[int] = []

    def hook(uc: Uc, address: int, _size: int, _data: object) -> None:
        entries.append(address)
        if len(entries) == number:
            uc.emu_stop()

    b.uc.hook_add(UC_HOOK_BLOCK, hook)
    b.run()
    return b


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_q36_a_stop_in_a_block_hook_is_before_the_block(number: int) -> None:
    b = stopped_at_entry(number)
    assert (b.pc, b["rax"]) == (CODE if number == 1 else CODE + 5, number - 1)


def test_q36_the_block_is_entered_anew() -> None:
    b = stopped_at_entry(4)
    b.run(b.pc)
    assert (b["rax"], b["rcx"]) == (9, 0)


def test_q36_each_iteration_of_rep_is_an_entry() -> None:
    b = Bare()
    b.put(CODE, "mov ecx, 4; mov edi, 0x40000; rep stosb; hlt")
    entries: list[int] = []
    b.uc.hook_add(UC_HOOK_BLOCK, lambda _uc, address, _size, _data: entries.append(address))
    b.run()
    assert entries.count(CODE + 10) == 4


def test_q37_a_hook_may_be_machine_code() -> None:
    """A block hook that adds the size of each block to its user data."""
    code = mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("89d0 480101 c3"))  # mov eax, edx; add [rcx], rax; ret
    b = Bare()
    b.put(CODE, "mov ecx, 3; l: dec ecx; jnz l; hlt")
    total, handle = ctypes.c_uint64(), ctypes.c_size_t()
    status = uclib.uc_hook_add(
        b.uc._uch, ctypes.byref(handle), ctypes.c_int(UC_HOOK_BLOCK), ctypes.c_void_p(address_of(code)),
        ctypes.byref(total), ctypes.c_uint64(1), ctypes.c_uint64(0),
    )  # fmt: skip
    assert (status, b.run()) == (0, OK)
    assert total.value == 9 + 2 * 4 + 1


def test_q31_hlt_returns_success_with_rip_behind_it() -> None:
    b = Bare()
    b.put(CODE, "inc eax; hlt; inc ebx; hlt")
    assert (b.run(), b.pc) == (OK, CODE + 3)
    assert (b.run(b.pc), b.pc, b["rbx"]) == (OK, CODE + 6, 1)


def stop(uc: Uc, *_rest: object) -> int:
    uc.emu_stop()
    return 0


@pytest.mark.parametrize(
    ("rest", "pc", "ecx", "stored"),
    [
        ("inc ecx; inc ecx; jmp 0x1800", 0x1800, 2, 0),
        ("inc ecx; mov [rdi], cl; inc ecx; jmp 0x1800", AFTER_OUT + 2, 1, 1),  # RIP is at the store
        ("inc ecx; inc byte ptr [rdi]; inc ecx; jmp 0x1800", AFTER_OUT + 2, 1, 0),
        ("lock inc byte ptr [rdi]; jmp 0x1800", AFTER_OUT, 0, 0),
    ],
)
def test_q32_a_stop_in_an_out_hook_waits_for_a_memory_access_or_the_end_of_the_block(
    rest: str, pc: int, ecx: int, stored: int
) -> None:
    b = Bare()
    b.put(CODE, OUT_80 + rest)
    b["rdi"] = DATA
    b.on_instruction("out", stop)
    assert b.run() == OK
    assert (b.pc, b["rcx"], b.ram[DATA]) == (pc, ecx, stored)


def test_q32_rip_written_in_an_out_hook_is_lost() -> None:
    b = Bare()
    b.put(CODE, OUT_80 + "inc ecx; hlt")

    def hook(_uc: Uc, *_rest: object) -> None:
        b["rip"] = 0x3000

    b.on_instruction("out", hook)
    assert (b.run(), b.pc, b["rcx"]) == (OK, AFTER_OUT + 3, 1)


class Stoppable(Bare):
    """Stops exactly at an OUT: what the rest of the block would do is kept off memory and thrown away."""

    stopped_at: UcContext | None = None

    def fill(self, uc: Uc, *arguments: object) -> bool:
        return self.stopped_at is None and super().fill(uc, *arguments)  # type: ignore[arg-type]

    def on_out(self, uc: Uc, *_rest: object) -> None:
        if self.stopped_at is None:
            self.stopped_at = uc.context_save()
            self.flush_tlb()
            uc.emu_stop()


@pytest.mark.parametrize("rest", ["inc ecx; mov [rdi], cl; hlt", "lock inc byte ptr [rdi]; hlt", "jmp rax"])
def test_q32_saved_context_empty_tlb_and_refused_fills_make_the_stop_exact(rest: str) -> None:
    b = Stoppable()
    b.put(CODE, OUT_80 + rest)
    b["rdi"] = DATA
    b.run(CODE)  # OUT without a hook: nothing stops it, and the page of the store is in the TLB
    b.ram[DATA], b["rcx"] = 0, 0
    b.on_instruction("out", b.on_out)
    b.run()
    assert b.stopped_at is not None
    b.uc.context_restore(b.stopped_at)
    assert (b.pc, b["rcx"], b["rflags"], b.ram[DATA]) == (AT_OUT, 0, 0x896, 0)


@pytest.mark.parametrize("name", ["in", "out", "cpuid", "syscall", "sysenter"])
def test_q33_rip_and_flags_are_exact_in_an_instruction_hook(name: str) -> None:
    b = Bare()
    text = {"in": "in al, 0x80", "out": "out 0x80, al"}.get(name, name)
    b.put(CODE, OUT_80.replace("out 0x80, al", text) + "inc ecx; hlt")
    seen: list[tuple[int, int]] = []

    def hook(_uc: Uc, *_rest: object) -> int:
        seen.append((b.pc, b["rflags"]))
        return 0

    b.on_instruction(name, hook)
    assert b.run() == OK
    assert seen == [(AT_OUT, 0x896)]


def test_q33_ins_and_outs_call_once_an_element_and_fault_before_the_device_is_touched() -> None:
    b = Bare()
    b.put(CODE, b"\xf3\x6c\xf4")  # rep insb; hlt
    calls: list[int] = []

    def hook(_uc: Uc, _port: int, _size: int, _data: object) -> int:
        calls.append(b["rdi"])
        return 0x41

    b.on_instruction("in", hook)
    b.refuse(DATA + PAGE)
    b["rdi"], b["rcx"] = DATA + PAGE - 2, 5
    assert b.run() == REFUSED
    assert calls == [DATA + PAGE - 2, DATA + PAGE - 1]
    assert (b.pc, b["rcx"]) == (CODE, 3)


def stop_until(b: Bare, over: threading.Event) -> None:
    """Ask the engine to stop until it has: a request before it starts is lost."""
    while not over.wait(0.002):
        b.uc.emu_stop()


def test_q34_a_stop_from_another_thread_replays_read_modify_writes() -> None:
    """Statistical: each stop has a large chance; that none of 40 shows it is out of the question."""
    replayed = 0
    for _ in range(40):
        b = Bare()
        b.put(CODE, "l: inc qword ptr [rdi]; inc rcx; cmp rcx, rdx; jb l; hlt")
        b["rdi"], b["rdx"] = DATA, 1 << 40
        over = threading.Event()
        stopper = threading.Thread(target=stop_until, args=(b, over))
        stopper.start()
        b.run()
        over.set()
        stopper.join()
        at_loop = b.pc == CODE
        memory = int.from_bytes(b.ram[DATA : DATA + 8], "little")
        replayed += at_loop and memory == b["rcx"] + 1  # stored, but RIP is still at the INC
        if replayed:
            break
    assert replayed


NO_EXIT_REQUEST = 2034


def without_exit_requests() -> Bare:
    """An engine whose translations do not ask behind each memory access whether to stop."""
    b = Bare()
    place = ctypes.c_uint8.from_address(b.uc._uch.value + NO_EXIT_REQUEST)
    assert place.value == 0
    place.value = 1
    return b


@pytest.mark.parametrize(("make", "done"), [(Bare, 0), (without_exit_requests, 1)], ids=["asking", "not asking"])
def test_q38_a_stop_in_a_block_is_at_its_end_if_nothing_asks_before(make, done: int) -> None:
    b = make()
    b.put(CODE, "mov [rdi], rax; inc rcx; jmp next; next: inc rdx; hlt")
    b["rdi"] = DATA
    b.uc.hook_add(UC_HOOK_MEM_WRITE, lambda uc, *_: uc.emu_stop())
    b.run()
    assert (b["rcx"], b["rdx"]) == (done, 0)


def test_q38_refused_fills_are_exact_all_the_same() -> None:
    b = without_exit_requests()
    b.pages[DATA] = (DATA, R)
    b.put(CODE, "inc rcx; mov rax, [rdi]; inc rcx; mov [rdi], rax; inc rcx; hlt")
    b["rdi"] = DATA
    assert b.run() == REFUSED
    assert (b.pc, b["rcx"]) == (CODE + 9, 2)


def test_q38_a_stop_from_another_thread_is_at_a_boundary() -> None:
    for _ in range(20):
        b = without_exit_requests()
        b.put(CODE, "l: inc qword ptr [rdi]; inc rcx; cmp rcx, rdx; jb l; hlt")
        b["rdi"], b["rdx"] = DATA, 1 << 40
        over = threading.Event()
        stopper = threading.Thread(target=stop_until, args=(b, over))
        stopper.start()
        b.run()
        over.set()
        stopper.join()
        assert b.pc == CODE
        assert int.from_bytes(b.ram[DATA : DATA + 8], "little") == b["rcx"]


def write_protected(code: bytes, *, head: int = 0) -> tuple[Uc, int, int]:
    """Run a store to a read-only region: (engine, RIP after it, INCs executed after the store)."""
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.mem_map(0, DATA)
    uc.mem_map(DATA, PAGE)
    uc.mem_map(DATA + PAGE, PAGE, R)
    uc.mem_write(CODE, code + asm("inc edx; inc edx; hlt"))
    for register, value in ((UC_X86_REG_RDI, DATA + PAGE - head), (UC_X86_REG_RCX, 0x11111111)):
        uc.reg_write(register, value)
    with contextlib.suppress(UcError):
        uc.emu_start(CODE, 0x2000)
    return uc, uc.reg_read(UC_X86_REG_RIP), uc.reg_read(UC_X86_REG_RDX)


def test_q35_a_region_permission_stops_a_plain_store_in_time() -> None:
    assert write_protected(b"\x88\x0f")[1:] == (CODE, 0)


@pytest.mark.parametrize(
    "code", [b"\x0f\xae\x07", b"\xdb\x3f", b"\xdf\x37"], ids=["fxsave", "fstp m80", "fbstp"]
)
def test_q35_a_region_permission_lets_the_block_run_on_behind_a_helper(code: bytes) -> None:
    _, pc, executed = write_protected(code)
    assert pc > CODE + len(code)
    assert executed == 2


def test_q35_a_region_permission_leaves_the_first_part_of_a_straddling_store() -> None:
    uc, pc, _ = write_protected(b"\x48\x89\x0f", head=4)
    assert pc == CODE
    assert uc.mem_read(DATA + PAGE - 4, 4) == b"\x11" * 4


def test_q35_a_write_prot_hook_that_agrees_drops_the_store() -> None:
    b = Uc(UC_ARCH_X86, UC_MODE_64)
    b.mem_map(0, DATA)
    b.mem_map(DATA, PAGE, R)
    b.mem_write(CODE, asm("mov [rdi], cl; inc edx; hlt"))
    b.reg_write(UC_X86_REG_RDI, DATA)
    b.reg_write(UC_X86_REG_RCX, 7)
    b.hook_add(UC_HOOK_MEM_WRITE_PROT, lambda *_arguments: True)
    b.emu_start(CODE, 0x2000)
    assert (b.reg_read(UC_X86_REG_RDX), bytes(b.mem_read(DATA, 1))) == (1, b"\0")
