"""Page-modification logging (SDM vol. 3, 29.3.6)."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny import CODE, DATA, END, PAGE, STACK, map_page

from vmm.ept import PROFILES, Capabilities, EptProfile, ExtendedPageTables, PageModificationLog, Permission
from vmm.errors import OptionError
from vmm.exits import EptViolation, PageModificationLogFull, Vmcall
from vmm.guest.manifest import CpuSpec, Limits, Schedule
from vmm.machine import RunOptions
from vmm.records import LogEntry

LOGGING = PROFILES["page-modification-log"]
OPTIONS = RunOptions(ept=LOGGING, check=True, audit=True)
#: The pages of a tiny guest's data.
PAGES = [DATA + i * PAGE for i in range(4)]
MAPS = (map_page(CODE, CODE), map_page(DATA, DATA, "rw", pages=4), map_page(STACK - PAGE, STACK - PAGE, "rw"))


def build(source, **more):
    return tiny.build(source, maps=MAPS, **{"options": OPTIONS, **more})


def logged(made):
    """What the log says of the data pages."""
    return [gpa for gpa in made.machine.ept.log.pages if gpa in PAGES]


class TestTheLog:
    @given(st.lists(st.integers(0, (1 << 48) - 1), max_size=512))
    def test_addresses_go_from_entry_511_down_and_lose_their_low_bits(self, gpas):
        log = PageModificationLog()
        for count, gpa in enumerate(gpas):
            assert (log.index, log.is_full) == (511 - count, False)
            log.add(gpa)
            assert log.entries[511 - count] == gpa & ~0xFFF
        assert log.pages == tuple(gpa & ~0xFFF for gpa in gpas)

    def test_after_entry_0_the_index_is_ffff(self):
        log = PageModificationLog()
        for count in range(512):
            log.add(count * PAGE)
        assert (log.index, log.is_full, log.pages[-1]) == (0xFFFF, True, 511 * PAGE)

    @pytest.mark.parametrize("index", [512, 0x8000, 0xFFFF])
    def test_any_index_out_of_0_to_511_means_full(self, index):
        log = PageModificationLog()
        log.index = index
        assert log.is_full

    @pytest.mark.parametrize("index", [-1, 1 << 16])
    def test_the_index_has_16_bits(self, index):
        with pytest.raises(OptionError):
            PageModificationLog().index = index


class TestWhatIsLogged:
    def test_the_page_whose_dirty_flag_goes_from_0_to_1_and_only_then(self):
        made = build(f"mov [{DATA + 8}], al; mov [{DATA + 16}], al; mov bl, [{DATA + PAGE}]\n{END}")
        made.run()
        assert logged(made) == [DATA]

    def test_a_store_to_code_that_is_stepped(self):
        made = build(f"mov byte ptr [{CODE + 0x800}], 1\n{END}")
        made.run()
        assert CODE in made.machine.ept.log.pages

    def test_accesses_to_the_guests_paging_structures(self):
        """With accessed and dirty flags on they are writes (29.3.5), so that they set dirty flags."""
        made = build(END)
        made.run()
        assert made.machine.vcpu.context.cr3 in made.machine.ept.log.pages

    def test_what_event_delivery_pushes(self):
        made = build("int3", idt=DATA)  # no gate: a triple fault, with nothing pushed
        made.run()
        assert STACK - PAGE not in made.machine.ept.log.pages
        gate = CODE + 0x100
        idt = bytes(3 * 16) + (gate & 0xFFFF).to_bytes(2, "little") + b"\x08\0\0\x8e\1\0" + bytes(8)
        made = build({CODE: "int3", gate: END, DATA: idt}, code=(CODE, gate), idt=DATA)
        assert made.run().reason == "port"
        assert STACK - PAGE in made.machine.ept.log.pages

    def test_the_page_of_the_access_in_a_large_page_once(self):
        ept = ExtendedPageTables(EptProfile(accessed_dirty=True, page_modification_log=True))
        ept.map(0, 0, Permission.R | Permission.W, size=2 << 20)
        ept.translate(5 * PAGE)
        ept.dirty(5 * PAGE + 7)
        assert ept.log.pages == (5 * PAGE,)

    @pytest.mark.parametrize("profile", [PROFILES["accessed-dirty"], EptProfile(page_modification_log=True)], ids=str)
    def test_nothing_without_either_control(self, profile):
        made = build(f"mov [{DATA}], al\n{END}", options=RunOptions(ept=profile))
        assert made.machine.ept.log is None
        made.run()
        with pytest.raises(OptionError, match="nothing is logged"):
            made.machine.drain_log()

    def test_a_processor_without_it_cannot_have_it_enabled(self):
        with pytest.raises(OptionError, match="page_modification_log"):
            EptProfile(capabilities=Capabilities(page_modification_log=False), page_modification_log=True)


ACCESSES = {
    "write": f"mov dword ptr [{DATA}], 0x1234",
    "read": f"mov ecx, [{DATA}]",
    "read and write": f"inc dword ptr [{DATA}]",
    "two pages": f"mov qword ptr [{DATA + PAGE - 4}], -1",
    "push": f"mov esp, {DATA + 8}; push rax",
}


class TestFull:
    @pytest.mark.parametrize("access", ACCESSES)
    @pytest.mark.parametrize("single_step", [False, True])
    def test_the_access_exits_and_does_not_happen(self, access, single_step):
        """Also one that has an accessed flag to set only."""
        made = build(f"{ACCESSES[access]}\n{END}", options=RunOptions(ept=LOGGING, single_step=single_step))
        machine = made.machine
        self.fill(machine)
        seen = []

        @machine.on(PageModificationLogFull)
        def full(exit_):
            flags = [(machine.ept.entry(page).accessed, machine.ept.entry(page).dirty) for page in PAGES[:2]]
            seen.append((exit_.qualification, machine.read(DATA, 2 * PAGE), flags))
            machine.drain_log()
            return True

        assert made.run().reason == "port"
        assert len(seen) == 1
        assert seen[0] == (0, bytes(2 * PAGE), [(False, False), (False, False)])

    @pytest.mark.parametrize("single_step", [False, True])
    def test_also_if_only_the_dirty_flag_is_to_be_set(self, single_step):
        source = f"mov ecx, [{DATA}]; vmcall; mov dword ptr [{DATA}], 0x1234\n{END}"
        made = build(source, options=RunOptions(ept=LOGGING, single_step=single_step))
        machine, seen = made.machine, []
        machine.on(Vmcall)(lambda _: setattr(machine.ept.log, "index", 0xFFFF))

        @machine.on(PageModificationLogFull)
        def full(_exit):
            entry = machine.ept.entry(DATA)
            seen.append((entry.accessed, entry.dirty, machine.read(DATA, 4)))

        machine.run()
        assert seen == [(True, False, bytes(4))]
        assert machine.read(DATA, 2) == b"\x34\x12"

    def fill(self, machine):
        """Have every flag set that the code needs, then no room."""

        @machine.on(EptViolation)
        def never(_violation):
            raise AssertionError

        ept = machine.ept
        system = machine.guest.manifest.machine.memory
        pages = [CODE, *range(1 << 21, (1 << 21) + 0x20000, PAGE)]
        for page in [gpa for gpa in pages if ept.host_page(gpa) is not None]:
            for level in (4, 3, 2, 1):
                ept.write_entry(page, level, ept.read_entry(page, level) | 1 << 8 | (1 << 9 if level == 1 else 0))
        assert system < 1 << 21
        ept.log.index = 0xFFFF

    def test_nothing_that_sets_no_flag_exits(self):
        made = build(END)
        self.fill(made.machine)
        made.run()
        assert made.of(PageModificationLogFull) == []

    def test_without_a_handler_the_log_is_read_and_the_guest_goes_on(self):
        made = build(f"mov dword ptr [{DATA}], 7\nmov eax, [{DATA}]\n{END}")
        made.machine.ept.log.index = 0
        assert made.run().detail["value"] == 7
        found = made.of(PageModificationLogFull)
        assert len(found) == 1
        assert found[0].reason == 62
        pages = [entry.gpa for entry in made.of(LogEntry)]
        assert pages.count(DATA) == 1

    def test_a_handler_that_makes_no_room_is_asked_again_until_the_limit(self):
        made = build(f"mov [{DATA}], al\n{END}", limits=Limits(exits=50))
        made.machine.ept.log.index = 0xFFFF
        made.machine.on(PageModificationLogFull)(lambda _: True)
        assert made.run().reason == "exits"

    def test_in_the_middle_of_event_delivery(self):
        gate = CODE + 0x100
        idt = bytes(3 * 16) + (gate & 0xFFFF).to_bytes(2, "little") + b"\x08\0\0\x8e\1\0" + bytes(8)
        made = build({CODE: "int3", gate: "mov eax, 9\n" + END, DATA: idt}, code=(CODE, gate), idt=DATA)
        self.fill(made.machine)
        assert made.run().detail["value"] == 9
        assert len(made.of(PageModificationLogFull)) >= 1


class TestDrained:
    def test_pages_are_logged_again_once_their_flags_are_clean(self):
        source = f"mov [{DATA}], al; vmcall; mov [{DATA}], al; vmcall; mov [{DATA}], al\n{END}"
        made = build(source)
        rounds = []

        @made.machine.on(Vmcall)
        def drain(_exit):
            clean = not rounds
            rounds.append([gpa for gpa in made.machine.drain_log(clean=clean) if gpa in PAGES])

        made.run()
        assert rounds == [[DATA], [DATA]]
        assert logged(made) == []

    def test_records_are_of_every_page_once_the_rest_at_the_end(self):
        made = build(f"mov [{DATA}], al; vmcall; mov [{DATA + PAGE}], al\n{END}")
        made.machine.on(Vmcall)(lambda _: made.machine.drain_log() and None)
        made.run()
        entries = made.of(LogEntry)
        assert [entry.gpa for entry in entries if entry.gpa in PAGES] == [DATA, DATA + PAGE]
        assert entries[-1].index == 511 - (len(made.machine.ept.log.pages) - 1)


SECOND = CODE + 0x800
#: Where vCPU 0 tells that it is done.
FLAG = DATA + 3 * PAGE
WAIT = f"wait: cmp byte ptr [{FLAG}], 1; jne wait\n"


class TestSeveralVcpus:
    """The PML address and the PML index are fields of the VMCS (25.6.14): each vCPU has its own log."""

    def build(self, first, second, **more):
        made = build(
            {CODE: first, SECOND: second},
            others=[CpuSpec(SECOND, 0, 3, {"rsp": STACK - 0x800})],
            schedule=Schedule(7, 5),
            **more,
        )
        assert len(made.machine.vcpus) == 2
        return made

    def logged(self, made, vcpu):
        return [gpa for gpa in made.machine.log(vcpu).pages if gpa in PAGES]

    @pytest.mark.parametrize("single_step", [False, True])
    def test_who_sets_a_dirty_flag_has_the_page_in_its_log(self, single_step):
        """Flags are shared, in the EPT's entries: what the other one has written before is not logged again."""
        first = f"mov [{DATA}], al; mov [{DATA + PAGE}], al; mov byte ptr [{FLAG}], 1; hlt"
        second = WAIT + f"mov [{DATA + PAGE}], al; mov [{DATA + 2 * PAGE}], al\n{END}"
        made = self.build(first, second, options=RunOptions(ept=LOGGING, check=True, single_step=single_step))
        assert made.run().reason == "port"
        assert [self.logged(made, vcpu) for vcpu in (0, 1)] == [[DATA, DATA + PAGE, FLAG], [DATA + 2 * PAGE]]
        told = [(entry.vcpu, entry.gpa) for entry in made.of(LogEntry) if entry.gpa in PAGES]
        assert told == [(0, DATA), (0, DATA + PAGE), (0, FLAG), (1, DATA + 2 * PAGE)]
        assert made.end.vcpu == 1

    @pytest.mark.parametrize("single_step", [False, True])
    @pytest.mark.parametrize("full", [0, 1])
    def test_the_one_whose_log_is_full_exits_and_the_other_goes_on(self, full, single_step):
        first = f"mov [{DATA}], al; mov byte ptr [{FLAG}], 1; hlt"
        second = WAIT + f"mov [{DATA + PAGE}], al; mov [{DATA + 2 * PAGE}], al\n{END}"
        made = self.build(first, second, options=RunOptions(ept=LOGGING, single_step=single_step))
        made.machine.log(full).index = 0xFFFF
        drained = []

        @made.machine.on(PageModificationLogFull)
        def drain(exit_):
            drained.append(exit_.vcpu)
            made.machine.drain_log()
            return True

        assert made.run().reason == "port"
        assert drained == [full]
        assert [self.logged(made, vcpu) for vcpu in (0, 1)] == [[DATA, FLAG], [DATA + PAGE, DATA + 2 * PAGE]]

    def test_without_a_handler_only_the_full_one_is_read(self):
        made = self.build(f"mov byte ptr [{FLAG}], 1; hlt", WAIT + f"mov [{DATA}], al\n{END}")
        made.machine.log(1).index = 0xFFFF
        made.run()
        assert [each.vcpu for each in made.of(PageModificationLogFull)] == [1]
        assert self.logged(made, 0) == [FLAG]

    def test_the_host_drains_the_one_that_it_names_or_that_of_the_vcpu_at_work(self):
        first = f"mov [{DATA}], al; mov byte ptr [{FLAG}], 1; hlt"
        made = self.build(first, WAIT + f"mov [{DATA + PAGE}], al; vmcall\n{END}")
        found = []

        @made.machine.on(Vmcall)
        def drain(_exit):
            machine = made.machine
            assert machine.ept.log is machine.log(1) is machine.log()
            both = machine.drain_log(), machine.drain_log(vcpu=0)
            found.extend([gpa for gpa in pages if gpa in PAGES] for pages in both)

        made.run()
        assert found == [[DATA + PAGE], [DATA, FLAG]]
        assert [made.machine.log(vcpu).index for vcpu in (0, 1)] == [511, 511]

    def test_cleaned_pages_are_logged_by_whoever_writes_them_next(self):
        first = f"mov [{DATA}], al; mov byte ptr [{FLAG}], 1; hlt"
        made = self.build(first, WAIT + f"mov [{DATA}], al; vmcall; mov [{DATA}], al\n{END}")
        made.machine.on(Vmcall)(lambda _: made.machine.drain_log(vcpu=0, clean=True) and None)
        made.run()
        assert [self.logged(made, vcpu) for vcpu in (0, 1)] == [[], [DATA]]

    def test_in_other_views_too(self):
        """A view that is added in the middle of a run logs for the vCPU at work as well."""
        first = f"mov [{DATA}], al; mov byte ptr [{FLAG}], 1; hlt"
        made = self.build(first, WAIT + f"vmcall; mov [{DATA}], al\n{END}")

        @made.machine.on(Vmcall)
        def switch(_exit):
            made.machine.drain_log(vcpu=0, clean=True)
            made.machine.views.switch(made.machine.views.add(), vcpu=1)

        made.run()
        assert [self.logged(made, vcpu) for vcpu in (0, 1)] == [[], [DATA]]

    @pytest.mark.parametrize("vcpu", [-1, 2])
    def test_there_is_none_of_a_vcpu_that_there_is_not(self, vcpu):
        made = self.build("hlt", "hlt")
        for act in (made.machine.log, lambda number: made.machine.drain_log(vcpu=number)):
            with pytest.raises(OptionError, match="there are 2, counted from 0"):
                act(vcpu)
