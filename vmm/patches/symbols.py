"""The symbols of a kernel as a file has them, where the kernel really was.

``vmm boot --symbols`` writes addresses as they were in that boot. A System.map has those that the kernel was linked
for, and address-space randomisation adds a *slide* to them. The trace tells which: each event delivered through the IDT
goes to an entry point whose symbol is known.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.errors import InputError
from vmm.guest.files import one_line, read_file
from vmm.guest.symbols import Symbols, parse_symbols
from vmm.patches.mapping import KERNEL_IMAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.trace.reading import TraceReader

_FILE_LIMIT: Final = 64 << 20
_FIX: Final = "give what `vmm boot --symbols` has written, or a System.map"
#: An address that is farther behind a symbol than this belongs to something that has none.
_LONGEST: Final = 1 << 16
#: What a relocatable kernel may be moved by: a multiple of 2 MiB (CONFIG_PHYSICAL_ALIGN), within 1 GiB.
_ALIGN: Final = 2 << 20
_RANGE: Final = 1 << 30
#: Deliveries that are looked at.
_ENOUGH: Final = 64

#: Entry points of exceptions and of the kernel's interrupts, by vector: the name since Linux 5.8, then the one before.
_EXCEPTIONS: Final = {
    0: ("asm_exc_divide_error", "divide_error"),
    1: ("asm_exc_debug", "debug"),
    3: ("asm_exc_int3", "int3"),
    6: ("asm_exc_invalid_op", "invalid_op"),
    7: ("asm_exc_device_not_available", "device_not_available"),
    13: ("asm_exc_general_protection", "general_protection"),
    14: ("asm_exc_page_fault", "page_fault"),
    236: ("asm_sysvec_apic_timer_interrupt", "apic_timer_interrupt"),
    246: ("asm_sysvec_irq_work", "irq_work_interrupt"),
}
#: Tables of entry points: name, first vector, number of vectors, and the sizes that an entry may have.
_TABLES: Final = (
    ("early_idt_handler_array", 0, 32, (9, 13)),
    ("irq_entries_start", 32, 224, (8, 16)),
)


@frozen(slots=True)
class KernelSymbols:
    """Symbols of a kernel that was moved by ``slide`` bytes; ``name`` is the file's."""

    name: str
    symbols: Symbols
    slide: int = 0

    def __len__(self) -> int:
        return len(self.symbols)

    def lookup(self, address: int) -> tuple[str, int] | None:
        """The symbol that a linear address belongs to, and how far behind it the address is."""
        found = self.symbols.lookup(address - self.slide)
        return None if found is None or found[1] >= _LONGEST else found

    def function(self, address: int) -> str | None:
        """The symbol alone."""
        found = self.lookup(address)
        return None if found is None else found[0]

    def label(self, address: int) -> str | None:
        """``name`` or ``name+0x1c``."""
        found = self.lookup(address)
        if found is None:
            return None
        name, offset = found
        return f"{name}+{offset:#x}" if offset else name


def read_kernel_symbols(path: str) -> KernelSymbols:
    """A file of symbols, with slide 0; raises ``InputError`` if it is none, or one without a kernel's."""
    data = read_file(Path(path), _FILE_LIMIT, error=InputError, fix=_FIX)
    name = one_line(path)
    symbols = [symbol for symbol in parse_symbols(data, name, fix=_FIX) if symbol.address >= KERNEL_IMAGE]
    if len(symbols) < 2:  # Debian's System.map consists of one line, which says where the real one is
        raise InputError("no symbols of a kernel", where=name, fix=_FIX)
    end = max(symbol.address for symbol in symbols) + _LONGEST
    return KernelSymbols(name, Symbols(symbols, [(KERNEL_IMAGE, end)]))


def find_slide(symbols: KernelSymbols, reader: TraceReader) -> int | None:
    """By how much the kernel of a trace was moved; None if nothing was delivered through its IDT.

    Raises ``InputError`` if no slide makes the entry points of the trace those of the symbols.
    """
    votes: Counter[int] = Counter()
    seen = 0
    vector = entry = 0
    for vector, entry in _deliveries(reader):
        seen += 1
        votes.update(set(_slides(symbols.symbols, vector, entry)))
        if seen == _ENOUGH:
            break
    if not seen:
        return None
    slide, count = votes.most_common(1)[0] if votes else (0, 0)
    if 2 * count <= seen:
        what = f"not the symbols of this kernel, whose entry for vector {vector} is at {entry:#x}"
        raise InputError(what, where=symbols.name, fix="give those of the same build, or --slide")
    return slide


def _deliveries(reader: TraceReader) -> Iterator[tuple[int, int]]:
    """(vector, entry point) of what was delivered to the kernel's image."""
    for line in reader.lines():
        if line.kind == "injection":
            vector, entry = line.object.get("vector"), line.object.get("rip")
            if type(vector) is int and type(entry) is int and KERNEL_IMAGE <= entry < 1 << 64:
                yield vector, entry


def _slides(symbols: Symbols, vector: int, entry: int) -> Iterator[int]:
    """The slides that would make an address the entry point of a vector."""
    places = [symbols.address(name) for name in _EXCEPTIONS.get(vector, ())]
    for name, first, count, sizes in _TABLES:
        start = symbols.address(name)
        if start is not None and 0 <= vector - first < count:
            places += [start + size * (vector - first) for size in sizes]
    for place in places:
        if place is not None and not (entry - place) % _ALIGN and abs(entry - place) < _RANGE:
            yield entry - place
