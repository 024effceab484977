"""Debian's kernel and a static busybox, fetched with apt, and an initrd made of it.

``python debian.py FOLDER`` leaves ``vmlinuz`` and ``initrd.cpio`` in a folder. The initrd also has the programs that
change themselves (``programs/``, built with GNU binutils), and a module of the kernel.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

KERNEL = "linux-image-cloud-amd64"
BUSYBOX = "busybox-static"
APPLETS = (
    *("sh", "mount", "uname", "cat", "md5sum", "dd", "seq", "sleep", "grep", "poweroff", "reboot"),
    *("insmod", "rmmod", "wc"),
)
PROGRAMS = Path(__file__).parent / "programs"
MODULE = "dummy.ko"
INIT = b"""#!/bin/sh
mount -t proc proc /proc
exec setsid cttyhack sh
"""
_REGULAR, _FOLDER, _LINK, _DEVICE = 0o100755, 0o40755, 0o120777, 0o20600


def fetch(folder: Path) -> tuple[Path, Path]:
    """Download and unpack both packages: (bzImage, busybox). Whatever is missing is an error, not a reason to skip."""
    update(folder)
    download(folder, dependency(folder, KERNEL, r"linux-image-\S+"), BUSYBOX)
    (kernel,) = (folder / "root/boot").glob("vmlinuz-*")
    return kernel, folder / "root/bin/busybox"


def update(folder: Path) -> None:
    """Have apt know what there is."""
    _need("apt-get", "apt-cache", "dpkg")
    with Path(tempfile.gettempdir(), "vmm-debian.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # apt allows one update at a time, and there may be several test processes
        _run(folder, "apt-get", "update", "-qq")


def dependency(folder: Path, package: str, pattern: str) -> str:
    """The package that a metapackage stands for."""
    depends = _run(folder, "apt-cache", "depends", package)
    found = re.search(rf"Depends: ({pattern})", depends)
    if found is None:
        raise RuntimeError(f"{package} depends on nothing like {pattern}:\n{depends}")
    return found[1]


def download(folder: Path, *packages: str) -> None:
    """Download packages, and unpack them into the folder ``root``."""
    _run(folder, "apt-get", "download", "-qq", *packages)
    for package in folder.glob("*.deb"):
        _run(folder, "dpkg", "-x", str(package), "root")


def extras(folder: Path) -> dict[str, bytes]:
    """What is run inside of Linux, by its path there: programs, built here, and a module of the kernel's package."""
    _need("as", "ld")
    files = {f"bin/{source.stem}": _program(source) for source in sorted(PROGRAMS.glob("*.S"))}
    (module,) = (folder / "root/lib/modules").rglob(MODULE)
    return files | {f"lib/{MODULE}": module.read_bytes()}


def _program(source: Path) -> bytes:
    with tempfile.TemporaryDirectory() as made:
        code, program = Path(made, "code.o"), Path(made, "program")
        _run(PROGRAMS, "as", "--64", "--fatal-warnings", "-o", str(code), source.name)
        _run(PROGRAMS, "ld", "-m", "elf_x86_64", "--strip-all", "--fatal-warnings", "-o", str(program), str(code))
        return program.read_bytes()


def _need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            raise RuntimeError(f"the Linux lane needs {tool}: run it on Debian with binutils, or in a container of it")


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def initrd(busybox: Path, files: Mapping[str, bytes]) -> bytes:
    """A cpio archive ("newc") with busybox, its applets, further files by path, and an init that ends in a shell."""
    archive = _Archive()
    for name in ("bin", "dev", "lib", "proc", "sys", "tmp"):
        archive.add(name, _FOLDER)
    archive.add("dev/console", _DEVICE, device=(5, 1))
    archive.add("dev/ttyS0", _DEVICE, device=(4, 64))
    archive.add("dev/zero", _DEVICE, device=(1, 5))
    archive.add("bin/busybox", _REGULAR, busybox.read_bytes())
    for name in (*APPLETS, "setsid", "cttyhack"):
        archive.add(f"bin/{name}", _LINK, b"busybox")
    for name, content in files.items():
        archive.add(name, _REGULAR, content)
    archive.add("init", _REGULAR, INIT)
    archive.add("TRAILER!!!", 0)
    return bytes(archive.data)


class _Archive:
    def __init__(self) -> None:
        self.data = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        self.data += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self.data += content
        self._pad()

    def _pad(self) -> None:
        self.data += bytes(-len(self.data) % 4)


def vmlinux(bz_image: bytes) -> bytes:
    """The ELF file inside of a bzImage that is compressed with LZ4 (legacy frames), as Debian's are."""
    setup = (bz_image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", bz_image, 0x248)
    payload = bz_image[setup + offset : setup + offset + length - 4]
    if not payload.startswith(b"\x02\x21\x4c\x18"):
        raise RuntimeError("the kernel is not compressed with LZ4 any more: teach vmlinux() what it is")
    out, place = bytearray(), 4
    while place < len(payload):
        (size,) = struct.unpack_from("<I", payload, place)
        out += _lz4_block(payload[place + 4 : place + 4 + size])
        place += 4 + size
    return bytes(out)


def _lz4_block(data: bytes) -> bytes:
    out, place = bytearray(), 0
    while True:
        token = data[place]
        literals, place = _lz4_length(data, place + 1, token >> 4)
        out += data[place : place + literals]
        place += literals
        if place >= len(data):
            return bytes(out)
        distance = int.from_bytes(data[place : place + 2], "little")
        length, place = _lz4_length(data, place + 2, token & 15)
        length += 4
        while length:
            piece = out[len(out) - distance :][:length] if distance >= length else out[-distance:]
            out += piece[:length]
            length -= min(length, len(piece))


def _lz4_length(data: bytes, place: int, length: int) -> tuple[int, int]:
    if length == 15:
        while data[place] == 255:
            length += 255
            place += 1
        length += data[place]
        place += 1
    return length, place


def main(folder: Path) -> None:
    """Leave a kernel and an initrd in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    kernel, busybox = fetch(folder)
    shutil.copy(kernel, folder / "vmlinuz")
    (folder / "initrd.cpio").write_bytes(initrd(busybox, extras(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
