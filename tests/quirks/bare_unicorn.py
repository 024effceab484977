"""Bare Unicorn engines for the quirk tests: nothing of the VMM in between.

``Bare`` is an engine in virtual-TLB mode over one anonymous mapping. A dictionary says what each linear page
translates to; what is not in it is mapped to itself.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from typing import Any, Final

from keystone import KS_ARCH_X86, KS_MODE_32, KS_MODE_64, Ks  # type: ignore[import-untyped]
from unicorn import x86_const
from unicorn.unicorn_const import (
    UC_ARCH_X86,
    UC_CTL_IO_WRITE,
    UC_CTL_TLB_FLUSH,
    UC_ERR_EXCEPTION,
    UC_HOOK_EDGE_GENERATED,
    UC_HOOK_INSN,
    UC_HOOK_INSN_INVALID,
    UC_HOOK_INTR,
    UC_HOOK_TLB_FILL,
    UC_MEM_FETCH,
    UC_MEM_READ,
    UC_MEM_WRITE,
    UC_MODE_32,
    UC_MODE_64,
    UC_TLB_VIRTUAL,
)
from unicorn.unicorn_py3.unicorn import Uc, uclib

PAGE: Final = 0x1000
R, W, X = 1, 2, 4
CODE: Final = 0x1000
DATA: Final = 0x40000
STACK: Final = 0x80000
SIZE: Final = 0x100000
REFUSED: Final = UC_ERR_EXCEPTION
OK: Final = 0
HLT: Final = b"\xf4"
NEED: Final = {UC_MEM_READ: R, UC_MEM_WRITE: W, UC_MEM_FETCH: X}

_ASSEMBLERS: Final = {UC_MODE_64: Ks(KS_ARCH_X86, KS_MODE_64), UC_MODE_32: Ks(KS_ARCH_X86, KS_MODE_32)}


def asm(text: str, at: int = CODE, mode: int = UC_MODE_64) -> bytes:
    """Assemble Intel syntax for an address."""
    return bytes(_ASSEMBLERS[mode].asm(text, at)[0])


def address_of(area: mmap.mmap) -> int:
    """The host address of a mapping, which must outlive its use."""
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


def register_id(name: str) -> int:
    """Unicorn's number of a register."""
    return int(getattr(x86_const, f"UC_X86_REG_{name.upper()}"))


class Bare:
    """One engine, its RAM, its page dictionary, and what it was asked to fill."""

    def __init__(self, ram: mmap.mmap | None = None, mode: int = UC_MODE_64) -> None:
        self.ram = ram or mmap.mmap(-1, SIZE)
        self.mode = mode
        #: linear page -> (RAM page, permissions)
        self.pages: dict[int, tuple[int, int]] = {}
        self.fills: list[tuple[int, int]] = []
        self.uc = Uc(UC_ARCH_X86, mode)
        self.uc.ctl_set_tlb_mode(UC_TLB_VIRTUAL)
        self.uc.mem_map_ptr(0, len(self.ram), R | W | X, address_of(self.ram))
        self.uc.ctl_exits_enabled(True)
        self.uc.hook_add(UC_HOOK_TLB_FILL, self.fill)
        self["rsp" if mode == UC_MODE_64 else "esp"] = STACK

    def fill(self, _uc: Uc, page: int, access: int, entry: Any, _data: object) -> bool:
        """Answer a fill from the dictionary; refuse what it does not allow."""
        self.fills.append((page, access))
        target, permissions = self.pages.get(page, (page, R | W | X))
        if not permissions & NEED[access] or target >= len(self.ram):
            return False
        entry.paddr, entry.perms = target, permissions
        return True

    def __getitem__(self, register: str) -> int:
        return int(self.uc.reg_read(register_id(register)))

    def __setitem__(self, register: str, value: int) -> None:
        self.uc.reg_write(register_id(register), value)

    @property
    def pc(self) -> int:
        """RIP or EIP."""
        return self["rip" if self.mode == UC_MODE_64 else "eip"]

    def put(self, address: int, code: str | bytes) -> int:
        """Write code to RAM behind Unicorn's back; its length."""
        data = asm(code, address, self.mode) if isinstance(code, str) else code
        self.ram[address : address + len(data)] = data
        return len(data)

    def run(self, start: int = CODE, *, count: int = 0) -> int:
        """``emu_start``; its status as a number."""
        arguments = (ctypes.c_uint64(start), ctypes.c_uint64(0), ctypes.c_uint64(0), ctypes.c_size_t(count))
        return int(uclib.uc_emu_start(self.uc._uch, *arguments))

    def flush_tlb(self) -> None:
        """Forget all fills."""
        self.uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE)

    def refuse(self, page: int, permissions: int = R) -> None:
        """Map a page to itself with too few permissions."""
        self.pages[page] = (page, permissions)

    def translations(self) -> list[tuple[int, int]]:
        """A list that grows by (pc, size) with each translation that Unicorn reports."""
        seen: list[tuple[int, int]] = []
        self.uc.hook_add(
            UC_HOOK_EDGE_GENERATED, lambda _uc, block, _prev, _data: seen.append((block.pc, block.size))
        )
        return seen

    def interrupts(self, *, limit: int = 1) -> list[tuple[int, int]]:
        """A list that grows by (vector, pc) with each exception; stops at the given number of them."""
        seen: list[tuple[int, int]] = []

        def hook(uc: Uc, vector: int, _data: object) -> None:
            seen.append((vector, self.pc))
            if len(seen) >= limit:
                uc.emu_stop()

        self.uc.hook_add(UC_HOOK_INTR, hook)
        return seen

    def invalids(self) -> list[int]:
        """A list that grows by the pc of each instruction that Unicorn calls invalid; stops at the first."""
        seen: list[int] = []

        def hook(uc: Uc, _data: object) -> bool:
            seen.append(self.pc)
            uc.emu_stop()
            return True

        self.uc.hook_add(UC_HOOK_INSN_INVALID, hook)
        return seen

    def on_instruction(self, name: str, hook: Any) -> None:
        """Call ``hook(uc, ...)`` at each IN, OUT, CPUID, SYSCALL or SYSENTER."""
        self.uc.hook_add(UC_HOOK_INSN, hook, aux1=int(getattr(x86_const, f"UC_X86_INS_{name.upper()}")))

    def prime(self) -> None:
        """Let the engine return from one block, so that it reports translations from then on."""
        self.put(0xF0000, b"\xeb\x00\xf4")
        self.run(0xF0000)
        self.uc.ctl_remove_cache(0xF0000, 0xF0003)


def dies(script: str) -> bool:
    """Whether a Python script that uses this module is killed by a signal."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import *\n{script}"],
        check=False, capture_output=True, timeout=20,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    )  # fmt: skip
    assert done.returncode <= 0, done.stderr.decode()
    return done.returncode < 0
