"""A raw program: what a manifest says about it, and nothing that only one of the two processors would know."""

from __future__ import annotations

from collections.abc import Mapping as Dictionary
from pathlib import Path
from typing import Final

from attrs import field, frozen

from vmm.guest.manifest import GPRS

PAGE: Final = 0x1000
BASE: Final = 0x10000
MEMORY: Final = 0x80000
END_PORT: Final = 0xF4


@frozen(slots=True)
class Alias:
    """``length`` bytes at ``gva`` reach ``gpa``."""

    gva: int
    gpa: int
    length: int = PAGE
    access: str = "rwx"


@frozen(slots=True)
class Program:
    """A program at CPL 3. ``code`` are bytes at guest-physical addresses, 0x10000 or higher.

    ``ignore`` are (GPA, bytes) where processors may differ (what FXSAVE writes of the last x87 instruction, say);
    the masks say which bits of RFLAGS, MXCSR and the x87 status word to compare at the end.
    """

    name: str
    code: dict[int, bytes]
    maps: tuple[Alias, ...] = ()
    identity: str | None = "rwx"
    registers: dict[str, int] = field(factory=dict)
    entry: int = BASE
    idt: int | None = None
    rsp0: int = 0
    ignore: tuple[tuple[int, int], ...] = ()
    flags: int = 0x0CD5
    mxcsr_mask: int = 0xFFFF
    fsw_mask: int = 0xFFFF
    memory: int = MEMORY

    @property
    def initial(self) -> Dictionary[str, int]:
        """The registers that the manifest gives."""
        return {"rsp": 0x3F000, "rflags": 2, "mxcsr": 0x1F80, "fcw": 0x37F, **self.registers}

    def image(self) -> bytes:
        """The flat image from ``BASE`` on."""
        end = max(gpa + len(data) for gpa, data in self.code.items())
        image = bytearray(end - BASE)
        for gpa, data in self.code.items():
            image[gpa - BASE : gpa - BASE + len(data)] = data
        return bytes(image)

    def mappings(self) -> list[Alias]:
        """The address space from ``BASE`` on; later ones win."""
        first = [Alias(BASE, BASE, self.memory - BASE, self.identity)] if self.identity else []
        return first + list(self.maps)

    def masked(self, ram: bytes) -> bytes:
        """RAM from ``BASE`` on without what is to be ignored."""
        out = bytearray(ram)
        for gpa, length in self.ignore:
            out[gpa - BASE : gpa - BASE + length] = bytes(length)
        return bytes(out)

    def write_manifest(self, folder: Path, policy: Dictionary[str, str]) -> Path:
        """The program as image.bin and guest.toml."""
        (folder / "image.bin").write_bytes(self.image())
        path = folder / "guest.toml"
        path.write_text(self._manifest(policy), encoding="utf-8")
        return path

    def _manifest(self, policy: Dictionary[str, str]) -> str:
        registers = ", ".join(f"{name} = {value:#x}" for name, value in self.initial.items())
        lines = [
            'schema = "vmm-guest/1"',
            f'name = "{self.name}"',
            "[image]",
            'format = "flat"',
            'file = "image.bin"',
            f"load = {BASE:#x}",
            "[machine]",
            f"memory = {self.memory:#x}",
            'mode = "long"',
            "[cpu]",
            f"entry = {self.entry:#x}",
            "cpl = 3",
            "iopl = 3",
            f"registers = {{ {registers} }}",
        ]
        if self.idt is not None:
            lines += [f"idt = {self.idt:#x}", f"rsp0 = {self.rsp0:#x}"]
        lines += ["[paging]"] + ([f'identity = "{self.identity}"'] if self.identity else [])
        for alias in self.maps:
            lines += ["[[paging.map]]", f"gva = {alias.gva:#x}", f"gpa = {alias.gpa:#x}"]
            lines += [f"length = {alias.length:#x}", f'access = "{alias.access}"']
        lines += ["[policy]", *(f'{name} = "{value}"' for name, value in policy.items())]
        lines += ["[end]", f"port = {END_PORT:#x}", "[limits]", "exits = 2000000", "seconds = 60"]
        return "\n".join(lines) + "\n"


@frozen(slots=True)
class Fault:
    """An exception as the guest meets it."""

    vector: int
    error_code: int | None
    address: int | None
    rip: int


@frozen(slots=True)
class Outcome:
    """How a program ended. ``end`` is the byte that it gave, or None if an exception could not be delivered."""

    end: int | None
    registers: dict[str, int]
    ram: bytes
    faults: tuple[Fault, ...]


#: What is compared of the registers.
COMPARED: Final = (*GPRS, "rip", "rflags", "mxcsr", "fcw", "fsw", *(f"xmm{i}" for i in range(16)))


def differences(program: Program, real: Outcome, seen: Outcome) -> list[str]:
    """What the VMM has otherwise than the processor, in words; nothing if all is right."""
    found = []
    if real.end != seen.end:
        found.append(f"end: processor {real.end}, here {seen.end}")
    masks = {"rflags": program.flags, "mxcsr": program.mxcsr_mask, "fsw": program.fsw_mask}
    for name in COMPARED:
        mask = masks.get(name, (1 << 128) - 1)
        want, got = real.registers[name] & mask, seen.registers[name] & mask
        if want != got:
            found.append(f"{name}: processor {want:#x}, here {got:#x}")
    for number, (want, got) in enumerate(zip(real.faults, seen.faults, strict=False)):
        if want != got:
            found.append(f"exception {number}: processor {want}, here {got}")
    if len(real.faults) != len(seen.faults):
        found.append(f"exceptions: processor {len(real.faults)}, here {len(seen.faults)}")
    want_ram, got_ram = program.masked(real.ram), program.masked(seen.ram)
    if want_ram != got_ram:
        places = [i for i in range(len(want_ram)) if want_ram[i] != got_ram[i]]
        first = places[0] & -8
        found.append(
            f"memory: {len(places)} bytes, first at {places[0] + BASE:#x}: processor "
            f"{want_ram[first : first + 32].hex(' ')}, here {got_ram[first : first + 32].hex(' ')}"
        )
    return found
