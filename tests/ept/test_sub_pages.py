"""Sub-page write permissions (SDM vol. 3, 29.3.4)."""

from __future__ import annotations

import pytest
import tiny
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from tiny import DATA, END, PAGE, map_page

from vmm.cpu.engine import WRITE
from vmm.ept import PROFILES, Capabilities, EptProfile, Permission
from vmm.ept.sub_pages import SubPageTable, SubPageVerdict
from vmm.errors import OptionError
from vmm.exits import ExitReason, Mtf, SppEvent
from vmm.machine import RunOptions
from vmm.mmu import Violation

SUB_PAGES = RunOptions(ept=PROFILES["sub-page-write"], check=True, audit=True)
MAPS = (*tiny.BASICS, map_page(DATA + PAGE, DATA + PAGE, "rw"))
ALLOWED, FORBIDDEN = SubPageVerdict.ALLOWED, SubPageVerdict.FORBIDDEN
#: The qualification of a store to a page that may only be read.
STORE = 0x18A

gpas = st.integers(0, (1 << 48) - 1)
levels = st.integers(2, 4)


def build(source, writable, *, options=SUB_PAGES, **more):
    made = tiny.build(f"{source}\n{END}", maps=MAPS, options=options, **more)
    made.machine.protect_sub_pages(DATA, writable)
    return made


class TestTheTable:
    @given(gpas, st.integers(0, (1 << 32) - 1), st.integers(0, 4095))
    def test_bit_2n_of_the_last_entry_is_for_sub_page_n(self, gpa, writable, offset):
        table = SubPageTable(48)
        table.permit(gpa, writable)
        entry = table.read_entry(gpa, 1)
        number = offset // 128
        assert entry >> 2 * number & 1 == writable >> number & 1
        assert entry & 0xAAAAAAAAAAAAAAAA == 0
        assert table.look_up(gpa & -PAGE | offset) is (ALLOWED if writable >> number & 1 else FORBIDDEN)

    @given(gpas, levels)
    def test_an_entry_that_is_not_valid_is_a_miss(self, gpa, level):
        table = SubPageTable(40)
        assert table.look_up(gpa) is SubPageVerdict.MISS
        table.permit(gpa, 0xFFFFFFFF)
        table.write_entry(gpa, level, table.read_entry(gpa, level) & ~1 | 0xFF0)
        assert table.look_up(gpa) is SubPageVerdict.MISS

    @given(gpas, levels, st.integers(1, 63).filter(lambda bit: bit < 12 or bit >= 40))
    def test_a_reserved_bit_of_a_valid_entry_is_a_misconfiguration(self, gpa, level, bit):
        table = SubPageTable(40)
        table.permit(gpa, 0xFFFFFFFF)
        table.write_entry(gpa, level, table.read_entry(gpa, level) | 1 << bit)
        assert table.look_up(gpa) is SubPageVerdict.MISCONFIGURED

    @given(gpas, st.integers(0, 31))
    def test_so_is_an_odd_bit_of_the_last_entry(self, gpa, number):
        table = SubPageTable(40)
        table.permit(gpa, 0xFFFFFFFF)
        table.write_entry(gpa, 1, table.read_entry(gpa, 1) | 2 << 2 * number)
        assert table.look_up(gpa) is SubPageVerdict.MISCONFIGURED

    @given(gpas, gpas, levels)
    def test_no_entry_leads_to_a_table_that_was_not_made_for_its_place(self, gpa, other, level):
        table = SubPageTable(40)
        table.permit(gpa, 1)
        table.permit(other, 1)
        foreign = table.read_entry(other, level)
        if foreign != table.read_entry(gpa, level):
            with pytest.raises(OptionError):
                table.write_entry(gpa, level, foreign)
        with pytest.raises(OptionError):
            table.write_entry(gpa, level, 0xFFFFF001)


STORES = {
    "inside": (f"mov dword ptr [{DATA + 0x80}], 7", True),
    "its last bytes": (f"mov dword ptr [{DATA + 0xFC}], 7", True),
    "before": (f"mov byte ptr [{DATA + 0x7F}], 7", False),
    "behind": (f"mov byte ptr [{DATA + 0x100}], 7", False),
    "over its end": (f"mov dword ptr [{DATA + 0xFE}], 7", False),
    "read and write": (f"lock inc dword ptr [{DATA + 0x90}]", True),
    "sixteen bytes": (f"mov esi, {DATA + 0x80}; movaps [rsi], xmm0", True),
    "string": (f"mov edi, {DATA + 0x80}; mov ecx, 16; rep stosq", True),
    "push": (f"mov esp, {DATA + 0x88}; push rax", True),
}


