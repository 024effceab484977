"""Strict staleness together with views, the page-modification log, sub-page permissions, #VE and several vCPUs.

Rules are those of the SDM, vol. 3, 29.4: mappings are tagged with the EPTRTA, so that each view has its own; EPTP
switching invalidates nothing; INVLPG and INVVPID are about all EPTRTAs, a single-context INVEPT about one.
"""

from __future__ import annotations

import struct

import pytest
import tiny
from attrs import evolve
from tiny import CODE, STACK
from tlb_machine import (
    DATA,
    OTHER_PLACE,
    PAGE_UNDER_TEST,
    PAGING,
    PLACE,
    PRESENT,
    TABLE,
    WRITABLE,
    build,
    entry,
    stale,
)

from vmm.ept import PROFILES, EptProfile, Permission
from vmm.exits import EptViolation, Vmcall
from vmm.guest.manifest import CpuSpec
from vmm.machine import RunOptions
from vmm.records import Injection

NONE, R, RW = Permission.NONE, Permission.R, Permission.R | Permission.W
PAGE, ENTRY, FREE_TABLE, SIZE = PAGE_UNDER_TEST, entry(PAGE_UNDER_TEST), 0x30000, 0x1000
OLD, NEW = 0x11111111, 0x22222222
READ, READ_AGAIN = f"mov ebx, [{PAGE:#x}]\n", f"mov ecx, [{PAGE:#x}]\n"
WRITE = f"mov dword ptr [{PAGE:#x}], 5\n"
ELSEWHERE = f"mov dword ptr [{ENTRY:#x}], {OTHER_PLACE | PRESENT | WRITABLE:#x}\n"
VMCALL = "vmcall\n"
FUNCTIONS = EptProfile(vm_functions=True, virtualization_exceptions=True)
LOGGING = PROFILES["page-modification-log"]


@pytest.fixture(params=[False, True], ids=["free", "stepped"])
def options(request):
    return RunOptions(check=True, audit=True, tlb="strict", ept=FUNCTIONS, single_step=request.param)


def vmfunc(view: int) -> str:
    return f"mov eax, 0\nmov ecx, {view}\n.byte 0x0f, 0x01, 0xd4\n"


def with_views(source: str, options: RunOptions, *acts, **rest) -> tiny.Tiny:
    """A guest with two views; at its VMCALLs the host does what is given, in order."""
    made = build(source, options=options, **rest)
    views = made.machine.views
    views.add()
    views.set_eptp_list([views.ept(0).eptp, views.ept(1).eptp])
    todo = list(acts)
    made.machine.on(Vmcall)(lambda _: todo.pop(0)(made.machine) and None)
    return made


def run(made: tiny.Tiny) -> tiny.Tiny:
    assert made.run().reason == "port"
    return made


def violations(made: tiny.Tiny, gpa: int) -> list[EptViolation]:
    return [each for each in made.violations if each.gpa & -SIZE == gpa]


def lead_elsewhere(machine, view):
    """The host changes an entry of a view, and does not invalidate."""
    ept = machine.views.ept(view)
    ept.write_entry(PLACE, 1, ept.read_entry(OTHER_PLACE, 1))


