"""Guest images: what goes where in RAM, where the guest starts, and what the places are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.errors import ImageError
from vmm.guest.files import one_line, read_file
from vmm.guest.symbols import Symbols, read_symbols_file

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.guest.manifest import Image

PAGE: Final = 4096
ELF_MAGIC: Final = b"\x7fELF"
ELF_FILE_LIMIT: Final = 256 << 20
_MISSING: Final = "correct [image].file in the manifest, or put the image there"


@frozen(slots=True)
class Segment:
    """A part of an image: ``data`` at ``gpa``, then zeros up to ``memory_size`` bytes.

    ``gva`` is the linear address that it was linked for; in a flat image that is its GPA.
    """

    gpa: int
    data: bytes
    memory_size: int
    readable: bool
    writable: bool
    executable: bool
    gva: int

    @property
    def end(self) -> int:
        """The first GPA after the segment."""
        return self.gpa + self.memory_size


@frozen(slots=True)
class LoadedImage:
    """An image, checked: the segments lie in RAM and do not overlap, in order of their GPA.

    ``entry`` is the linear address from the ELF header, None where the file has none.
    """

    segments: tuple[Segment, ...]
    entry: int | None
    symbols: Symbols

    def holds(self, gpa: int) -> bool:
        """Whether ``gpa`` is a byte that came from the image file."""
        return any(0 <= gpa - segment.gpa < len(segment.data) for segment in self.segments)

    def spares(self, gpa: int, size: int) -> bool:
        """Whether none of the ``size`` bytes at ``gpa`` belongs to a segment."""
        return all(segment.end <= gpa or segment.gpa >= gpa + size for segment in self.segments)

    def code_frames(self) -> tuple[int, ...]:
        """The GPAs of all frames that an executable segment touches, in order."""
        frames: set[int] = set()
        for segment in self.segments:
            if segment.executable:
                frames.update(range(segment.gpa & -PAGE, segment.end, PAGE))
        return tuple(sorted(frames))


def load_image(image: Image, memory: int) -> LoadedImage:
    """The image that a manifest names, for ``memory`` bytes of RAM; raises ImageError."""
    if image.format == "elf64":
        return load_elf(image.file, memory)
    load = image.load or 0
    return _load_flat(image.file, load, memory, image.symbols)


def load_elf(path: Path, memory: int) -> LoadedImage:
    """The ELF64 image in the file ``path``; raises ImageError."""
    from vmm.guest.elf import parse_elf  # noqa: PLC0415 - 60 ms that a flat guest need not pay

    data = read_file(path, ELF_FILE_LIMIT, error=ImageError, fix=_MISSING)
    return parse_elf(data, one_line(path), memory)


def _load_flat(path: Path, load: int, memory: int, symbols: Path | None) -> LoadedImage:
    data = read_file(path, memory, error=ImageError, fix=_MISSING)
    if not data:
        raise ImageError("the image is empty", where=one_line(path), fix="build it again")
    if load + len(data) > memory:
        what = f"{len(data):#x} bytes at {load:#x} reach out of RAM, which ends at {memory:#x}"
        raise ImageError(what, where=one_line(path), fix="lower [image].load or raise [machine].memory")
    segment = Segment(load, data, len(data), readable=True, writable=True, executable=True, gva=load)
    extents = [(load, load + len(data))]
    return LoadedImage((segment,), None, read_symbols_file(symbols, extents) if symbols else Symbols())
