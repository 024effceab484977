"""Build the images of the bundled guests from their sources, or check the committed ones.

::

    python guests/build.py            write every image
    python guests/build.py --check    rebuild into a temporary folder and compare; status 1 if any differs

Only this needs GNU binutils for x86 (``as``, ``ld``, ``nm``, ``objcopy``; ``--prefix x86_64-linux-gnu-``
picks a cross toolchain): running a guest needs nothing but its committed image. The same binutils give the
same file, byte for byte. Another version may lay the file out differently, so the check compares what a
loader and a reader see: segments, entry and symbols.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

if TYPE_CHECKING:
    from collections.abc import Iterator

GUESTS = Path(__file__).resolve().parent
TOOLS = ("as", "ld", "nm", "objcopy")
#: Only global symbols are kept: those are the names that a trace shows.
LINK_OPTIONS = ("--discard-all", "--build-id=none", "--fatal-warnings", "-z", "max-page-size=4096")


class BuildError(Exception):
    """A guest cannot be built, or the tools to build it are missing."""


@frozen
class Segment:
    """A loadable segment as a loader sees it; ``flags`` are the ELF's (1 execute, 2 write, 4 read)."""

    vaddr: int
    paddr: int
    memory_size: int
    flags: int
    data: bytes


@frozen
class Linked:
    """What counts of a linked ELF: entry, segments in order, address and size of each named symbol."""

    entry: int
    segments: tuple[Segment, ...]
    symbols: dict[str, tuple[int, int]]


@frozen
class Guest:
    """A guest's folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """The guest's name: that of its folder."""
        return self.folder.name

    @property
    def image(self) -> Path:
        """The committed image."""
        return self.folder / str(self.manifest["image"]["file"])

    @property
    def symbols(self) -> Path:
        """The committed symbols of a flat image, as ``nm`` prints them."""
        return self.folder / str(self.manifest["image"]["symbols"])

    @property
    def is_flat(self) -> bool:
        """Whether the image is the bare bytes rather than an ELF."""
        return bool(self.manifest["image"]["format"] == "flat")

    @property
    def linker_script(self) -> Path:
        """The guest's own linker script if it has one, or the one that the guests share."""
        own = self.folder / "guest.ld"
        return own if own.exists() else GUESTS / "guest.ld"


def find_guests() -> list[Guest]:
    """All bundled guests, by name."""
    return [
        Guest(manifest.parent, tomllib.loads(manifest.read_text(encoding="utf-8")))
        for manifest in sorted(GUESTS.glob("*/guest.toml"))
    ]


def find_tools(prefix: str) -> dict[str, str]:
    """Find the path of each tool; raises BuildError with a line that names the missing ones."""
    found = {tool: shutil.which(prefix + tool) for tool in TOOLS}
    missing = [prefix + tool for tool, path in found.items() if path is None]
    if missing:
        raise BuildError(f"cannot build: {', '.join(missing)} not found; install GNU binutils for x86")
    return {tool: path for tool, path in found.items() if path is not None}


def run_tool(guest: Guest, command: list[str]) -> str:
    """Run a tool in the guests' folder; returns its output, raises BuildError with its complaint."""
    done = subprocess.run(command, cwd=GUESTS, capture_output=True, text=True, check=False)
    if done.returncode != 0 or done.stderr:
        raise BuildError(f"{guest.name}: {Path(command[0]).name} says: {done.stderr.strip()}")
    return done.stdout


def build(guest: Guest, tools: dict[str, str], where: Path) -> dict[Path, Path]:
    """Build the guest's files in the folder ``where``; returns which committed file each new one is for."""
    object_file, linked, flat, names = (where / f"{guest.name}.{end}" for end in ("o", "elf", "bin", "sym"))
    is_long = guest.manifest["machine"]["mode"] == "long"
    source = (guest.folder / "guest.S").relative_to(GUESTS)
    width, emulation = ("--64", "elf_x86_64") if is_long else ("--32", "elf_i386")
    assemble = [tools["as"], width, "--fatal-warnings", "-o", str(object_file), str(source)]
    link = [tools["ld"], "-m", emulation, *LINK_OPTIONS, "-T", str(guest.linker_script), "-o", str(linked)]
    run_tool(guest, assemble)
    run_tool(guest, [*link, str(object_file)])
    check_addresses(guest, read_linked(linked))
    if not guest.is_flat:
        return {guest.image: linked}
    run_tool(guest, [tools["objcopy"], "-O", "binary", str(linked), str(flat)])
    names.write_text(run_tool(guest, [tools["nm"], "--numeric-sort", str(linked)]), encoding="utf-8")
    return {guest.image: flat, guest.symbols: names}


