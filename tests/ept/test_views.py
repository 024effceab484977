"""Views of the EPT: what a host can do with them, VMFUNC by SDM vol. 3, 26.5.6, and #VE by 26.5.7."""

from __future__ import annotations

import struct

import pytest
import tiny
from attrs import evolve
from tiny import CODE, DATA, END, MEMORY, PAGE, STACK, STRICT, map_page

from vmm.cpu.events import Event, EventType
from vmm.ept import Capabilities, EptProfile, Permission
from vmm.errors import OptionError
from vmm.exits import EptViolation, ExceptionExit, Vmfunc
from vmm.guest.manifest import CpuSpec, Limits, Policy
from vmm.records import Injection, ViewEvent

NONE, R, RW = Permission.NONE, Permission.R, Permission.R | Permission.W
X, RX = Permission.X, Permission.R | Permission.X
VMFUNC = ".byte 0x0f, 0x01, 0xd4\n"
ENABLED = EptProfile(vm_functions=True, virtualization_exceptions=True)
PLAIN = evolve(STRICT, ept=ENABLED)
IDT, AREA, OTHER = 0x60000, 0x61000, 0x41000
STOP = Event(6, EventType.HARDWARE_EXCEPTION)
STORE = f"mov byte ptr [{DATA + 8}], 1\nmov al, 0\n" + END


def gates(**handlers: int) -> bytes:
    """An IDT of 4 KiB with interrupt gates for vectors given as v13=address."""
    table = bytearray(PAGE)
    for name, address in handlers.items():
        at = 16 * int(name[1:])
        table[at : at + 16] = struct.pack("<HHHHQ", address & 0xFFFF, 8, 0x8E00, address >> 16, 0)
    return bytes(table)


def build(source, options=PLAIN, views=2, **rest):
    """A tiny guest with a list of its views, and handlers of #UD, #GP and #VE at 0x11000: they end the run by AL."""
    handlers = rest.pop("handlers", {0x11000: "mov al, 0xee\n" + END})
    parts = {CODE: source, **handlers, IDT: gates(v6=0x11000, v13=0x11000, v20=0x11100)}
    maps = [map_page(0x11000, 0x11000, pages=2), map_page(IDT, IDT, "rw", pages=2), map_page(OTHER, OTHER, "rw")]
    made = tiny.build(parts, options=options, maps=maps, code=(CODE, *handlers), idt=IDT, **rest)
    for _ in range(1, views):
        made.machine.views.add()
    made.machine.views.set_eptp_list([made.machine.views.ept(number).eptp for number in range(views)])
    return made


def select(index: int, function: int = 0) -> str:
    return f"mov eax, {function}\nmov ecx, {index}\n" + VMFUNC


@pytest.fixture(params=[PLAIN, evolve(PLAIN, single_step=True)], ids=["free", "stepped"])
def options(request):
    return request.param


