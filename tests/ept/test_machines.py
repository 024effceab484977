"""Machines with other processors than the default one, and with EPT entries that their hosts have changed."""

from __future__ import annotations

import pytest
import tiny
from tiny import CODE, DATA, END, PAGE, map_page

from vmm.cpu.events import Event, EventType, Vector
from vmm.ept import PROFILES, Capabilities, EptProfile, Permission
from vmm.exits import EptMisconfiguration, EptViolation, ExceptionExit
from vmm.machine import Machine, RunOptions

FLAGS = PROFILES["accessed-dirty"]
GUESTS = ("alias-patch", "patch-self", "three-aliases", "decrypt", "read-code", "protected-mode", "mid-fault")
OTHERS = {
    **PROFILES,
    "everything": EptProfile(
        capabilities=Capabilities(advanced_information=True), accessed_dirty=True, mode_based_execute=True
    ),
    "no execute-only": EptProfile(capabilities=Capabilities(execute_only=False)),
    "flags, no execute-only": EptProfile(capabilities=Capabilities(execute_only=False), accessed_dirty=True),
}


def final_state(name: str, profile: EptProfile, *, single_step: bool = False):
    machine = Machine.from_manifest(name, RunOptions(ept=profile, check=True, single_step=single_step))
    with machine:
        end = machine.run()
        memory = machine.read(0, machine.guest.manifest.machine.memory)
        return end, machine.register("rax"), machine.vcpu.context.registers(), memory, bytes(machine.console.output)


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_ends_the_same_on_every_processor(name):
    wanted = final_state(name, PROFILES["default"])
    assert wanted[0].reason in ("port", "halt")
    for profile in OTHERS.values():
        assert final_state(name, profile) == wanted
    assert final_state(name, OTHERS["everything"], single_step=True) == wanted


def test_without_execute_only_translations_code_is_readable():
    made = tiny.build(f"mov al, [{CODE}]\n{END}", options=RunOptions(ept=OTHERS["no execute-only"], check=True))
    assert str(made.machine.ept.entry(CODE).permissions) == "r-x"
    assert made.run().detail["value"] == made.machine.read(CODE, 1)[0]
    assert made.violations == []


def test_memory_is_mapped_with_large_pages_until_a_frame_in_them_becomes_another():
    machine = Machine.from_manifest("alias-patch")
    assert machine.guest.manifest.machine.memory < 2 << 20  # too small for any
    assert machine.ept.entry(0).page_size == PAGE


class TestEntriesThatTheHostHasChanged:
    def test_an_entry_above_that_forbids_an_access_ends_the_run_unless_it_is_mended(self):
        made = tiny.build(f"mov al, 7\nmov [{DATA}], al\n{END}")
        ept = made.machine.ept
        entry = ept.read_entry(DATA, 2)
        ept.write_entry(DATA, 2, entry & ~2)
        end = made.run()
        assert (end.reason, end.detail) == ("EPT violation", {"gpa": DATA, "gva": DATA})
        assert [hex(v.qualification) for v in made.violations] == ["0x18a"]

        made = tiny.build(f"mov al, 7\nmov [{DATA}], al\n{END}")
        ept = made.machine.ept
        ept.write_entry(DATA, 2, ept.read_entry(DATA, 2) & ~2)

        @made.machine.on(EptViolation)
        def mend(violation):
            ept.write_entry(violation.gpa, 2, ept.read_entry(violation.gpa, 2) | 2)
            made.machine.invept()
            return True

        assert made.run().detail["value"] == 7

    @pytest.mark.parametrize("cpl", [0, 3])
    def test_also_one_that_forbids_only_fetches_from_user_mode_addresses(self, cpl):
        made = tiny.build(END, options=RunOptions(ept=OTHERS["mode-based-execute"], check=True), cpl=cpl)
        ept = made.machine.ept
        ept.write_entry(CODE, 2, ept.read_entry(CODE, 2) & ~(1 << 10))
        assert made.run().reason == "EPT violation"
        assert [hex(v.qualification) for v in made.violations] == ["0x1a4"]

    def test_the_address_of_a_misconfiguration_is_exact(self):
        made = tiny.build(f"mov al, 7\nmov [{DATA + 0x123}], al\n{END}")
        made.machine.protect(DATA, PAGE, Permission.W)
        assert made.run().detail == {"gpa": DATA + 0x123}

    @pytest.mark.parametrize("raw", [0, 0b010, 0b111 | 7 << 3])
    def test_events_are_not_delivered_through_a_page_that_the_ept_does_not_have(self, raw):
        made = tiny.build(f"ud2\n{END}", idt=DATA)
        made.machine.ept.write_entry(DATA, 1, raw)
        assert made.run().reason == "unmapped memory"

    def test_nor_through_page_tables_that_it_does_not_have(self):
        """As a guest can have them for itself: an IDT whose page tables lie where there is no memory."""
        made = tiny.build(f"ud2\n{END}", idt=0x80_0000_0000, maps=(map_page(0x80_0000_0000, DATA),))
        cr3 = made.machine.vcpu.context.cr3
        table = int.from_bytes(made.machine.read(cr3 + 8, 8), "little") & -PAGE & (1 << 40) - 1
        made.machine.ept.unmap(table)
        assert made.run().reason == "unmapped memory"


