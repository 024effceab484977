"""From what the user typed to a guest: a bundled guest's name, a guest.toml, a folder, an image without a manifest."""

from __future__ import annotations

import difflib
from itertools import islice
from pathlib import Path
from typing import Final

from attrs import frozen

import vmm
from vmm.errors import ImageError, InputError, ManifestError, OptionError
from vmm.guest.boot import BootState
from vmm.guest.fields import PAGE, U64_MAX, is_canonical
from vmm.guest.files import one_line, read_head, shown
from vmm.guest.image import ELF_MAGIC, LoadedImage, Segment, load_elf, load_image
from vmm.guest.manifest import (
    MANIFEST_NAME,
    MEMORY_LIMIT,
    RESERVED_LONG,
    CpuSpec,
    Image,
    MachineSpec,
    Manifest,
    Mapping,
    Paging,
    Policy,
)
from vmm.guest.manifest_reader import read_manifest
from vmm.guest.multiboot_image import SEARCHED, find_header, near_miss

_ACCEPTED: Final = f"give a {MANIFEST_NAME}, a Multiboot image or an ELF64 image"
_ELF64: Final = ELF_MAGIC + b"\x02"
_NAMES_COMPARED: Final = 5000
#: What a bare image gets in RAM: at least the first, and after its end at least the second.
_BARE_MEMORY: Final = 4 << 20
_BARE_ROOM: Final = 1 << 20


@frozen(slots=True)
class BootProtocol:
    """How a guest that has no manifest was loaded: what it finds follows from this, the image and the size of RAM.

    ``name`` is that of the protocol, ``modules`` are the files that were loaded besides the image, in order. ``names``
    are those that the guest is told, the image's first, of a protocol that tells them. ``apic`` is whether the PC has a
    local APIC, an I/O APIC and ACPI.
    """

    name: str
    command_line: str
    modules: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    apic: bool = False


@frozen(slots=True)
class Guest:
    """A guest, checked and ready to build.

    ``entry`` is the linear address where the first vCPU starts, ``other_entries`` where the others do. ``hidden`` is
    what is executed in place of what the image has, as (linear address, bytes).
    """

    manifest: Manifest
    image: LoadedImage
    entry: int
    other_entries: tuple[int, ...] = ()
    #: The initial machine of a guest that says itself what it is to be; None: what follows from the manifest.
    boot: BootState | None = None
    #: Whether the devices of a PC are around it.
    is_pc: bool = False
    hidden: tuple[tuple[int, bytes], ...] = ()
    #: None for a guest with a manifest, and for a bare image.
    protocol: BootProtocol | None = None

    @property
    def name(self) -> str:
        """The guest's name."""
        return self.manifest.name

    @property
    def has_apic(self) -> bool:
        """Whether it is on a PC with APICs."""
        return self.protocol is not None and self.protocol.apic

    @property
    def entries(self) -> tuple[int, ...]:
        """Where each vCPU starts, by number."""
        return (self.entry, *self.other_entries)


@frozen(slots=True)
class BootOptions:
    """What who boots a kernel gives it; None and no modules: as by default.

    ``append`` is what the command line has besides the kernel's name, ``memory`` the size of RAM in bytes.
    """

    append: str | None = None
    memory: int | None = None
    modules: tuple[Path, ...] = ()

    @property
    def given(self) -> list[str]:
        """The command line's options that these come from."""
        options = {"--append": self.append, "--memory": self.memory, "--module": self.modules or None}
        return [option for option, value in options.items() if value is not None]


@frozen(slots=True)
class BundledGuest:
    """A guest that comes with the VMM.

    ``path`` is that of its guest.toml, ``script`` that of the script that it is held against; ``wrong_of`` names
    the guest that it is the wrong version of.
    """

    name: str
    summary: str
    path: Path
    script: Path
    wrong_of: str


