"""The console view: a run as a person reads it while it goes on.

Output to the debug console is gathered, loops are folded, modifications show the code before and after. The
view only looks: with it and without it a run is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import evolve

from vmm.exits import IoInstruction
from vmm.records import End, Modification, Record
from vmm.trace.folding import Item, NestedFolder, Skipped
from vmm.trace.names import Names
from vmm.trace.painter import Painter, Style
from vmm.trace.patches import PatchReader
from vmm.trace.rendering import Entry, Line, line_of

if TYPE_CHECKING:
    from vmm.machine import Machine
    from vmm.translation import Block

#: Lines after which a run is only counted, unless everything is wanted.
LIMIT: Final = 200
#: Widths of the columns: number, kind, place; where there are several vCPUs, which one it was comes behind the number,
#: and kinds have room for EXTERNAL_INTERRUPT.
_NUMBER: Final = 9
_KIND: Final = 16
_KIND_OF_SEVERAL: Final = 18
_PLACE: Final = 22
#: Blanks between two columns.
_GAP: Final = "  "
#: Bytes of console output that one line shows.
_GATHERED: Final = 64


class ConsoleView:
    """Shows the records of one machine's run. ``record`` is an observer; call ``finish`` at the end.

    With ``everything`` nothing is folded and nothing cut off.
    """

    def __init__(self, machine: Machine, painter: Painter, *, everything: bool = False) -> None:
        self._machine = machine
        self._painter = painter
        self._everything = everything
        self._names = Names(machine.guest)
        self._console_port = machine.guest.manifest.console.port
        self._folder = NestedFolder(self._show)
        self._gathered: Entry | None = None
        self._seq = 0
        self._lines = 0
        self._unseen = 0
        self._patches = PatchReader(machine, self._names)
        self._several = len(machine.vcpus) > 1
        self._vcpu = len(str(len(machine.vcpus) - 1))
        self._indent = " " * len(self._start("", None, Line("", "", ""))) + _GAP
        self._watch_blocks()

    def record(self, record: Record) -> None:
        """Take the next record."""
        self._seq += 1
        if self._full and not isinstance(record, End):
            self._unseen += 1
        elif isinstance(record, IoInstruction) and self._is_printing(record):
            if self._gathered is not None and self._gathered.record.vcpu != record.vcpu:
                self._ungather()
            self._gather(record)
        else:
            self._ungather()
            self._add(self._entry(record))

    def finish(self) -> None:
        """Show what was held back."""
        self._ungather()
        self._folder.flush()

    @property
    def _full(self) -> bool:
        return self._lines >= LIMIT and not self._everything

    def _add(self, entry: Entry) -> None:
        if isinstance(entry.record, End):
            self._folder.flush()
            self._tell_unseen()
            self._show(entry)
        elif self._everything:
            self._show(entry)
        else:
            self._folder.add(entry)

    # Console output

    def _is_printing(self, record: IoInstruction) -> bool:
        return record.port == self._console_port and record.direction == "out"

    def _gather(self, record: IoInstruction) -> None:
        data = record.value.to_bytes(record.size, "little")
        before = self._gathered
        if before is None:
            self._gathered = Entry(self._seq, record, self._seq, data)
        else:
            self._gathered = evolve(before, seq=self._seq, text=before.text + data)
        if data.endswith(b"\n") or len(self._gathered.text) >= _GATHERED:
            self._ungather()

    def _ungather(self) -> None:
        entry, self._gathered = self._gathered, None
        if entry is not None:
            self._add(entry)

    # Modifications

    def _entry(self, record: Record) -> Entry:
        if not isinstance(record, Modification):
            return Entry(self._seq, record, self._seq)
        words = {block.number: self._words(block) for block in self._patches.casualties(record)}
        return Entry(self._seq, record, self._seq, patch=self._patches.read(record), dead=words)

    def _words(self, block: Block) -> str:
        owner = f" of vCPU {block.vcpu}" if self._several else ""
        return f"block {block.number}{owner}: {block.size} bytes at {self._names.code(block.gva)}"

    def _watch_blocks(self) -> None:
        """Hear of every block that dies, besides whoever else listens."""
        blocks = self._machine.blocks
        before = blocks.observer

        def watch(event: str, block: Block, cause: str) -> None:
            if event == "invalidated":
                self._patches.died(block)
            if before is not None:
                before(event, block, cause)

        blocks.observer = watch

    # Lines

    def _show(self, item: Item) -> None:
        if self._full and not (isinstance(item, Entry) and isinstance(item.record, End)):
            self._unseen += item.seq - item.first + 1
        elif isinstance(item, Entry):
            self._show_entry(item)
        elif isinstance(item, Skipped):
            self._show_note(f"{item.seq - item.first + 1:,} more like these, up to {item.seq}")

    def _show_entry(self, entry: Entry) -> None:
        line = line_of(entry, self._names)
        number = str(entry.seq) if entry.first == entry.seq else f"{entry.first}-{entry.seq}"
        self._painter.line(self._start(number, entry.record.vcpu, line) + line.what, line.style)
        for style, text in line.below:
            self._painter.line(self._indent + text, style)
        self._lines += 1 + len(line.below)

    def _start(self, number: str, vcpu: int | None, line: Line) -> str:
        """All columns of a line but the last."""
        columns = [f"{number:>{_NUMBER}}", f"{line.kind:<{_KIND}}", f"{line.where:<{_PLACE}}", ""]
        if self._several:
            who = "" if vcpu is None else str(vcpu)
            columns[1:2] = [f"{who:>{self._vcpu}}", f"{line.kind:<{_KIND_OF_SEVERAL}}"]
        return _GAP.join(columns)

    def _show_note(self, text: str) -> None:
        self._painter.line(f"{'...':>{_NUMBER}}  {text}", Style.QUIET)
        self._lines += 1

    def _tell_unseen(self) -> None:
        if self._unseen:
            self._show_note(f"{self._unseen:,} more records (--all shows them, --trace keeps them)")