class TestViews:
    def test_each_view_has_mappings_of_its_own_and_switching_drops_none(self, options):
        source = READ + vmfunc(1) + ELSEWHERE + f"mov edx, [{PAGE:#x}]\n" + vmfunc(0) + READ_AGAIN
        made = run(with_views(source, options))
        found = [made.machine.register(name) for name in ("rbx", "rdx", "rcx")]
        assert found == [OLD, NEW, OLD]
        assert [(record.view, record.missing) for record in stale(made)] == [(0, "INVLPG")]

    @pytest.mark.parametrize("instruction", [f"invlpg [{PAGE:#x}]", "mov eax, cr3; mov cr3, eax"])
    def test_what_a_guest_invalidates_is_gone_in_all_views(self, options, instruction):
        source = READ + vmfunc(1) + READ + ELSEWHERE + instruction + "\n" + vmfunc(0) + READ_AGAIN
        made = run(with_views(source, options))
        assert made.machine.register("rcx") == NEW
        assert stale(made) == []

    @pytest.mark.parametrize("view", [0, 1])
    def test_a_single_context_invept_is_about_one_view(self, options, view):
        def change(machine):
            for each in (0, 1):
                lead_elsewhere(machine, each)
            machine.invept(machine.views.ept(view).eptp)

        source = READ + vmfunc(1) + READ + VMCALL + f"mov edx, [{PAGE:#x}]\n" + vmfunc(0) + READ_AGAIN
        made = run(with_views(source, options, change))
        assert [(record.view, record.missing) for record in stale(made)] == [(1 - view, "INVEPT")]
        wanted = [OLD, NEW] if view else [NEW, OLD]
        assert [made.machine.register("rcx"), made.machine.register("rdx")] == wanted

    def test_a_change_of_one_view_makes_no_mapping_of_another_stale(self, options):
        made = run(with_views(READ + VMCALL + READ_AGAIN, options, lambda machine: lead_elsewhere(machine, 1)))
        assert stale(made) == []
        assert made.machine.register("rcx") == OLD

    def test_the_record_says_when_the_entry_of_this_view_has_changed(self, options):
        """Not when that of the other view has, at the next exit."""
        made = with_views(
            READ + VMCALL + VMCALL + READ_AGAIN,
            options,
            lambda machine: lead_elsewhere(machine, 0),
            lambda machine: lead_elsewhere(machine, 1),
        )
        (record,) = stale(run(made))
        assert record.to_json().items() >= {"view": 0, "time": 1, "entry": "EPT PTE", "missing": "INVEPT"}.items()

    def test_restrict_and_remap_are_followed_by_an_invept(self, options):
        made = with_views(
            vmfunc(1) + READ + VMCALL + READ_AGAIN + VMCALL + READ_AGAIN,
            options,
            lambda machine: machine.views.remap(1, PLACE, OTHER_PLACE, SIZE),
            lambda machine: machine.views.restrict(1, PLACE, SIZE, NONE),
        )
        made.run()
        assert made.machine.register("rcx") == NEW
        assert made.end.reason == "EPT violation"
        assert stale(made) == []

    def test_which_is_about_that_view_and_hides_no_mistake_in_another(self, options):
        def change(machine):
            machine.protect(PLACE, SIZE, NONE, invalidate=False)
            machine.views.restrict(1, PLACE, SIZE, R)

        made = run(with_views(READ + VMCALL + READ_AGAIN, options, change))
        assert [(record.view, record.missing) for record in stale(made)] == [(0, "INVEPT")]

    @pytest.mark.parametrize("where", ["view", "alias"])
    def test_other_page_tables_in_place_of_the_guests_are_no_mistake_of_the_guest(self, options, where):
        """What was walked through the page goes with the INVEPT after the change."""

        def change(machine):
            machine.write(FREE_TABLE, machine.read(TABLE, SIZE))
            machine.write(FREE_TABLE + ENTRY - TABLE, struct.pack("<I", OTHER_PLACE | PRESENT | WRITABLE))
            if where == "view":
                machine.views.remap(1, TABLE, FREE_TABLE, SIZE)
            else:
                machine.alias(TABLE, FREE_TABLE, SIZE)

        touch = f"mov edi, [{entry(0x70000):#x}]\nmov dword ptr [{entry(0x70000):#x}], 0\n"
        made = run(with_views(vmfunc(1) + READ + VMCALL + touch + READ_AGAIN, options, change))
        assert made.machine.register("rcx") == NEW
        assert stale(made) == []

    def test_the_same_without_invept_is_one_of_the_host(self, options):
        def change(machine):
            machine.write(FREE_TABLE, machine.read(TABLE, SIZE))
            machine.write(FREE_TABLE + ENTRY - TABLE, struct.pack("<I", OTHER_PLACE | PRESENT | WRITABLE))
            ept = machine.views.ept(1)
            ept.write_entry(TABLE, 1, ept.read_entry(FREE_TABLE, 1))

        made = run(with_views(vmfunc(1) + READ + VMCALL + READ_AGAIN, options, change))
        assert made.machine.register("rcx") == OLD
        (record,) = [each for each in stale(made) if each.access == "read"]
        assert (record.entry, record.place, record.missing, record.view) == ("EPT PTE", TABLE, "INVEPT", 1)

    def test_a_large_page_that_a_view_splits_is_no_change(self, options):
        made = with_views(
            vmfunc(1) + READ + VMCALL + READ_AGAIN,
            options,
            lambda machine: machine.views.restrict(1, OTHER_PLACE, SIZE, R),
        )
        assert stale(run(made)) == []