def load_guest(path: str | Path, boot: BootOptions | None = None) -> Guest:
    """The guest that ``path`` means; raises ManifestError or ImageError, and OptionError for ``boot``.

    A string without a path separator is the name of a bundled guest if there is one of that name. Otherwise
    ``path`` is a guest.toml, a folder with one, a Multiboot image, or an ELF64 image without a manifest. A Multiboot
    image is entered as ``vmm.guest.multiboot`` says, ``boot`` is for it alone. Other ELF64 images run in
    long mode at CPL 0 with identity-mapped RAM (and their segments at p_vaddr, where that differs from
    p_paddr), RSP at the end of RAM, and end with a byte to port 0xf4.
    """
    bundled = _bundled_folders().get(str(path))
    file = bundled / MANIFEST_NAME if bundled else Path(path)
    if _is(file, "is_dir"):
        file = file / MANIFEST_NAME
    if not _is(file, "exists"):
        raise _not_found(file, str(path))
    is_manifest = file.suffix == ".toml"
    head = b"" if is_manifest else read_head(file, SEARCHED, error=ImageError, fix=_ACCEPTED)
    if find_header(head) is not None:
        return _from_multiboot(file, boot or BootOptions())
    if boot is not None and boot.given:
        fix = "leave it out: only Multiboot images are given it"
        raise OptionError(f"{one_line(path)} is no Multiboot image", where=" and ".join(boot.given), fix=fix)
    return _from_manifest(read_manifest(file)) if is_manifest else _from_bare_image(file, head)


def bundled_guests() -> list[BundledGuest]:
    """The guests that come with the VMM, by name; raises ManifestError if one of them is damaged."""
    found = []
    for name, folder in _bundled_folders().items():
        path = folder / MANIFEST_NAME
        manifest = read_manifest(path)
        found.append(BundledGuest(name, manifest.summary, path, manifest.own_script, manifest.wrong_of))
    return found


def bundled_image(name: str) -> Path | None:
    """The image file of a bundled guest, None if there is no such guest; raises ManifestError if it is damaged."""
    folder = _bundled_folders().get(name)
    return None if folder is None else read_manifest(folder / MANIFEST_NAME).image.file


def _bundled_folders() -> dict[str, Path]:
    package = Path(vmm.__file__).parent
    for home in (package / "bundled_guests", package.parent / "guests"):
        if home.is_dir():
            folders = sorted(path.parent for path in home.glob(f"*/{MANIFEST_NAME}"))
            return {folder.name: folder for folder in folders}
    return {}


def _is(path: Path, question: str) -> bool:
    try:
        return bool(getattr(path, question)())
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _not_found(file: Path, given: str) -> InputError:
    known = tuple(_bundled_folders())
    close = difflib.get_close_matches(given[:64], known, n=1)
    if close:
        fix = f"did you mean the bundled guest {close[0]}?"
    elif file.name == MANIFEST_NAME:
        fix = f"give a folder that holds a {MANIFEST_NAME}"
    else:
        fix = "give a file, or a name that `vmm guests` lists"
    return ManifestError("no such guest or file", where=one_line(file), fix=fix)


def _from_manifest(manifest: Manifest) -> Guest:
    image = load_image(manifest.image, manifest.machine.memory)
    first, *others = (_entry(manifest, image, number) for number in range(len(manifest.cpus)))
    hidden = tuple(spec.resolve(image.symbols) for spec in manifest.hidden)
    guest = Guest(manifest, image, first, tuple(others), hidden=hidden)
    for number, cpu in enumerate(manifest.cpus):
        _check_entry(guest, number)
        _check_reachable(guest, number, "idt", cpu.idt)
        _check_reachable(guest, number, "rsp0", cpu.rsp0 - 1 if cpu.rsp0 else None)
    return guest


def _entry(manifest: Manifest, image: LoadedImage, number: int) -> int:
    entry = manifest.cpus[number].entry
    if isinstance(entry, str):
        address = image.symbols.address(entry)
        if address is None:
            close = difflib.get_close_matches(entry, list(islice(image.symbols, _NAMES_COMPARED)), n=1)
            fix = f'did you mean "{close[0]}"?' if close else "name a symbol of the image, or give a number"
            raise _cpu_error(manifest, number, "entry", f"the image has no symbol {shown(entry)}", fix)
        return address
    if entry is not None:
        return entry
    if image.entry is None:
        fix = "give [cpu].entry, or link with -e"
        raise ImageError("no entry point in the ELF header", where=one_line(manifest.image.file), fix=fix)
    return image.entry


