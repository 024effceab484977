"""Debian's kernel with the APICs, and with the 8259As alone: who interrupts, and whether all code is accounted for.

Run with ``pytest -m linux``, like ``test_debian.py``, which holds the rest.
"""

from __future__ import annotations

import re

import pytest
from boots import APPEND
from shadow import Shadow

from vmm import assembly
from vmm.commands.typist import Typist
from vmm.cpu.features import pc_cpuid
from vmm.guest.linux import load_linux
from vmm.machine import Machine
from vmm.records import DeviceAccess

pytestmark = pytest.mark.linux

COMMANDS = (b"cat /proc/interrupts", b"sleep 1; echo slept", b"cat /proc/interrupts", b"poweroff -f")
LOCAL_APIC, IO_APIC = 0xFEE00000, 0xFEC00000


class Boot:
    """One boot to the shell and out of it again."""

    def __init__(self, kernel, initrd, *, apic: bool) -> None:
        guest = load_linux(kernel, initrd=initrd, command_line=APPEND, seconds=1200.0, apic=apic)
        assert not {"nolapic", "noapic"} & set(APPEND.split())
        self.machine = Machine(guest)
        self.shadow = Shadow(self.machine)
        self.accesses: list[DeviceAccess] = []
        self.machine.observe(lambda record: self.accesses.append(record) if isinstance(record, DeviceAccess) else None)
        Typist(COMMANDS, b"# ").connect(self.machine)
        self.end = self.machine.run()
        self.console = self.machine.console.output.decode()

    def interrupts(self, name: str) -> list[tuple[int, str]]:
        """What each look at ``/proc/interrupts`` said of a line: the count, and what follows it."""
        lines = re.findall(rf"^ *{name}: +(\d+) *(.*)\r$", self.console, re.MULTILINE)
        return [(int(count), rest.strip()) for count, rest in lines]


@pytest.fixture(scope="module")
def with_apic(files) -> Boot:
    return Boot(*files, apic=True)


@pytest.fixture(scope="module")
def that_measures(files) -> Boot:
    """With a processor that does not tell the frequency of its clocks."""

    def silent(leaf, subleaf, cr4, *, apic_clock):
        return pc_cpuid(leaf, subleaf, cr4, apic_clock=apic_clock if leaf == 1 else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "pc_cpuid", silent)
        return Boot(*files, apic=True)


@pytest.fixture(scope="module")
def without_apic(files) -> Boot:
    return Boot(*files, apic=False)


def test_a_kernel_boots_with_neither_nolapic_nor_noapic(with_apic):
    assert with_apic.end.reason == "halt"
    assert "\nslept\r\n" in with_apic.console
    assert not re.search("MP-BIOS bug|ACPI (BIOS )?Error|panic", with_apic.console)


def test_time_comes_from_the_local_apic(with_apic):
    before, after = with_apic.interrupts("LOC")
    assert 0 < before[0] < after[0]
    assert after[1] == "Local timer interrupts"


def test_devices_interrupt_through_the_io_apic(with_apic):
    (before, _), (after, line) = with_apic.interrupts("4")
    assert 0 < before < after
    assert re.fullmatch(r"IO-APIC +4-edge +ttyS0", line)
    assert re.fullmatch(r"IO-APIC +9-fasteoi +acpi", with_apic.interrupts("9")[0][1])
    assert "XT-PIC" not in with_apic.console


def test_nobody_needs_the_8254_since_cpuid_tells_the_frequency_of_the_timer(with_apic):
    assert with_apic.interrupts("0") == []


def test_nothing_went_wrong_in_the_controllers(with_apic):
    for name in ("SPU", "ERR", "MIS", "NMI"):
        assert {count for count, _ in with_apic.interrupts(name)} == {0}


def test_every_interrupt_of_the_local_apic_was_ended(with_apic):
    ends = sum(access.gpa == LOCAL_APIC + 0xB0 for access in with_apic.accesses)
    assert ends > sum(with_apic.interrupts(name)[1][0] for name in ("LOC", "4"))
    assert {access.gpa & -4096 for access in with_apic.accesses} == {LOCAL_APIC, IO_APIC}


def test_a_kernel_that_has_to_measure_the_timer_finds_it_right_and_the_8254_at_pin_2(that_measures):
    assert that_measures.end.reason == "halt"
    assert not re.search("MP-BIOS bug|APIC (calibration|frequency)|panic", that_measures.console)
    count, line = that_measures.interrupts("0")[1]
    assert count > 0
    assert re.fullmatch("IO-APIC +2-edge +timer", line)
    assert that_measures.interrupts("LOC")[1][0] > 100
    initial = [each.value for each in that_measures.accesses if each.gpa == LOCAL_APIC + 0x380]
    assert any(abs(count - 10**9 // 250 // 16) < 250 for count in initial), "ticks of 4 ms, to a thousandth"


def test_without_apics_the_8259s_do_it_all(without_apic):
    assert without_apic.end.reason == "halt"
    assert {count for count, _ in without_apic.interrupts("LOC")} == {0}
    assert re.fullmatch("XT-PIC +timer", without_apic.interrupts("0")[1][1])
    assert without_apic.accesses == []


@pytest.mark.parametrize("boot", ["with_apic", "that_measures", "without_apic"])
def test_the_journal_accounts_for_every_byte_of_code(boot, request):
    made = request.getfixturevalue(boot)
    made.machine.verify()
    assert made.shadow.surprises == made.shadow.differences() == []