class TestStores:
    @pytest.mark.parametrize("store", STORES)
    @pytest.mark.parametrize("single_step", [False, True])
    @pytest.mark.parametrize("writes", ["step", "window"])
    def test_only_those_into_sub_pages_that_allow_them_happen_without_an_exit(self, store, single_step, writes):
        source, allowed = STORES[store]
        policy = tiny.Policy(code="load", writes=writes)
        made = build(source, 1 << 1, options=evolve(SUB_PAGES, single_step=single_step), policy=policy)
        assert made.run().reason == "port"
        wanted = [] if allowed else [STORE]
        assert [violation.qualification for violation in made.violations] == wanted
        assert len(made.of(Mtf)) == len(wanted)
        free = tiny.build(f"{source}\n{END}", maps=MAPS)
        free.run()
        assert made.machine.read(DATA, PAGE) == free.machine.read(DATA, PAGE)

    def test_the_page_stays_guarded_whatever_was_let_through(self):
        inside, outside = f"mov byte ptr [{DATA + 0x80}], 1", f"mov byte ptr [{DATA}], 1"
        made = build("; ".join(3 * [inside, outside]), 1 << 1)
        made.run()
        assert len(made.violations) == 3
        entry = made.machine.ept.entry(DATA)
        assert (entry.permissions, entry.sub_page_write) == (Permission.R, True)

    def test_over_two_pages_each_is_judged_for_itself(self):
        made = build(f"mov qword ptr [{DATA + PAGE - 4}], -1", 1 << 31)
        made.machine.protect_sub_pages(DATA + PAGE, 0)
        made.run()
        assert [violation.gpa for violation in made.violations] == [DATA + PAGE]
        assert made.machine.read(DATA + PAGE - 4, 8) == b"\xff" * 8

    def test_only_a_leaf_of_4_kib_with_the_bit_that_allows_reads_is_looked_up(self):
        made = build(f"mov byte ptr [{DATA + 0x80}], 1", 1 << 1)
        ept = made.machine.ept
        ept.write_entry(DATA, 1, ept.read_entry(DATA, 1) & ~(1 << 61))
        made.run()
        assert len(made.violations) == 1

    @pytest.mark.parametrize(("final", "wanted"), [(True, (ALLOWED, DATA)), (False, None)])
    def test_accesses_to_paging_structures_are_not_eligible(self, final, wanted):
        made = build(f"mov byte ptr [{DATA + 0x80}], 1", 1 << 1)
        violation = Violation(DATA, WRITE, DATA, DATA | Permission.R, final=final, needed=2)
        assert made.machine.loop.current.trap.sub_pages.judge(violation) == wanted

    def test_without_the_control_the_bit_is_ignored(self):
        made = tiny.build(f"mov byte ptr [{DATA}], 1\n{END}", maps=MAPS)
        made.machine.protect(DATA, PAGE, Permission.R)
        ept = made.machine.ept
        ept.write_entry(DATA, 1, ept.read_entry(DATA, 1) | 1 << 61)
        made.run()
        assert len(made.violations) == 1
        with pytest.raises(OptionError, match="no sub-page permissions"):
            made.machine.protect_sub_pages(DATA, 1)

    def test_a_processor_without_it_cannot_have_it_enabled(self):
        with pytest.raises(OptionError, match="sub_page_write"):
            EptProfile(capabilities=Capabilities(sub_page_write=False), sub_page_write=True)

    def test_a_guarded_frame_that_becomes_code_is_never_writable(self):
        source = f"mov eax, {DATA + 0x80}; mov word ptr [rax], 0xc390; call rax; mov byte ptr [rax], 0xc3; call rax"
        made = tiny.build(f"{source}\n{END}", maps=(*MAPS, map_page(DATA, DATA)), options=SUB_PAGES)
        made.machine.protect_sub_pages(DATA, 1 << 1)
        assert made.run().reason == "port"
        assert [(m.gpa, m.old, m.new) for m in made.modifications] == [(DATA + 0x80, b"\x90", b"\xc3")]
        made.machine.verify()

    @pytest.mark.parametrize(("gpa", "writable"), [(DATA + 8, 1), (DATA, 1 << 32), (DATA, -1), (1 << 40, 1)])
    def test_what_no_page_has_is_refused(self, gpa, writable):
        with pytest.raises(OptionError):
            build("nop", 0).machine.protect_sub_pages(gpa, writable)


class TestEvents:
    """Exits 66: bit 11 of the qualification tells a miss from a misconfiguration."""

    def spoil(self, made, *, miss):
        table = made.machine.ept.sub_pages
        entry = table.read_entry(DATA, 3)
        table.write_entry(DATA, 3, entry & ~1 if miss else entry | 1 << 5)
        return table, entry

    @pytest.mark.parametrize(("miss", "qualification"), [(True, 1 << 11), (False, 0)])
    @pytest.mark.parametrize("single_step", [False, True])
    def test_the_store_has_not_happened_and_does_when_the_table_is_mended(self, miss, qualification, single_step):
        options = evolve(SUB_PAGES, single_step=single_step)
        made = build(f"mov byte ptr [{DATA + 0x84}], 7", 1 << 1, options=options)
        table, entry = self.spoil(made, miss=miss)
        seen = []

        @made.machine.on(SppEvent)
        def mend(event):
            seen.append((event.reason, event.qualification, event.gpa, event.gva, made.machine.read(DATA + 0x84, 1)))
            table.write_entry(DATA, 3, entry)
            return True

        assert made.run().reason == "port"
        assert seen == [(66, qualification, DATA + 0x84, DATA + 0x84, b"\0")]
        assert made.machine.read(DATA + 0x84, 1) == b"\7"
        assert made.count(ExitReason.EPT_VIOLATION) == 0

    @pytest.mark.parametrize(("miss", "reason"), [(True, "SPP miss"), (False, "SPP misconfiguration")])
    def test_without_a_handler_the_run_ends(self, miss, reason):
        made = build(f"mov byte ptr [{DATA + 0x84}], 7", 1 << 1)
        self.spoil(made, miss=miss)
        end = made.run()
        assert (end.reason, end.detail) == (reason, {"gpa": DATA + 0x84, "gva": DATA + 0x84})