def check_addresses(guest: Guest, linked: Linked) -> None:
    """Raise BuildError unless the addresses in the manifest are the linked ones."""
    expected = {"cpu.entry": (guest.manifest["cpu"]["entry"], linked.entry)}
    if guest.is_flat:
        lowest = min(segment.paddr for segment in linked.segments)
        expected["image.load"] = (guest.manifest["image"]["load"], lowest)
    if "idt" in guest.manifest["cpu"]:
        expected["cpu.idt"] = (guest.manifest["cpu"]["idt"], linked.symbols["idt"][0])
    for key, (said, is_linked) in expected.items():
        if said != is_linked:
            raise BuildError(f"{guest.name}: {key} = {said:#x} in guest.toml, {is_linked:#x} in the source")


def read_linked(path: Path) -> Linked:
    """Read the entry, the loadable segments and the named symbols of an ELF."""
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        table = elf.get_section_by_name(".symtab")
        symbols = table.iter_symbols() if isinstance(table, SymbolTableSection) else ()
        return Linked(
            entry=elf["e_entry"],
            segments=tuple(
                Segment(s["p_vaddr"], s["p_paddr"], s["p_memsz"], s["p_flags"], s.data())
                for s in elf.iter_segments("PT_LOAD")
            ),
            symbols={s.name: (s["st_value"], s["st_size"]) for s in symbols if s.name},
        )


def differences(committed: Path, rebuilt: Path) -> Iterator[str]:
    """Say in a line each how a committed file differs from the rebuilt one."""
    if not committed.exists():
        yield f"{committed.name} is missing"
    elif committed.suffix == ".elf":
        yield from linked_differ(read_linked(committed), read_linked(rebuilt))
    else:
        yield from bytes_differ(committed.name, 0, committed.read_bytes(), rebuilt.read_bytes())


def linked_differ(committed: Linked, rebuilt: Linked) -> Iterator[str]:
    """Compare entry, symbols and segments, in this order."""
    if committed.entry != rebuilt.entry:
        yield f"the entry is {committed.entry:#x}, the source gives {rebuilt.entry:#x}"
    for name in sorted(committed.symbols.keys() | rebuilt.symbols.keys()):
        old, new = committed.symbols.get(name), rebuilt.symbols.get(name)
        if old != new:
            yield f"symbol {name} is {symbol_text(old)}, the source gives {symbol_text(new)}"
    if len(committed.segments) != len(rebuilt.segments):
        yield f"there are {len(committed.segments)} segments, the source gives {len(rebuilt.segments)}"
    for old_segment, new_segment in zip(committed.segments, rebuilt.segments, strict=False):
        yield from segments_differ(old_segment, new_segment)


def segments_differ(committed: Segment, rebuilt: Segment) -> Iterator[str]:
    """Compare a segment's place, size and permissions, then its bytes."""
    for key in ("vaddr", "paddr", "memory_size", "flags"):
        old, new = getattr(committed, key), getattr(rebuilt, key)
        if old != new:
            yield f"{key} of the segment at {committed.vaddr:#x} is {old:#x}, the source gives {new:#x}"
    yield from bytes_differ("the segment", committed.vaddr, committed.data, rebuilt.data)


def bytes_differ(what: str, base: int, committed: bytes, rebuilt: bytes) -> Iterator[str]:
    """Compare two runs of bytes; names the first difference."""
    if committed == rebuilt:
        return
    pairs = enumerate(zip(committed, rebuilt, strict=False))
    first = next((i for i, (old, new) in pairs if old != new), min(len(committed), len(rebuilt)))
    sizes = f"{len(committed)} bytes, from source {len(rebuilt)}"
    yield f"{what} at {base:#x} ({sizes}) differs from {base + first:#x} on"


def symbol_text(symbol: tuple[int, int] | None) -> str:
    """Put a symbol's address and size in words."""
    return "missing" if symbol is None else f"at {symbol[0]:#x} (size {symbol[1]})"


def main(arguments: list[str] | None = None) -> int:
    """Build or check; returns 0, or 1 if something differs or cannot be built."""
    parser = argparse.ArgumentParser(description="Build the images of the bundled guests from their sources.")
    parser.add_argument("--check", action="store_true", help="write nothing, compare instead")
    parser.add_argument("--prefix", default="", help="what the names of the tools start with")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return work(check=options.check, prefix=options.prefix, where=Path(folder))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1


def work(*, check: bool, prefix: str, where: Path) -> int:
    """Build every guest in the folder ``where``, then compare or copy; returns the exit status."""
    tools = find_tools(prefix)
    guests = find_guests()
    bad = 0
    for guest in guests:
        for committed, rebuilt in build(guest, tools, where).items():
            bad += report(guest, committed, rebuilt) if check else copy(rebuilt, committed)
    if not bad:
        print(f"{len(guests)} images {'are what their sources give' if check else 'written'}")
    return 1 if bad else 0


def report(guest: Guest, committed: Path, rebuilt: Path) -> int:
    """Print the differences between two files; returns their number."""
    found = list(differences(committed, rebuilt))
    for difference in found:
        print(f"{guest.name}: {difference}; run guests/build.py", file=sys.stderr)
    return len(found)


def copy(rebuilt: Path, committed: Path) -> int:
    """Copy a new file to its place; returns 0 differences."""
    shutil.copyfile(rebuilt, committed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
