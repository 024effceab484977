"""Pages that are devices: what arrives at the callbacks of ``mmio_map`` when a fill leads there."""

from __future__ import annotations

from typing import Any

import pytest
from unicorn.unicorn_const import UC_HOOK_MEM_WRITE, UC_MEM_FETCH
from unicorn.unicorn_py3.unicorn import Uc

from .bare_unicorn import CODE, DATA, PAGE, Bare, R, W

#: Where the device is mapped in the engine, and the linear page that leads there.
PLACE, DEVICE = 1 << 41, 0x50000


class WithDevice(Bare):
    """An engine with a device that reads as its offset, from a linear page whose successor is RAM."""

    def __init__(self) -> None:
        super().__init__()
        self.accesses: list[tuple[Any, ...]] = []
        self.uc.mmio_map(PLACE, PAGE, self._read, None, self._write, None)

    def _read(self, _uc: Uc, offset: int, size: int, _data: object) -> int:
        self.accesses.append(("read", offset, size))
        return 0x100 + offset

    def _write(self, _uc: Uc, offset: int, size: int, value: int, _data: object) -> None:
        self.accesses.append(("write", offset, size, value))

    def fill(self, uc: Uc, page: int, access: int, entry: Any, data: object) -> bool:
        if page == DEVICE and access != UC_MEM_FETCH:
            entry.paddr, entry.perms = PLACE, R | W
            return True
        return super().fill(uc, page, access, entry, data)

    def execute(self, code: str) -> list[tuple[Any, ...]]:
        """What arrives at the device, with RDI at it."""
        self["rdi"] = DEVICE
        self.put(CODE, f"{code}; hlt")
        self.run()
        return self.accesses


@pytest.mark.parametrize(
    ("code", "accesses"),
    [
        ("mov eax, [rdi + 8]", [("read", 8, 4)]),
        ("mov al, [rdi + 9]", [("read", 9, 1)]),
        ("mov word ptr [rdi + 2], 0x1234", [("write", 2, 2, 0x1234)]),
        ("or dword ptr [rdi + 16], 1", [("read", 16, 4), ("write", 16, 4, 0x111)]),
        ("mov eax, 5; xchg [rdi], eax", [("read", 0, 4), ("write", 0, 4, 5)]),
    ],
)
def test_q73_an_access_of_up_to_4_bytes_arrives_once(code: str, accesses: list[tuple[Any, ...]]) -> None:
    assert WithDevice().execute(code) == accesses


def test_q73_one_of_8_bytes_arrives_in_two_pieces() -> None:
    b = WithDevice()
    assert b.execute("mov rax, [rdi]; mov [rdi], rax") == [
        ("read", 0, 4), ("read", 4, 4), ("write", 0, 4, 0x100), ("write", 4, 4, 0x104),
    ]  # fmt: skip
    assert b["rax"] == 0x104_0000_0100


def test_q73_a_store_over_the_end_arrives_byte_by_byte() -> None:
    b = WithDevice()
    accesses = b.execute("mov dword ptr [rdi + 0xffe], 0x44332211")
    assert accesses == [("write", 0xFFE, 1, 0x11), ("write", 0xFFF, 1, 0x22)]
    assert b.ram[DEVICE + PAGE : DEVICE + PAGE + 2] == b"\x33\x44"


def test_q73_write_hooks_hear_of_stores_to_a_device_by_its_place() -> None:
    b = WithDevice()
    heard: list[tuple[int, int]] = []
    b.uc.hook_add(UC_HOOK_MEM_WRITE, lambda _uc, _access, address, size, _value, _data: heard.append((address, size)))
    b.execute(f"mov dword ptr [rdi + 4], 1; mov edi, {DATA}; mov [rdi], eax")
    assert heard == [(PLACE + 4, 4), (DATA, 4)]
