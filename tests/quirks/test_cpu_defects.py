"""What Unicorn's processor does differently from a real one, as far as a guest can meet it."""

from __future__ import annotations

import ctypes

import pytest
from unicorn.unicorn_const import UC_HOOK_INSN, UC_HOOK_MEM_READ, UC_HOOK_MEM_WRITE
from unicorn.unicorn_py3.unicorn import UcError
from unicorn.x86_const import UC_X86_INS_CPUID, UC_X86_INS_RDTSC, UC_X86_REG_RBX

from .bare_unicorn import CODE, DATA, HLT, OK, Bare

PREFIXES = {16: b"\x66", 32: b"", 64: b"\x48"}


def immediate(size: int) -> int:
    """Bytes of a full immediate at an operand size."""
    return min(size // 8, 4)


def accessed(prefix: bytes, opcode: bytes, reg: int, immediate_size: int) -> int:
    """How far from its right place a RIP-relative instruction accesses memory, in bytes."""
    length = len(prefix) + len(opcode) + 5 + immediate_size
    displacement = (DATA - CODE - length).to_bytes(4, "little", signed=True)
    b = Bare()
    one = (1).to_bytes(immediate_size, "little")
    b.put(CODE, prefix + opcode + bytes([5 | reg << 3]) + displacement + one + HLT)
    b.ram[DATA - 16 : DATA + 16] = b"\1" * 32
    b["rax"] = 1
    seen: list[int] = []
    kinds = UC_HOOK_MEM_READ | UC_HOOK_MEM_WRITE
    b.uc.hook_add(kinds, lambda _uc, _access, address, *_rest: seen.append(address))
    assert b.run() == OK
    assert b.pc == CODE + length + 1
    return seen[0] - DATA


@pytest.mark.parametrize("size", PREFIXES)
@pytest.mark.parametrize("opcode", [b"\x0f\xa4", b"\x0f\xac"], ids=["shld", "shrd"])
def test_q60_shld_and_shrd_by_imm8_miss_a_rip_relative_operand_by_one(opcode: bytes, size: int) -> None:
    assert accessed(PREFIXES[size], opcode, 1, 1) == -1


@pytest.mark.parametrize("code", [b"\xf6\x0f\x01", b"\xf7\x0f\x01\0\0\0"], ids=["F6 /1", "F7 /1"])
def test_q61_the_undocumented_form_of_test_is_invalid(code: bytes) -> None:
    b = Bare()
    b.put(CODE, code + HLT)
    b["rdi"] = DATA
    invalids = b.invalids()
    assert b.run() == OK
    assert invalids == [CODE]  # a processor executes TEST


def rip_relative_forms() -> list[tuple[bytes, bytes, int, int]]:
    """(prefix, opcode, reg, size of the immediate) of every instruction with ModRM and an immediate."""
    forms = []
    for size, prefix in PREFIXES.items():
        full = immediate(size)
        forms += [(prefix, op, reg, 1) for reg in range(8) for op in (b"\x80", b"\x83", b"\xc0", b"\xc1")]
        forms += [(prefix, b"\x81", reg, full) for reg in range(8)]
        forms += [
            (prefix, op, 0, n) for op, n in ((b"\xc6", 1), (b"\xc7", full), (b"\xf6", 1), (b"\xf7", full))
        ]
        forms += [(prefix, b"\x69", 1, full), (prefix, b"\x6b", 1, 1)]
        forms += [(prefix, b"\x0f\xba", reg, 1) for reg in (4, 5, 6, 7)]
    forms += [(prefix, b"\x0f\x70", 1, 1) for prefix in (b"", b"\x66", b"\xf2", b"\xf3")]
    forms += [(prefix, b"\x0f\xc2", 1, 1) for prefix in (b"", b"\x66", b"\xf2", b"\xf3")]
    forms += [(prefix, op, 1, 1) for prefix in (b"", b"\x66") for op in (b"\x0f\xc4", b"\x0f\xc6")]
    three_byte = [*range(0x08, 0x10), *range(0x14, 0x18), 0x20, 0x21, 0x22, 0x40, 0x41, 0x42, 0x44]
    three_byte += [*range(0x60, 0x64), 0xDF]
    forms += [(b"\x66", bytes([0x0F, 0x3A, op]), 1, 1) for op in three_byte]
    return forms


def test_q60_all_other_instructions_with_an_immediate_are_right() -> None:
    assert [form for form in rip_relative_forms() if accessed(*form) != 0] == []


def test_q62_mxcsr_and_the_x87_control_word_start_at_zero() -> None:
    b = Bare()
    assert (b["mxcsr"], b["fpcw"]) == (0, 0)  # a processor: 0x1f80 and 0x37f (0x40 after RESET)


def test_q63_unknown_msrs_read_zero_and_nothing_traps() -> None:
    b = Bare()
    b.put(CODE, "mov ecx, 0x12345678; mov eax, 5; mov edx, 5; wrmsr; rdmsr; hlt")
    exceptions = b.interrupts()
    assert b.run() == OK
    assert (b["rax"], b["rdx"], exceptions) == (0, 0, [])  # a processor: #GP


def test_q64_the_binding_rejects_the_rdtsc_hook_that_the_library_knows() -> None:
    b = Bare()
    b.put(CODE, "rdtsc; hlt")
    with pytest.raises(UcError):
        b.uc.hook_add(UC_HOOK_INSN, lambda *_arguments: 1, aux1=UC_X86_INS_RDTSC)

    def answer(_uc: int, _data: int) -> int:
        b["rax"], b["rdx"] = 0x1111, 0x2222
        return 1

    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    hook = ctypes.cast(prototype(answer), prototype)
    add_hook = getattr(b.uc, "_Uc__do_hook_add")  # noqa: B009 - the name is mangled
    add_hook(UC_HOOK_INSN, hook, 1, 0, ctypes.c_int(UC_X86_INS_RDTSC))
    assert b.run() == OK
    assert (b["rax"], b["rdx"]) == (0x1111, 0x2222)


ONES, TWOS, THREES = (int(word * 4, 16) for word in ("3f800000", "40000000", "40400000"))


def test_q65_vex_encoded_sse_runs_as_its_legacy_form_instead_of_raising_ud() -> None:
    b = Bare()
    b.put(CODE, b"\xc5\xf0\x58\xc2" + HLT)  # vaddps xmm0, xmm1, xmm2
    b["xmm0"], b["xmm1"], b["xmm2"] = ONES, TWOS, THREES
    invalids = b.invalids()
    assert b.run() == OK
    assert (invalids, b["xmm0"]) == ([], int("40800000" * 4, 16))  # xmm0 + xmm2: the third operand is ignored


@pytest.mark.parametrize("code", [b"\xc5\xfc\x58\xc1", b"\x62\xf1\x7c\x48\x58\xc1"], ids=["256 bits", "EVEX"])
def test_q65_wider_vectors_are_invalid(code: bytes) -> None:
    b = Bare()
    b.put(CODE, code)
    invalids = b.invalids()
    assert b.run() == OK
    assert invalids == [CODE]


def test_q66_aligned_sse_accesses_are_not_checked() -> None:
    b = Bare()
    b.put(CODE, b"\x0f\x29\x07" + HLT)  # movaps [rdi], xmm0
    b["rdi"], b["xmm0"] = DATA + 4, ONES
    exceptions = b.interrupts()
    assert b.run() == OK
    assert (exceptions, b.ram[DATA + 4 : DATA + 8]) == ([], b"\0\0\x80\x3f")  # a processor: #GP


def test_q71_rdrand_gives_other_numbers_each_time() -> None:
    seen = set()
    for _ in range(2):
        b = Bare()
        b.put(CODE, b"\x48\x0f\xc7\xf0" + HLT)  # rdrand rax
        b.run()
        seen.add(b["rax"])
    assert len(seen) == 2


def test_q72_a_cpuid_hook_that_returns_1_replaces_the_instruction() -> None:
    b = Bare()
    b.put(CODE, "cpuid; hlt")

    def hook(uc, _data) -> int:
        uc.reg_write(UC_X86_REG_RBX, 0x1234)
        return 1

    b["rax"] = 0x77
    b.uc.hook_add(UC_HOOK_INSN, hook, None, 1, 0, UC_X86_INS_CPUID)
    b.run()
    assert (b["rax"], b["rbx"]) == (0x77, 0x1234)


def test_q74_cr8_keeps_nothing() -> None:
    b = Bare()
    b.put(CODE, "mov eax, 5; mov cr8, rax; mov rcx, cr8; hlt")
    b["rcx"] = 7
    b.run()
    assert b["rcx"] == 0