class TestPagingStructures:
    """What the EPT says of the guest's page tables is part of each mapping that was made by them."""

    def test_without_invept_a_mapping_is_used_that_no_walk_would_give(self, options):
        made = build(READ + VMCALL + READ_AGAIN, options=options)
        made.machine.on(Vmcall)(lambda _: made.machine.protect(TABLE, SIZE, NONE, invalidate=False))
        run(made)
        found = {(record.access, record.entry, record.place, record.missing) for record in stale(made)}
        assert found == {("fetch", "EPT PTE", TABLE, "INVEPT"), ("read", "EPT PTE", TABLE, "INVEPT")}
        assert violations(made, TABLE) == []

    def test_with_it_the_next_walk_is_an_ept_violation(self, options):
        made = build(READ + VMCALL + READ_AGAIN, options=options)
        made.machine.on(Vmcall)(lambda _: made.machine.protect(TABLE, SIZE, NONE))
        made.run()
        first = violations(made, TABLE)[0]
        assert first.qualification & 0x1FF == 0x81
        assert stale(made) == []

    def test_a_write_permission_that_no_walk_needs_is_nobodys_business(self, options):
        made = build(READ + VMCALL + READ_AGAIN, options=options)
        made.machine.on(Vmcall)(lambda _: made.machine.protect(TABLE, SIZE, R, invalidate=False))
        assert stale(run(made)) == []

    def test_with_accessed_and_dirty_flags_every_walk_needs_it(self, options):
        options = evolve(options, ept=PROFILES["accessed-dirty"])
        made = build(READ + VMCALL + READ_AGAIN, options=options)
        made.machine.on(Vmcall)(lambda _: made.machine.protect(TABLE, SIZE, R, invalidate=False))
        assert {(record.entry, record.missing) for record in stale(run(made))} == {("EPT PTE", "INVEPT")}

    def test_page_tables_in_a_frame_that_becomes_code_are_the_traps_business(self, options):
        """The guest calls into its page table's page, and changes an entry afterwards."""
        at = TABLE + 0xF00
        code = struct.unpack("<I", bytes.fromhex("c3909090"))[0]
        source = f"mov dword ptr [{at:#x}], {code:#x}\n" + READ + f"call {at:#x}\n" + ELSEWHERE + READ_AGAIN
        made = run(build(source, options=options))
        assert {(record.access, record.missing) for record in stale(made)} == {("read", "INVLPG")}

    def test_what_event_delivery_pushes_into_a_page_table_is_a_change(self, options):
        """The three pushes of the delivery reach down to the entry; the return address becomes the entry."""
        idt, handler = 0x32000, 0x33000
        gate = struct.pack("<HHHH", handler & 0xFFFF, 8, 0x8E00, handler >> 16)
        made = build(
            READ + f"mov esp, {ENTRY + 12:#x}\nint3\n",
            options=options,
            extra={handler: READ_AGAIN + "mov al, 0\n" + tiny.END},
            tables={idt + 3 * 8: gate},
            idt=idt,
        )
        run(made)
        assert made.machine.register("rcx") == OLD
        (record,) = [each for each in stale(made) if each.access == "read"]
        assert (record.entry, record.place, record.missing) == ("PTE", ENTRY, "INVLPG")
        assert made.machine.read(record.writer, 1) == b"\xcc"


class TestPageModificationLog:
    def logged(self, pages):
        return [gpa for gpa in pages if gpa in (PLACE, OTHER_PLACE)]

    def test_a_write_that_sets_the_dirty_flag_is_cached_with_it(self, options):
        """The second write is by the cached mapping."""
        made = build(WRITE + VMCALL + WRITE, options=evolve(options, ept=LOGGING))
        made.machine.on(Vmcall)(lambda _: made.machine.protect(PLACE, SIZE, R, invalidate=False))
        assert [(record.access, record.missing) for record in stale(run(made))] == [("write", "INVEPT")]

    @pytest.mark.parametrize("writes", [1, 2, 3])
    def test_a_drained_and_cleaned_page_is_logged_at_its_next_write(self, options, writes):
        made = build(WRITE * writes + VMCALL + WRITE + VMCALL + WRITE + VMCALL, options=evolve(options, ept=LOGGING))
        rounds = []

        @made.machine.on(Vmcall)
        def drain(_exit):
            rounds.append(self.logged(made.machine.drain_log(clean=len(rounds) < 1)))

        run(made)
        assert rounds == [[PLACE], [PLACE], []]
        assert stale(made) == []

    @pytest.mark.parametrize("invept", [False, True])
    def test_a_dirty_flag_that_the_host_clears_is_seen_after_an_invept(self, options, invept):
        made = build(WRITE + VMCALL + WRITE, options=evolve(options, ept=LOGGING))

        @made.machine.on(Vmcall)
        def clean(_exit):
            made.machine.drain_log()
            made.machine.ept.clean(PLACE)
            if invept:
                made.machine.invept(made.machine.ept.eptp)

        run(made)
        assert self.logged(made.machine.ept.log.pages) == ([PLACE] if invept else [])
        assert made.machine.ept.entry(PLACE).dirty == invept
        assert stale(made) == []

    def test_a_full_log_exits_once_and_the_mapping_is_good_afterwards(self, options):
        made = build(VMCALL + WRITE + WRITE, options=evolve(options, ept=LOGGING))

        @made.machine.on(Vmcall)
        def fill(_exit):
            made.machine.drain_log()
            made.machine.ept.log.index = 0xFFFF

        run(made)
        assert made.count(62) == 1
        assert self.logged(made.machine.ept.log.pages) == [PLACE]
        assert stale(made) == []