class TestVmfunc:
    def test_switches_without_an_exit_and_changes_no_register(self, options):
        made = build(select(1) + END, options)
        made.run()
        assert made.machine.views.current() == 1
        assert made.end.detail["value"] == 0
        assert made.machine.register("rcx") == 1
        assert {type(each).__name__ for each in made.exits} == {"IoInstruction"}
        (switched,) = [event for event in made.of(ViewEvent) if event.cause == "vmfunc"]
        assert (switched.event, switched.view) == ("switched", 1)

    def test_ends_what_the_old_view_has_cached(self, options):
        """A page that has just been loaded from, in the same run of the engine, is another one at the next load."""
        source = f"mov bl, [{DATA}]\n" + select(1) + f"mov al, [{DATA}]\nshl bl, 4\nor al, bl\n" + END
        made = build(source, options)
        made.machine.write(DATA, b"\x01")
        made.machine.write(OTHER, b"\x02")
        made.machine.views.remap(1, DATA, OTHER, PAGE)
        assert made.run().detail["value"] == 0x12

    def test_code_of_another_view_is_other_code(self, options):
        """Both are at one linear address, and translated once each."""
        source = "mov esi, 0x12000\ncall rsi\nmov ebx, eax\n" + select(1) + "call rsi\nshl ebx, 4\nor eax, ebx\n" + END
        code = {0x11000: END, 0x12000: "mov eax, 1\nret", 0x13000: "mov eax, 2\nret"}
        made = tiny.build(
            {CODE: source, **code}, options=options, maps=[map_page(0x11000, 0x11000, pages=3)], code=(CODE, *code)
        )
        views = made.machine.views
        views.remap(views.add(), 0x12000, 0x13000, PAGE)
        views.set_eptp_list([views.ept(0).eptp, views.ept(1).eptp])
        assert made.run().detail["value"] == 0x12

    @pytest.mark.parametrize(("eax", "ecx"), [(0, 2), (0, 511), (0, 512), (0, 0xFFFFFFFF), (1, 0), (63, 0)])
    def test_exits_with_reason_59_where_the_function_cannot_be_done(self, options, eax, ecx):
        made = build(select(ecx, eax) + END, options)
        assert made.run().detail["value"] == 0xEE
        (failed,) = made.of(Vmfunc)
        assert failed.to_json().items() >= {"number": 59, "eax": eax, "ecx": ecx, "length": 3, "rip": CODE + 10}.items()
        assert made.of(ExceptionExit) == []
        assert made.machine.views.current() == 0

    def test_takes_the_low_32_bits_of_its_operands(self, options):
        made = build("mov rax, 0x100000000\nmov rcx, 0x500000001\n" + VMFUNC + "mov al, 0\n" + END, options)
        assert made.run().detail["value"] == 0
        assert made.machine.views.current() == 1

    @pytest.mark.parametrize("eax", [64, 0xFFFFFFFF])
    def test_is_undefined_with_a_number_above_63(self, options, eax):
        made = build(select(0, eax) + END, options)
        assert made.run().detail["value"] == 0xEE
        assert [each.vector for each in made.of(ExceptionExit)] == [6]
        assert made.of(Vmfunc) == []

    def test_is_undefined_without_the_control(self, options):
        made = build(select(0) + END, evolve(options, ept=EptProfile()))
        assert made.run().detail["value"] == 0xEE
        assert made.of(Vmfunc) == []

    def test_a_handler_may_deal_with_the_exit(self):
        made = build(select(600) + "mov al, 7\n" + END)
        made.machine.on(Vmfunc)(lambda _: True)
        assert made.run().detail["value"] == 7

    def test_an_eptp_that_vm_entry_refuses_exits(self):
        for eptp in (0, 0x101F, 0x1006, 0x109E, 0x101E | 1 << 45, 0x101D):
            made = build(select(0) + END)
            made.machine.views.set_eptp_list([eptp])
            assert made.run().detail["value"] == 0xEE
            assert len(made.of(Vmfunc)) == 1

    def test_each_vcpu_has_its_own_view_and_list(self):
        """The other vCPU stays where it is, and has an empty list."""
        other = CpuSpec(0x12000, 0, 3, {"rsp": STACK}, IDT, 0)
        both = select(1) + "here: jmp here\n"
        code = {0x12000: select(1) + END}
        made = build(both, handlers={0x11000: "mov al, 0xee\n" + END, **code}, others=[other])
        assert made.run().detail["value"] == 0xEE
        assert [made.machine.views.current(vcpu=number) for number in (0, 1)] == [1, 0]
        assert [each.vcpu for each in made.of(Vmfunc)] == [1]


class TestHostileGuests:
    @pytest.mark.parametrize(
        "source", [f"xor eax, eax\nxor ecx, ecx\nagain:\n{VMFUNC}jmp again\n", "again: " + STORE + "jmp again\n"]
    )
    def test_what_is_no_exit_counts_against_the_budget_all_the_same(self, source):
        """A guest that switches views for ever, or takes one #VE after the other."""
        handler = f"mov dword ptr [{AREA + 4}], 0\niretq\n"
        made = converting(source, limits=Limits(exits=500), handler=handler)
        assert made.run().reason == "exits"
        assert len(made.of(ViewEvent, Injection)) <= 500 + 5