class TestAccessedAndDirtyFlags:
    """SDM vol. 3, 29.3.5."""

    def flags(self, machine, gpa):
        entry = machine.ept.entry(gpa)
        return "A" * entry.accessed + "D" * bool(entry.dirty)

    def test_a_is_set_by_the_first_use_and_d_by_the_first_write(self):
        seen = []
        made = tiny.build(
            f"vmcall\nmov al, [{DATA}]\nvmcall\nmov al, [{DATA}]\nmov [{DATA}], al\nvmcall\n{END}",
            options=RunOptions(ept=FLAGS, check=True),
        )
        machine = made.machine

        def look(record):
            if getattr(record, "reason", None) == 18:
                seen.append(self.flags(machine, DATA))

        machine.observe(look)
        made.run()
        assert seen == ["", "A", "AD"]
        assert [machine.ept.read_entry(DATA, level) >> 8 & 1 for level in (4, 3, 2)] == [1, 1, 1]
        assert self.flags(machine, CODE) == "A"
        assert self.flags(machine, 0x80000) == ""

    def test_the_engines_tlb_hides_no_write_after_the_host_has_cleared_d(self):
        made = tiny.build(
            f"mov ecx, 3\nagain:\nmov [{DATA}], ecx\nvmcall\nmov al, [{DATA}]\ndec ecx\njnz again\n{END}",
            options=RunOptions(ept=FLAGS, check=True),
        )
        machine, seen = made.machine, []

        def clear(record):
            if getattr(record, "reason", None) == 18:
                seen.append(self.flags(machine, DATA))
                machine.ept.write_entry(DATA, 1, machine.ept.read_entry(DATA, 1) & ~(3 << 8))
                machine.invept()

        machine.observe(clear, acts=True)
        made.run()
        assert seen == ["AD", "AD", "AD"]
        assert self.flags(machine, DATA) == "A"

    def test_what_the_vmm_looks_at_sets_none(self):
        made = tiny.build(f"{END}", options=RunOptions(ept=FLAGS))
        made.machine.write(DATA, b"\x01")
        assert made.machine.read(DATA, 1) == b"\x01"
        made.machine.vcpu.mmu.peek(DATA)
        assert self.flags(made.machine, DATA) == ""

    def test_each_use_of_a_guest_paging_structure_is_a_write(self):
        made = tiny.build(f"{END}", options=RunOptions(ept=FLAGS))
        cr3 = made.machine.vcpu.context.cr3
        made.run()
        assert self.flags(made.machine, cr3) == "AD"

    def test_paging_structures_in_code_frames_are_an_exit_once_and_both_kinds_of_access(self):
        made = tiny.build(f"mov al, [{DATA}]\nmov al, [{CODE}]\n{END}", options=RunOptions(ept=FLAGS, check=True))
        machine = made.machine
        cr3 = machine.vcpu.context.cr3
        machine.protect(cr3, PAGE, Permission.X)
        assert made.run().reason == "port"
        walks = [v for v in made.violations if v.gpa & -PAGE == cr3]
        assert [hex(v.qualification & 0x183) for v in walks] == ["0x83"]


def test_a_handler_may_deliver_an_event_for_a_misconfigured_paging_structure():
    made = tiny.build(f"mov al, [{DATA}]\n{END}")
    machine = made.machine
    cr3 = machine.vcpu.context.cr3
    machine.ept.write_entry(cr3, 1, machine.ept.read_entry(cr3, 1) & ~7 | 2)
    machine.on(EptMisconfiguration)(lambda _exit: Event(Vector.UD, EventType.HARDWARE_EXCEPTION))
    made.run()
    assert [record.gpa & -PAGE for record in made.of(EptMisconfiguration)] == [cr3]
    assert made.of(ExceptionExit) == []