class TestSubPages:
    BLOCK = f"mov dword ptr [{PAGE + 0x80:#x}], 7\n"

    def test_stores_that_are_let_through_leave_no_mapping_that_allows_others(self, options):
        options = evolve(options, ept=PROFILES["sub-page-write"])
        made = build(WRITE + VMCALL + self.BLOCK + WRITE + self.BLOCK, options=options)
        made.machine.on(Vmcall)(lambda _: made.machine.protect_sub_pages(PLACE, 1 << 1))
        run(made)
        assert [violation.gpa for violation in violations(made, PLACE)] == [PLACE]
        assert made.machine.read(PLACE + 0x80, 4) == bytes([7, 0, 0, 0])
        assert stale(made) == []

    def test_they_hide_no_mistake_of_the_guest(self, options):
        options = evolve(options, ept=PROFILES["sub-page-write"])
        made = build(WRITE + VMCALL + self.BLOCK + ELSEWHERE + self.BLOCK + READ_AGAIN, options=options)
        made.machine.on(Vmcall)(lambda _: made.machine.protect_sub_pages(PLACE, 1 << 1))
        run(made)
        assert [(record.access, record.missing) for record in stale(made)] == [("write", "INVLPG"), ("read", "INVLPG")]
        assert made.machine.read(OTHER_PLACE + 0x80, 4) == bytes(4)

    def test_a_page_that_the_host_guards_without_invept_is_still_written(self, options):
        def guard(_exit):
            ept = made.machine.ept
            made.machine.protect_sub_pages(PLACE, 1 << 1)
            ept.write_entry(PLACE, 1, ept.read_entry(PLACE, 1) | 0b010)
            made.machine.invept()

        def unguard(_exit):
            ept = made.machine.ept
            ept.write_entry(PLACE, 1, ept.read_entry(PLACE, 1) & ~0b010)

        todo = [guard, unguard]
        made = build(VMCALL + WRITE + VMCALL + WRITE, options=evolve(options, ept=PROFILES["sub-page-write"]))
        made.machine.on(Vmcall)(lambda exit_: todo.pop(0)(exit_))  # noqa: PLW0108 - the second one at the second exit
        run(made)
        assert [(record.access, record.missing) for record in stale(made)] == [("write", "INVEPT")]
        assert violations(made, PLACE) == []


class TestVirtualizationExceptions:
    AREA, IDT, HANDLER = 0x34000, 0x32000, 0x33000

    @staticmethod
    def restrict(machine):
        machine.views.restrict(0, PLACE, SIZE, R, convertible=True)

    def converting(self, source, options, *, area=AREA, act=restrict):
        gate = struct.pack("<HHHH", self.HANDLER & 0xFFFF, 8, 0x8E00, self.HANDLER >> 16)
        handler = f"mov dword ptr [{area + 4:#x}], 0\n" + vmfunc(1) + "iretd"
        made = with_views(
            source,
            options,
            act,
            extra={self.HANDLER: handler},
            tables={self.IDT + 20 * 8: gate},
            idt=self.IDT,
        )
        made.machine.views.set_ve_area(area)
        return made

    def test_a_mapping_from_before_is_no_way_around(self, options):
        """The page was written before it is restricted; its next write is a #VE, whose handler switches the view."""
        made = run(self.converting(WRITE + VMCALL + WRITE + READ_AGAIN, options))
        assert [event.vector for event in made.of(Injection)] == [20]
        assert violations(made, PLACE) == []
        assert made.machine.register("rcx") == 5
        assert stale(made) == []

    def test_it_invalidates_what_was_cached_of_the_address(self, options):
        """As an EPT violation does (29.4.3.1): back in the first view the store is judged again."""
        made = self.converting(WRITE + VMCALL + WRITE + vmfunc(0) + WRITE, options)
        run(made)
        assert [event.vector for event in made.of(Injection)] == [20, 20]
        assert stale(made) == []

    def test_without_invept_there_is_none(self, options):
        entries = []
        made = self.converting(
            WRITE + VMCALL + WRITE, options, act=lambda m: m.views.ept(0).write_entry(PLACE, 1, entries.pop())
        )
        views = made.machine.views
        views.restrict(0, PLACE, SIZE, R, convertible=True)
        entries.append(views.ept(0).read_entry(PLACE, 1))
        views.restrict(0, PLACE, SIZE, RW)
        run(made)
        assert made.of(Injection) == []
        assert [(record.access, record.missing) for record in stale(made)] == [("write", "INVEPT")]

    def test_an_area_in_a_page_table_is_a_change_like_any_other(self, options):
        """The exit qualification, at byte 8, becomes the entry of linear page 2; the busy word is that of page 1."""
        page = 2 * SIZE
        source = f"mov ebx, [{page:#x}]\n" + WRITE + VMCALL + WRITE + vmfunc(0) + f"mov ecx, [{page:#x}]\n"
        made = self.converting(source, options, area=TABLE)
        made.machine.write(entry(SIZE), bytes(4))
        run(made)
        (record,) = stale(made)
        assert (record.entry, record.place, record.new, record.missing) == ("PTE", entry(page), 0x18A, "INVLPG")
        assert made.machine.read(record.writer, len(tiny.assemble(WRITE, CODE, 32))) == tiny.assemble(WRITE, CODE, 32)