class TestRestrictions:
    def test_a_handler_switches_the_view_and_the_guest_tries_again(self, options):
        made = build(select(1) + f"mov byte ptr [{DATA}], 5\nmov al, [{DATA}]\n" + END, options)
        made.machine.views.restrict(1, DATA, PAGE, R)

        @made.machine.on(EptViolation)
        def switch(violation):
            if violation.gpa == DATA:
                made.machine.views.switch(0)
                return True
            return None

        assert made.run().detail["value"] == 5
        (violation,) = [each for each in made.violations if each.gpa == DATA]
        assert (violation.view, violation.qualification) == (1, 0x18A)

    def test_what_nobody_answers_ends_the_run(self, options):
        made = build(f"mov al, [{DATA}]\n" + END, options)
        made.machine.views.restrict(0, DATA, PAGE, NONE)
        end = made.run()
        assert (end.reason, end.detail["gpa"]) == ("EPT violation", DATA)

    def test_the_states_of_frames_go_on_within_a_limit(self):
        """A store to code that the view allows is stepped as ever; the view never has more than the state allows."""
        source = select(1) + "mov byte ptr [0x12001], 9\nmov esi, 0x12000\ncall rsi\n" + END
        code = {0x11000: END, 0x12000: "mov al, 1\nret"}
        made = tiny.build(
            {CODE: source, **code}, options=PLAIN, maps=[map_page(0x11000, 0x11000, pages=2)], code=(CODE, *code)
        )
        views = made.machine.views
        views.add()
        views.set_eptp_list([views.ept(0).eptp, views.ept(1).eptp])
        views.restrict(1, 0x12000, PAGE, Permission(7))
        assert made.run().detail["value"] == 9
        assert [change.new for change in made.modifications] == [b"\x09"]
        assert views.ept(1).entry(0x12000).permissions == X

    @pytest.mark.parametrize("spelled", ["-w-", "-wx"])
    def test_writes_without_reads_are_no_limit(self, spelled):
        with pytest.raises(OptionError, match="restrict"):
            build(END).machine.views.restrict(1, DATA, PAGE, Permission.parse(spelled))

    def test_a_processor_without_execute_only_gets_no_such_entry(self):
        profile = EptProfile(capabilities=Capabilities(execute_only=False))
        made = build(END, evolve(STRICT, ept=profile))
        made.machine.views.restrict(1, CODE, PAGE, X)
        assert made.machine.views.ept(1).entry(CODE).permissions == NONE

    def test_a_fetch_ahead_is_no_access_yet(self):
        """The engine translates over the end of a page: what the view forbids there counts when it is executed."""
        made = build("jmp 0x10ffc", handlers={0x11000: END})
        made.machine.write(0x10FFC, b"\xe6\xf4\x90\x90")  # out 0xf4, al: the end, before the page is
        made.machine.views.restrict(0, 0x11000, PAGE, NONE)
        assert made.run().reason == "port"
        assert [violation for violation in made.violations if violation.gpa >> 12 == 0x11] == []

    def test_event_delivery_keeps_to_the_view(self, options):
        """An exception frame is not pushed where the view lets nothing be written."""
        made = build("ud2", options)
        made.machine.views.restrict(0, STACK - PAGE, PAGE, R)
        end = made.run()
        assert (end.reason, end.detail["gpa"] & -PAGE) == ("EPT violation", STACK - PAGE)
        (violation,) = [each for each in made.violations if each.gpa & -PAGE == STACK - PAGE]
        assert violation.qualification == 0x18A

    def test_a_handler_mends_it_and_the_event_is_delivered(self, options):
        made = build("ud2", options)
        made.machine.views.restrict(0, STACK - PAGE, PAGE, R)

        @made.machine.on(EptViolation)
        def switch(violation):
            if violation.gpa & -PAGE == STACK - PAGE:
                made.machine.views.switch(1)
                made.machine.views.restrict(1, STACK - PAGE, PAGE, Permission(7))
                return True
            return None

        made.machine.views.restrict(1, STACK - PAGE, PAGE, RW)
        assert made.run().detail["value"] == 0xEE

    def test_alias_keeps_what_another_view_needs(self):
        machine = build(END).machine
        machine.views.remap(1, DATA, OTHER, PAGE)
        with pytest.raises(OptionError, match="another view"):
            machine.alias(OTHER, DATA, PAGE)

    @pytest.mark.parametrize(
        "act",
        [
            lambda views: views.switch(2),
            lambda views: views.switch(-1),
            lambda views: views.add(of=7),
            lambda views: views.restrict(1, MEMORY, PAGE, R),
            lambda views: views.restrict(1, 0, -1, R),
            lambda views: views.remap(0, DATA, OTHER, PAGE),
            lambda views: views.remap(1, DATA + 1, OTHER, PAGE),
            lambda views: views.remap(1, DATA, MEMORY, PAGE),
            lambda views: views.remap(1, 1 << 48, DATA, PAGE),
            lambda views: views.set_eptp_list([0] * 513),
            lambda views: views.set_eptp_list([0x777701E]),
            lambda views: views.set_eptp_list([1 << 64]),
            lambda views: views.set_ve_area(DATA + 8),
            lambda views: views.set_ve_area(MEMORY),
            lambda views: [views.add() for _ in range(64)],
        ],
    )
    def test_what_there_is_not_is_refused(self, act):
        with pytest.raises(OptionError):
            act(build(END).machine.views)

    def test_a_w_x_policy_judges_by_one_memory(self):
        made = build(END, evolve(PLAIN, wx="stop"))
        with pytest.raises(OptionError, match="W\\^X"):
            made.machine.views.remap(1, DATA, OTHER, PAGE)

    def test_an_eptp_selects_one_view(self):
        views = build(END, views=64).machine.views
        eptps = [views.ept(number).eptp for number in range(64)]
        assert len(set(eptps)) == 64
        assert all(ENABLED.accepts_eptp(eptp) for eptp in eptps)