def _check_entry(guest: Guest, number: int) -> None:
    manifest, entry = guest.manifest, guest.entries[number]
    if "cr3" in manifest.cpu.registers:
        return  # through page tables of the guest's own: the processor will see
    gpa, mapping = _reach(manifest, entry)
    if gpa is None:
        fix = "map it in [[paging.map]]" if manifest.paging else "start inside of RAM"
        raise _cpu_error(manifest, number, "entry", f"{entry:#x} is not an address of RAM", fix)
    if not guest.image.holds(gpa):
        ranges = ", ".join(f"{s.gpa:#x} to {s.gpa + len(s.data):#x}" for s in guest.image.segments[:4])
        what = f"{entry:#x} (GPA {gpa:#x}) lies outside of the image"
        raise _cpu_error(manifest, number, "entry", what, f"the image occupies {ranges}")
    if mapping and "x" not in mapping.access:
        what = f'{entry:#x} is mapped "{mapping.access}"'
        raise _cpu_error(manifest, number, "entry", what, "map it with x, or start elsewhere")
    if mapping and manifest.cpus[number].cpl == 3 and not mapping.user:
        what = f"{entry:#x} is mapped for the supervisor only, and cpl is 3"
        raise _cpu_error(manifest, number, "entry", what, "map it with user = true")


def _check_reachable(guest: Guest, number: int, key: str, linear: int | None) -> None:
    manifest = guest.manifest
    if linear is None or "cr3" in manifest.cpu.registers or _reach(manifest, linear)[0] is not None:
        return
    fix = "map it in [[paging.map]]" if manifest.paging else "place it in RAM"
    raise _cpu_error(manifest, number, key, f"{linear:#x} is not an address of RAM", fix)


def _reach(manifest: Manifest, linear: int) -> tuple[int | None, Mapping | None]:
    memory = manifest.machine.memory
    if manifest.paging is None:
        return (linear if 0 <= linear < memory else None), None
    return manifest.paging.resolve(linear, memory) or (None, None)


def _cpu_error(manifest: Manifest, number: int, key: str, what: str, fix: str) -> ManifestError:
    table = f"[vcpu][{number - 1}]" if number else "[cpu]"
    return ManifestError(what, where=f"{one_line(manifest.path)}: {table}.{key}", fix=fix)


def _from_multiboot(path: Path, boot: BootOptions) -> Guest:
    from vmm.guest.multiboot import DEFAULT_MEMORY, load_multiboot  # noqa: PLC0415 - it makes a Guest, which is here

    memory = DEFAULT_MEMORY if boot.memory is None else boot.memory
    return load_multiboot(path, modules=boot.modules, command_line=boot.append or "", memory=memory)


def _from_bare_image(path: Path, head: bytes) -> Guest:
    """A guest from a file that starts with ``head`` and is no Multiboot image."""
    if head.startswith(_ELF64):
        return _from_bare_elf(path)
    what = near_miss(head)
    if what is None:
        kind = "an ELF file, but " if head.startswith(ELF_MAGIC) else ""
        what = f"{kind}neither a Multiboot image, nor an ELF64 image, nor a {MANIFEST_NAME}"
    raise ImageError(what, where=one_line(path), fix=f"{_ACCEPTED}, or describe the image in a {MANIFEST_NAME}")


def _from_bare_elf(path: Path) -> Guest:
    image = load_elf(path, MEMORY_LIMIT)
    if image.entry is None:
        raise ImageError("no entry point in the ELF header", where=one_line(path), fix="link with -e SYMBOL")
    end = max(segment.end for segment in image.segments) + _BARE_ROOM
    memory = min(max(_BARE_MEMORY, end + 0x1F_FFFF & ~0x1F_FFFF), MEMORY_LIMIT)
    manifest = Manifest(
        path=path,
        name=one_line(path.stem),
        image=Image("elf64", path),
        machine=MachineSpec(memory, "long"),
        cpu=CpuSpec(registers={"rsp": memory}),
        paging=Paging("rwx", _linked_elsewhere(image, path)),
        policy=Policy(code="load"),
    )
    guest = Guest(manifest, image, image.entry)
    _check_entry(guest, 0)
    return guest


def _linked_elsewhere(image: LoadedImage, path: Path) -> tuple[Mapping, ...]:
    return tuple(_link_mapping(s, path) for s in image.segments if s.gva != s.gpa)


def _link_mapping(segment: Segment, path: Path) -> Mapping:
    first, gpa = segment.gva & -PAGE, segment.gpa & -PAGE
    length = (segment.end + PAGE - 1 & -PAGE) - gpa
    last = first + length - 1
    start, size = RESERVED_LONG
    usable = last <= U64_MAX and is_canonical(first) and is_canonical(last)
    if (segment.gva - segment.gpa) % PAGE or not usable or (first < start + size and last >= start):
        what = f"cannot map virtual address {segment.gva:#x} to physical address {segment.gpa:#x}"
        raise ImageError(what, where=one_line(path), fix=f"describe the guest in a {MANIFEST_NAME}")
    return Mapping(first, gpa, length, "rwx")
