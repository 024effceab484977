"""Inside of Linux programs, the kernel and a module change code while it runs: nothing stale runs, all is on record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

import pytest
from attrs import define, field
from boots import PROMPT, Boot, boot
from shadow import at_pauses

from vmm.exits import EptViolation
from vmm.guest.kallsyms import find_kallsyms
from vmm.memory import PAGE
from vmm.records import Modification, Record
from vmm.trap.policy import HOT_FRAME

pytestmark = pytest.mark.linux

#: How often the programs patch, and where they have their code: what they store to, and what else leads there.
PATCHES = 10_000
PROGRAMS = {b"dual": (0x10000000, (0x20000000, 0x30000000)), b"mprotect": (0x40000000, ())}

KEY = b"/proc/sys/kernel/sched_schedstats"
KEY_ON, KEY_OFF = b"echo 1 > " + KEY, b"echo 0 > " + KEY
TRACER_ON, TRACER_OFF = b"echo function > /sys/current_tracer", b"echo nop > /sys/current_tracer"
INSERT = b"insmod /lib/dummy.ko"
COMMANDS = (
    *PROGRAMS,
    *(KEY_ON, KEY_OFF),
    b"mount -t tracefs tracefs /sys",
    b"echo 'vfs_*' > /sys/set_ftrace_filter",
    TRACER_ON,
    b"cat /proc/version > /dev/zero; echo 0 > /sys/tracing_on",
    b"echo traced $(grep -c vfs_read /sys/trace)",
    TRACER_OFF,
    INSERT,
    b"cat /proc/modules; grep -o dummy0 /proc/net/dev",
    b"rmmod dummy && echo removed",
    b"poweroff -f",
)
#: Exits between two pauses, and pauses between two at which windows are journaled.
PAUSE, JOURNALED = 1000, 10

#: Bit 2 of an exit qualification.
FETCH = 1 << 2
KERNEL_HALF = 1 << 63
INT3, CALL, NOPS, JUMPS = 0xCC, 0xE8, (0x0F, 0x66), (0xE9, 0xEB)


@define
class Inside:
    """A boot whose shell is given ``COMMANDS``: its records by command, and what pauses in the midst of it found."""

    made: Boot
    records: dict[bytes, list[Record]] = field(factory=dict)
    #: The linear pages that frames were executed at when they became code, by frame.
    executed: dict[int, int] = field(factory=dict)
    pauses: int = 0
    found: list[str] = field(factory=list)
    _shown: bytes = b""

    def connect(self) -> None:
        machine = self.made.machine
        machine.observe(self._hear)
        machine.on_output(self._prompted)
        at_pauses(machine, self._pause, acts=False)

    def _prompted(self, data: bytes) -> None:
        self._shown = (self._shown + data)[-len(PROMPT) :]
        if self._shown == PROMPT:
            self.records[COMMANDS[len(self.records)]] = []

    def _hear(self, record: Record) -> None:
        if self.records:
            self.records[COMMANDS[len(self.records) - 1]].append(record)
        if isinstance(record, EptViolation) and record.qualification & FETCH:
            self.executed[record.gpa & -PAGE] = record.gva & -PAGE

    def _pause(self, number: int) -> None:
        if number % PAUSE:
            return
        self.pauses += 1
        self.found += self.made.shadow.differences()
        if number % (PAUSE * JOURNALED) == 0:
            self.made.machine.journal_windows()
            self.found += self.made.shadow.differences_anywhere()

    def stores(self, command: bytes) -> list[Modification]:
        """What instructions wrote to code while a command was carried out."""
        records = self.records[command]
        return [record for record in records if isinstance(record, Modification) and record.rip is not None]

    def poked(self, command: bytes) -> dict[int, tuple[int, int]]:
        """What the kernel patched by way of INT3 and through a user-half address: {GPA: first byte before, after}."""
        stores = [store for store in self.stores(command) if store.rip >= KERNEL_HALF > store.gva]
        begun: dict[int, int] = {}
        done: dict[int, tuple[int, int]] = {}
        for store in stores:
            if store.new == bytes([INT3]):
                begun[store.gpa] = store.old[0]
            elif store.old == bytes([INT3]) and store.gpa in begun:
                done[store.gpa] = begun[store.gpa], store.new[0]
        return done

    def address(self, gpa: int) -> int:
        """The linear address at which a frame's code is executed."""
        return self.executed[gpa & -PAGE] + gpa % PAGE


