"""Debian's Xen under the trap: a Multiboot image that nobody made for this VMM says what it was given.

Run with ``pytest -m linux``; the package is fetched with apt.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import debian
import pytest
import tiny
from shadow import Shadow

from vmm.guest.linux import ADAPTIVE
from vmm.guest.multiboot import load_multiboot
from vmm.machine import Machine, RunOptions

pytestmark = pytest.mark.linux

XEN = "xen-system-amd64"
#: A console on COM1, no calls of the BIOS, which is not there, and HLT at the end.
OPTIONS = "com1=115200,8n1 console=com1 no-real-mode noreboot"
MEMORY = 256 << 20


@pytest.fixture(scope="module")
def xen(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("xen")
    debian.update(folder)
    debian.download(folder, debian.dependency(folder, XEN, r"xen-hypervisor-[\d.]+-amd64"))
    (packed,) = (folder / "root/boot").glob("xen-*.gz")
    image = folder / "xen"
    image.write_bytes(gzip.decompress(packed.read_bytes()))
    return image


def test_without_a_first_domain_it_gives_up(xen):
    run = tiny.watch(Machine(load_multiboot(xen, command_line=OPTIONS, memory=MEMORY), RunOptions(check=True)))
    shadow = Shadow(run.machine)
    assert run.run().reason == "halt"
    console = run.machine.console.output.decode()
    assert "(XEN) Bootloader: vmm" in console
    assert f"(XEN) Command line: {OPTIONS}" in console
    assert "dom0 kernel not specified" in console
    assert shadow.surprises == shadow.differences() == []


def test_it_reads_the_memory_map_and_moves_to_the_end_of_memory(xen, tmp_path):
    (tmp_path / "module").write_bytes(bytes(0x1000))
    modules = [tmp_path / "module"]
    guest = load_multiboot(xen, modules=modules, command_line=OPTIONS, memory=MEMORY, policy=ADAPTIVE)
    run = tiny.watch(Machine(guest))
    shadow = Shadow(run.machine)
    run.run()
    text = run.machine.console.output.decode().splitlines()
    start = text.index("(XEN) Multiboot-e820 RAM map:")
    assert text[start + 1 : start + 4] == [
        "(XEN)  [0000000000000000, 000000000009efff] (usable)",
        "(XEN)  [000000000009f000, 00000000000fffff] (reserved)",
        "(XEN)  [0000000000100000, 000000000fffffff] (usable)",
    ]
    assert any(line.startswith("(XEN) New Xen image base address: 0xf") for line in text)
    assert shadow.surprises == shadow.differences() == []
