"""The monitor trap flag, sentence by sentence (SDM vol. 3, 26.5.2)."""

from __future__ import annotations

import pytest
import tiny
from attrs import evolve
from test_events import gate
from tiny import CODE, DATA, PAGE

from vmm.cpu.events import Event, EventType, Vector
from vmm.errors import OptionError
from vmm.exits import EptViolation, ExceptionExit, Exit, ExternalInterrupt, Mtf, Vmcall
from vmm.guest.manifest import CpuSpec
from vmm.machine import RunOptions
from vmm.records import Injection

HANDLER = CODE + 0x400
INTERRUPT = 0x40
PLACE = DATA + 0x900
WAYS = pytest.mark.parametrize("way", ["free", "stepped"])
OPTIONS = {"free": RunOptions(audit=True, check=True), "stepped": RunOptions(single_step=True, check=True)}
#: #DB and the like: RFLAGS.TF from the next instruction on.
TRAP = "pushfq; or dword ptr [rsp], 0x100; popfq\n"
#: The handler clears TF in the flags that it returns to.
HANDLE = "and dword ptr [rsp + 16], ~0x100; iretq"


def build(code: str, *, way: str = "free", handler: str = HANDLE, start: bool = True, **rest):
    """The guest executes VMCALL and ``code``; the flag is on from the VMCALL until the byte at the end port."""
    made = tiny.build(
        {
            CODE: "vmcall\n" + code + f"\nmov al, 0\n{tiny.END}",
            HANDLER: tiny.assemble(handler.replace("~0x100", "-0x101"), HANDLER),
            DATA: gate(HANDLER) * (INTERRUPT + 1),
        },
        options=OPTIONS[way],
        code=(CODE, HANDLER),
        idt=DATA,
        **rest,
    )

    @made.machine.on(Vmcall)
    def begin(_):
        if start:
            made.machine.monitor_trap_flag()

    return made


def run(code: str, **rest):
    made = build(code, **rest)
    assert made.run().reason == "port"
    return made


def story(made, *, until=None) -> list:
    """Exits and injections behind the first VMCALL, in short: ("MTF", where), …; ``until`` a linear address."""
    words = []
    records = [record for record in made.records if isinstance(record, Exit | Injection)][1:]
    for record in records:
        name = "injection" if isinstance(record, Injection) else record.reason.name
        if until is not None and record.rip == until:
            break
        words.append((name, record.rip))
    return words


def at(*lengths: int) -> list[int]:
    """Addresses behind VMCALL and each instruction of these lengths."""
    found, here = [], CODE + 3
    for length in lengths:
        here += length
        found.append(here)
    return found


@WAYS
class TestInstructions:
    def test_an_exit_comes_after_every_instruction(self, way):
        made = run("nop; xor ecx, ecx; nop; jmp 0x10030\n" + "nop\n" * 64, way=way)
        assert story(made)[:4] == [("MTF", where) for where in (CODE + 4, CODE + 6, CODE + 7, 0x10030)]

    def test_also_after_the_one_that_opens_a_shadow(self, way):
        made = run("mov ecx, ss; mov ss, ecx; nop; sti; nop\n", way=way)
        assert story(made)[:5] == [("MTF", where) for where in at(2, 2, 1, 1, 1)]

    def test_after_one_iteration_of_a_rep(self, way):
        made = run(f"mov ecx, 3; mov edi, {PLACE}; rep stosb; nop\n", way=way)
        here = CODE + 13
        assert story(made)[2:6] == [("MTF", here), ("MTF", here), ("MTF", here + 2), ("MTF", here + 3)]
        assert made.machine.register("rcx") == 0

    def test_until_the_host_switches_it_off(self, way):
        made = build("nop\n" * 10, way=way)
        made.machine.on(Mtf)(lambda found: made.machine.monitor_trap_flag(on=found.rip < CODE + 8))
        made.run()
        assert [found.rip for found in made.of(Mtf)] == list(range(CODE + 4, CODE + 9))

    def test_only_one_for_an_instruction_that_the_trap_steps_anyway(self, way):
        made = run(f"mov byte ptr [{CODE + PAGE - 1:#x}], 0x90; nop\n" + "nop\n" * 4, way=way)
        assert story(made)[:3] == [("EPT_VIOLATION", CODE + 3), ("MTF", CODE + 10), ("MTF", CODE + 11)]