@pytest.fixture(scope="module")
def inside(files) -> Inside:
    made: list[Inside] = []

    def prepare(started: Boot) -> None:
        made.append(Inside(started))
        made[0].connect()

    boot(*files, commands=COMMANDS, prepare=prepare)
    return made[0]


def versions(records: Iterable[Record], gpa: int) -> Iterator[int]:
    """The values of the four bytes at a GPA, one for each instruction or window that changed them."""
    value = bytearray(4)
    touching = (r for r in records if isinstance(r, Modification) and r.gpa < gpa + 4 and gpa < r.gpa + len(r.new))
    for _, together in groupby(touching, key=lambda record: record.instruction):
        for record in together:
            for index, byte in enumerate(record.new, record.gpa - gpa):
                if 0 <= index < 4:
                    value[index] = byte
        yield int.from_bytes(value, "little")


def test_every_command_did_what_it_says(inside):
    console = inside.made.console
    assert "\ndual 10000 ok\r\n" in console
    assert "\nmprotect 10000 ok\r\n" in console
    assert int(re.search(r"\ntraced (\d+)\r", console)[1]) > 0
    assert "\ndummy0\r\n" in console
    assert "\nremoved\r\n" in console
    assert inside.made.end.reason == "halt"


@pytest.mark.parametrize("program", PROGRAMS)
class TestPrograms:
    def test_each_version_is_on_record_once_and_in_order(self, inside, program):
        writable, _ = PROGRAMS[program]
        first = next(store for store in inside.stores(program) if store.gva == writable + 1)
        records = inside.records[program]
        told = list(versions(records[records.index(first) :], first.gpa))
        assert told[:PATCHES] == list(range(1, PATCHES + 1))

    def test_a_stepped_store_names_its_alias_and_ends_what_was_translated_through_each(self, inside, program):
        writable, executable = PROGRAMS[program]
        stores = [store for store in inside.stores(program) if store.gva == writable + 1]
        assert len(stores) > PATCHES // 2
        for store in stores:
            assert {writable + 1, *(page + 1 for page in executable)} <= set(store.aliases)
            assert len(store.blocks) == max(1, len(executable))

    def test_the_frame_is_a_window_for_one_patch_after_sixteen_that_were_stepped(self, inside, program):
        writable, _ = PROGRAMS[program]
        frame = next(store.gpa & -PAGE for store in inside.stores(program) if store.gva == writable + 1)
        changes = [r for r in inside.records[program] if isinstance(r, Modification) and r.gpa & -PAGE == frame]
        stepped = [len(list(run)) for window, run in groupby(changes, lambda r: r.cause == "window") if not window]
        assert stepped.count(HOT_FRAME) > len(stepped) * 0.9


def test_a_static_key_is_flipped_through_the_alias_and_back(inside):
    on, off = inside.poked(KEY_ON), inside.poked(KEY_OFF)
    assert on
    assert all((before in NOPS, after in JUMPS) in ((True, True), (False, False)) for before, after in on.values())
    both = on.keys() & off.keys()
    assert both
    assert all(off[site] == on[site][::-1] for site in both)
    assert all(inside.address(site) >= KERNEL_HALF for site in both)


def test_ftrace_makes_calls_of_the_functions_that_were_asked_for_and_nops_again(inside):
    symbols = {symbol.address: symbol.name for symbol in find_kallsyms(inside.made.machine.memory.mapping)}
    on, off = inside.poked(TRACER_ON), inside.poked(TRACER_OFF)
    calls = {site for site, change in on.items() if change == (NOPS[0], CALL)}
    names = {symbols.get(inside.address(site), hex(inside.address(site))) for site in calls}
    assert names
    assert all(name.startswith("vfs_") for name in names), names
    back = calls & off.keys()
    assert back
    assert all(off[site] == (CALL, NOPS[0]) for site in back)


def test_a_module_becomes_code_where_there_was_none(inside):
    size, base = re.search(r"\ndummy (\d+) .* (0x[0-9a-f]+)", inside.made.console).groups()
    module = range(int(base, 16), int(base, 16) + int(size))
    fetched = {
        record.gpa & -PAGE
        for record in inside.records[INSERT]
        if isinstance(record, EptViolation) and record.qualification & FETCH and record.gva in module
    }
    assert fetched
    assert fetched <= inside.made.shadow.pages.keys()


def test_the_journal_accounts_for_every_byte_of_code_at_every_pause_and_at_the_end(inside):
    assert inside.found == []
    assert inside.pauses > 50
    assert inside.made.shadow.surprises == []
    assert inside.made.shadow.differences_anywhere() == []
