"""The ACPI tables of a PC, read as an operating system reads them."""

from __future__ import annotations

import struct

import pytest
from pc_guests import build

from vmm.devices import acpi_pm, io_apic, local_apic
from vmm.guest.acpi import PLACE, tables

IMAGE = tables()


def at(address: int, size: int) -> bytes:
    return IMAGE[address - PLACE : address - PLACE + size]


def table(address: int) -> tuple[bytes, bytes]:
    """Signature and body, with the checksum checked."""
    signature, length = struct.unpack_from("<4sI", at(address, 8))
    data = at(address, length)
    assert len(data) == length
    assert sum(data) & 0xFF == 0
    return signature, data[36:]


@pytest.fixture
def found() -> dict[bytes, bytes]:
    """The tables that the RSDT names."""
    (place,) = [a for a in range(PLACE, PLACE + len(IMAGE), 16) if at(a, 8) == b"RSD PTR "]
    pointer = at(place, 20)
    assert sum(pointer) & 0xFF == 0
    signature, body = table(struct.unpack_from("<I", pointer, 16)[0])
    assert signature == b"RSDT"
    return dict(table(address) for (address,) in struct.iter_unpack("<I", body))


def test_the_root_pointer_leads_to_fadt_and_madt(found):
    assert set(found) == {b"FACP", b"APIC"}


def test_the_madt_has_a_processor_an_io_apic_and_the_wiring(found):
    madt = found[b"APIC"]
    assert struct.unpack_from("<II", madt) == (local_apic.BASE, 1)
    entries, rest = [], madt[8:]
    while rest:
        entries.append(rest[: rest[1]])
        rest = rest[rest[1] :]
    assert entries == [
        struct.pack("<BBBBI", 0, 8, 0, local_apic.ID, 1),
        struct.pack("<BBBBII", 1, 12, 1, 0, io_apic.BASE, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 9, 9, 0xD),
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
    ]


def test_the_fadt_names_the_fixed_hardware_and_two_more_tables(found):
    fadt = bytes(36) + found[b"FACP"]
    assert len(fadt) == 116
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert at(facs, 8) == struct.pack("<4sI", b"FACS", 64)
    assert facs % 64 == 0
    assert table(dsdt)[0] == b"DSDT"
    assert struct.unpack_from("<H", fadt, 46) == (acpi_pm.IRQ,)
    events, _, control, _, _, timer = struct.unpack_from("<6I", fadt, 56)
    assert (events, control, timer) == (0x600, 0x604, 0x608)
    assert struct.unpack_from("<4B", fadt, 88) == (4, 2, 0, 4)
    assert struct.unpack_from("<I", fadt, 48) == (0,), "no SMI command: ACPI is on"


def test_a_pc_without_apic_has_no_tables(tmp_path):
    assert build(tmp_path, "hlt").machine.read(PLACE, len(IMAGE)) == IMAGE
    assert build(tmp_path, "hlt", apic=False).machine.read(PLACE, len(IMAGE)) == bytes(len(IMAGE))