@WAYS
class TestEvents:
    def test_a_fault_is_followed_by_an_exit_behind_its_delivery(self, way):
        made = run("ud2; nop\n", way=way, handler="add qword ptr [rsp], 2; iretq")
        assert story(made)[:5] == [
            ("EXCEPTION_OR_NMI", CODE + 3),
            ("injection", HANDLER),
            ("MTF", HANDLER),
            ("MTF", HANDLER + 5),
            ("MTF", CODE + 5),
        ]

    def test_a_fault_in_the_first_iteration_of_a_rep_is_no_different(self, way):
        made = build("mov ecx, 2; mov edi, 0x900000; rep stosb", way=way)
        made.machine.on(ExceptionExit)(lambda _: made.machine.monitor_trap_flag())
        made.machine.on(Mtf)(lambda found: made.machine.stop() if found.rip == HANDLER else None)
        made.run()
        assert story(made)[2:5] == [("EXCEPTION_OR_NMI", CODE + 13), ("injection", HANDLER), ("MTF", HANDLER)]

    @pytest.mark.parametrize("instruction", ["int 0x20", "int3"])
    def test_a_software_interrupt_is_too(self, instruction, way):
        made = run(f"{instruction}; nop\n", way=way)
        words = [word for word in story(made) if word[0] != "EXCEPTION_OR_NMI"]
        assert words[:2] == [("injection", HANDLER), ("MTF", HANDLER)]

    def test_an_injected_event_is_too(self, way):
        made = build("nop\n" * 3, way=way)
        made.machine.on(Vmcall)(lambda _: made.machine.inject(Event(0x20, EventType.EXTERNAL_INTERRUPT)))
        made.run()
        assert story(made)[:2] == [("injection", HANDLER), ("MTF", HANDLER)]

    def test_an_interrupt_is_too_and_comes_after_the_exit_at_its_boundary(self, way):
        made = build("sti\n" + "nop\n" * 4, way=way)

        @made.machine.on(Mtf)
        def raise_it(found):
            if found.rip == CODE + 5 and not made.of(ExternalInterrupt):
                made.machine.interrupt(INTERRUPT)

        made.run()
        assert story(made)[1:5] == [
            ("MTF", CODE + 5),
            ("EXTERNAL_INTERRUPT", CODE + 5),
            ("injection", HANDLER),
            ("MTF", HANDLER),
        ]
        assert [found.vector for found in made.of(ExternalInterrupt)] == [INTERRUPT]

    def test_an_interrupt_that_is_masked_keeps_nobody_waiting(self, way):
        made = build("cli\n" + "nop\n" * 3, way=way)
        made.machine.on(Vmcall)(lambda _: made.machine.interrupt(INTERRUPT))
        assert made.run().reason == "port"
        assert story(made)[:2] == [("MTF", CODE + 4), ("MTF", CODE + 5)]


@WAYS
class TestPriorities:
    def test_mtf_comes_before_a_debug_trap(self, way):
        made = run(TRAP + "nop\n", way=way)
        trapped = CODE + 3 + len(tiny.assemble(TRAP)) + 1
        words = story(made)
        first = words.index(("EXCEPTION_OR_NMI", trapped))
        assert words[first - 1 : first + 3] == [
            ("MTF", trapped),
            ("EXCEPTION_OR_NMI", trapped),
            ("injection", HANDLER),
            ("MTF", HANDLER),
        ]
        assert [found.vector for found in made.of(ExceptionExit)] == [Vector.DB]

    def test_the_exit_of_a_trapped_store_comes_before_its_debug_trap(self, way):
        made = run(TRAP + f"mov byte ptr [{CODE + PAGE - 1:#x}], 0x90\n", way=way, start=False)
        assert [name for name, _ in story(made)][:4] == ["EPT_VIOLATION", "MTF", "EXCEPTION_OR_NMI", "injection"]

    @pytest.mark.parametrize("instruction", ["cpuid", "rdtsc", "in al, 0x40", "out 0x41, al", "vmcall"])
    def test_an_earlier_exit_cancels_it(self, instruction, way):
        made = run(f"{instruction}\nnop\n", way=way)
        (name, _), second = story(made)[:2]
        assert name not in ("MTF", "injection")
        assert second == ("MTF", CODE + 3 + len(tiny.assemble(instruction)) + 1)

    def test_an_ept_violation_cancels_it_and_the_instruction_starts_again(self, way):
        made = build(f"mov byte ptr [{CODE + PAGE - 1:#x}], 0x90; nop\n", way=way)
        seen = []

        @made.machine.on(EptViolation)
        def once(found):
            seen.append(found.rip)
            return True if len(seen) == 1 else None

        made.run()
        assert story(made)[:3] == [("EPT_VIOLATION", CODE + 3), ("EPT_VIOLATION", CODE + 3), ("MTF", CODE + 10)]


@WAYS
class TestPendingExit:
    def test_is_injected_whatever_the_control_says(self, way):
        made = build("nop; nop\n", way=way, start=False)
        made.machine.on(Vmcall)(lambda _: made.machine.inject(Event(0, EventType.OTHER_EVENT)))
        made.run()
        assert [found for found in story(made) if found[0] == "MTF"] == [("MTF", CODE + 3)]

    def test_and_comes_in_the_place_of_an_access(self, way):
        made = build(f"mov byte ptr [{CODE + PAGE - 1:#x}], 0x90\n", way=way, start=False)
        seen = []

        @made.machine.on(EptViolation)
        def once(found):
            seen.append(found.rip)
            return Event(0, EventType.OTHER_EVENT) if len(seen) == 1 else None

        made.run()
        assert story(made)[:3] == [("EPT_VIOLATION", CODE + 3), ("MTF", CODE + 3), ("EPT_VIOLATION", CODE + 3)]


def test_a_pending_exit_has_vector_0():
    with pytest.raises(OptionError, match="vector"):
        Event(1, EventType.OTHER_EVENT)


@pytest.mark.parametrize("vcpu", [-1, 1])
def test_a_vcpu_that_there_is_not(vcpu):
    with pytest.raises(OptionError, match="vCPU"):
        build("nop").machine.monitor_trap_flag(vcpu)


def test_each_vcpu_has_a_flag_of_its_own():
    other = CODE + 0x800
    made = tiny.build(
        {CODE: "nop\n" * 20 + f"mov al, 0\n{tiny.END}", other: f"nop; nop; jmp {other:#x}"},
        options=evolve(OPTIONS["free"], seed=3),
        others=[CpuSpec(other, 0, 0, {"rsp": DATA + 0x800})],
    )
    made.machine.monitor_trap_flag(1)
    made.run()
    assert {found.vcpu for found in made.of(Mtf)} == {1}