def converting(
    source=STORE, options=PLAIN, *, convertible=True, area=AREA, handler="mov al, 0x20\n" + END, **rest
):
    """A guest with one view in which DATA is read-only; its #VE handler ends the run with 0x20, that of #UD with 0xee,
    which is what an EPT violation there comes to."""
    handlers = {0x11000: tiny.assemble("mov al, 0xee\n" + END, 0x11000).ljust(0x100, b"\x90")}
    handlers[0x11000] += tiny.assemble(handler, 0x11100)
    made = build(source, options, handlers=handlers, **rest)
    views = made.machine.views
    views.restrict(0, DATA, PAGE, R, convertible=convertible)
    if area is not None:
        views.set_ve_area(area)
    made.machine.on(EptViolation)(lambda violation: STOP if violation.gpa & -PAGE == DATA else None)
    return made


class TestVirtualizationExceptions:
    def test_is_delivered_without_an_exit_and_leaves_its_information(self, options):
        made = converting(select(1) + select(0) + STORE, options)
        assert made.run().detail["value"] == 0x20
        assert [violation for violation in made.violations if violation.gpa & -PAGE == DATA] == []
        assert made.of(ExceptionExit) == []
        assert [(event.vector, event.error_code) for event in made.of(Injection)] == [(20, None)]
        saved = struct.unpack("<IIQQQH", made.machine.read(AREA, 34))
        assert saved == (48, 0xFFFFFFFF, 0x18A, DATA + 8, DATA + 8, 0)

    def test_reports_the_index_of_the_view(self, options):
        made = converting(select(1) + STORE, options)
        made.machine.views.restrict(1, DATA, PAGE, NONE, convertible=True)
        assert made.run().detail["value"] == 0x20
        assert struct.unpack("<IIQQQH", made.machine.read(AREA, 34))[5] == 1

    @pytest.mark.parametrize("word", [1, 0x80000000, 0xFFFFFFFF])
    def test_a_busy_area_makes_it_an_exit(self, options, word):
        made = converting(options=options)
        made.machine.write(AREA + 4, struct.pack("<I", word))
        assert made.run().detail["value"] == 0xEE
        assert made.machine.read(AREA, 4) == bytes(4)

    @pytest.mark.parametrize("why", ["suppressed", "no control", "no area", "not this page"])
    def test_what_is_not_convertible_is_an_exit(self, options, why):
        chosen = options if why != "no control" else evolve(options, ept=EptProfile(vm_functions=True))
        made = converting(options=chosen, convertible=why != "suppressed", area=None if why == "no area" else AREA)
        if why == "not this page":
            made.machine.views.ept(0).suppress(DATA, on=True)
        assert made.run().detail["value"] == 0xEE

    def test_real_mode_gets_none(self):
        """CR0.PE must be 1."""
        made = tiny.build(
            f"mov byte ptr [0x40], 1\nmov al, 0\n{END}", options=PLAIN, mode="real", paging=False, registers={"rsp": 0}
        )
        made.machine.views.restrict(0, 0, PAGE, R, convertible=True)
        made.machine.views.set_ve_area(AREA)
        assert made.run().reason == "EPT violation"
        assert made.machine.read(AREA, 8) == bytes(8)

    def test_never_comes_while_an_event_is_delivered(self, options):
        made = build("ud2", options)
        made.machine.views.restrict(0, STACK - PAGE, PAGE, R, convertible=True)
        made.machine.views.set_ve_area(AREA)
        assert made.run().reason == "EPT violation"

    def test_the_traps_of_the_vmm_stay_its_own(self, options):
        """A store to code on a convertible page that the view allows to be written is stepped, and no #VE."""
        code = {0x11000: END, 0x12000: "mov al, 1\nret"}
        made = tiny.build(
            {CODE: "mov byte ptr [0x12001], 3\nmov al, 0\n" + END, **code},
            options=options,
            maps=[map_page(0x11000, 0x11000, pages=2)],
            code=(CODE, *code),
        )
        made.machine.views.restrict(0, 0x12000, PAGE, Permission(7), convertible=True)
        made.machine.views.set_ve_area(AREA)
        assert made.run().detail["value"] == 0
        assert len(made.modifications) == 1

    def test_every_entry_suppresses_it_from_the_start(self):
        machine = build(END).machine
        assert machine.ept.entry(DATA).suppress_ve
        assert not machine.ept.is_convertible(DATA)
        assert not machine.ept.is_convertible(1 << 40)

    def test_an_area_that_is_code_is_written_by_the_door(self, options):
        made = converting(options=options, area=0x11000)
        made.machine.write(0x11004, bytes(4))
        made.run()
        assert [change.cause for change in made.modifications if change.gpa == 0x11000] == ["virtualization exception"]

    def test_with_the_trap_policies(self):
        made = converting(policy=Policy(code="load", reads="grant", writes="window"))
        assert made.run().detail["value"] == 0x20