@pytest.mark.parametrize("single_step", [False, True], ids=["free", "stepped"])
@pytest.mark.parametrize("view", [0, 1])
def test_of_several_vcpus_only_those_are_concerned_that_use_the_view(view, single_step):
    """vCPU 1 uses view 1; the host changes one of the views while vCPU 0 waits for it."""
    flag, other = DATA + 0x800, CODE + 0x800
    ready = f"ready: cmp dword ptr [{flag:#x}], 1\njne ready\n"
    first = READ + ready + VMCALL + f"mov dword ptr [{flag:#x}], 2\n" + READ_AGAIN
    first += f"done: cmp dword ptr [{flag:#x}], 3\njne done\n"
    second = PAGING + READ + f"mov dword ptr [{flag:#x}], 1\nwait: cmp dword ptr [{flag:#x}], 2\njne wait\n"
    second += READ_AGAIN + f"mov dword ptr [{flag:#x}], 3\nhlt\n"
    made = with_views(
        first,
        RunOptions(tlb="strict", single_step=single_step, seed=3),
        lambda machine: lead_elsewhere(machine, view),
        extra={other: second},
        others=[CpuSpec(other, 0, 0, {"rsp": STACK - 0x800})],
    )
    made.machine.views.switch(1, vcpu=1)
    run(made)
    found = [(record.vcpu, record.view, record.missing) for record in stale(made)]
    assert found == [(view, view, "INVEPT")]


class TestHiddenPatches:
    """What is executed in place of the guest's bytes is so by a cached mapping as well."""

    FUNCTION = 0x33000

    @pytest.mark.parametrize(("patch", "end"), [("nop", "port"), ("hlt", "halt")])
    def test_an_instruction_is_the_patched_one(self, options, patch, end):
        made = build(
            f"mov esi, {self.FUNCTION:#x}\ncall esi\ncall esi\n",
            options=options,
            extra={self.FUNCTION: "nop\nnop\nret"},
        )
        made.machine.patch_hidden(self.FUNCTION + 1, tiny.assemble(patch, CODE, 32))
        assert made.run().reason == end
        assert made.machine.read(self.FUNCTION, 3) == b"\x90\x90\xc3"
        mmu = made.machine.vcpu.mmu
        mmu.forget_all_fetches()
        assert mmu.code_bytes(self.FUNCTION)[1:2] == tiny.assemble(patch, CODE, 32)

    def test_a_mapping_that_is_stale_leads_to_the_frame_that_has_it(self, options):
        made = build(
            f"mov dword ptr [{PAGE:#x}], 0x01b8\nmov dword ptr [{PAGE + 4:#x}], 0xc300\ncall {PAGE:#x}\nmov ebx, eax\n"
            + ELSEWHERE
            + f"call {PAGE:#x}\nmov ecx, eax\n",
            options=options,
        )
        made.machine.patch_hidden(PLACE + 1, b"\x07")
        run(made)
        assert [made.machine.register(name) for name in ("rbx", "rcx")] == [7, 7]
        assert [(record.access, record.missing) for record in stale(made)] == [("fetch", "INVLPG")]
