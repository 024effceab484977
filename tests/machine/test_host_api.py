"""What the host's interface refuses, and what handlers may decide."""

import pytest
import tiny
from tiny import CODE, DATA, END, MEMORY, PAGE

from vmm.cpu.events import Event, EventType, Vector
from vmm.ept import Permission
from vmm.errors import OptionError
from vmm.exits import Cpuid, EptMisconfiguration, EptViolation, Exit, Hlt, IoInstruction, Rdtsc, Vmcall
from vmm.guest.manifest import Policy
from vmm.records import Modification

FAR = 0x40_0000
FAULT = Event(Vector.UD, EventType.HARDWARE_EXCEPTION)


def machine(code=f"mov al, 1\n{END}"):
    return tiny.build(code).machine


@pytest.mark.parametrize(
    ("gpa", "target", "size"),
    [
        (FAR + 1, DATA, PAGE),
        (FAR, DATA + 1, PAGE),
        (FAR, DATA, 100),
        (-PAGE, DATA, PAGE),
        (1 << 48, DATA, PAGE),
        (FAR, MEMORY, PAGE),
        (FAR, MEMORY - PAGE, 2 * PAGE),
    ],
)
def test_an_alias_is_made_whole_or_not_at_all(gpa, target, size):
    made = machine()
    with pytest.raises(OptionError):
        made.alias(gpa, target, size)
    for page in range(FAR, FAR + 2 * PAGE, PAGE):
        with pytest.raises(OptionError, match="no memory"):
            made.read(page, 1)


def test_an_alias_reaches_the_frames_in_their_order():
    made = machine()
    made.write(DATA, b"first")
    made.write(DATA + PAGE, b"second")
    made.alias(FAR, DATA, 2 * PAGE)
    assert made.read(FAR, 5) == b"first"
    assert made.read(FAR + PAGE, 6) == b"second"


def test_an_alias_that_allows_nothing_leaves_its_frame_when_it_gets_another():
    made = machine()
    made.alias(FAR, CODE, PAGE)
    made.protect(FAR, PAGE, Permission.NONE)
    made.alias(FAR, DATA, PAGE)
    assert made.frames.at(CODE).gpas == [CODE]
    assert made.frames.at(DATA).gpas == [DATA, FAR]
    made.verify()


@pytest.mark.parametrize("vector", [-1, 256])
def test_an_interrupt_has_a_vector_of_eight_bits(vector):
    with pytest.raises(OptionError, match="vector"):
        machine().interrupt(vector)


@pytest.mark.parametrize("kind", [Exit, Modification, int])
def test_only_exits_have_handlers(kind):
    with pytest.raises(OptionError, match="no exit"):
        machine().on(kind)


@pytest.mark.parametrize(
    ("kind", "code"), [(IoInstruction, "out 0x80, al"), (Cpuid, "cpuid"), (Rdtsc, "rdtsc"), (Hlt, "hlt")]
)
def test_no_event_replaces_an_instruction_under_way(kind, code):
    made = machine(f"{code}\n{END}")
    made.on(kind)(lambda _: FAULT)
    with pytest.raises(OptionError, match=r"in place of \w+; hand it to Machine.inject") as caught:
        made.run()
    assert caught.value.__notes__


@pytest.mark.parametrize(
    ("kind", "code"), [(EptViolation, f"mov byte ptr [{CODE}], al"), (Vmcall, "vmcall"), (EptMisconfiguration, "nop")]
)
def test_an_event_replaces_an_instruction_that_has_not_executed(kind, code):
    made = machine(f"{code}\nmov [{DATA}], al\n{END}")
    made.protect(DATA, PAGE, Permission.W)
    made.on(kind)(lambda _: FAULT)
    end = made.run()
    assert (end.reason, end.detail) == ("triple fault", {"vector": Vector.UD})


@pytest.mark.parametrize("decision", ["yes", 1, Vector.UD])
def test_a_handler_decides_in_the_words_that_it_has(decision):
    made = machine(f"vmcall\n{END}")
    made.on(Vmcall)(lambda _: decision)
    with pytest.raises(OptionError, match="return None, True or an Event"):
        made.run()


def test_a_device_does_not_get_what_a_handler_kept():
    made = machine(f"mov al, 1\n{END}mov al, 2\n{END}")
    made.on(IoInstruction)(lambda access: access.value == 1)
    assert made.run().detail["value"] == 2


def test_a_misconfigured_entry_ends_the_run_unless_it_is_mended():
    made = machine(f"mov al, 7\nmov [{DATA}], al\n{END}")
    made.protect(DATA, PAGE, Permission.W)
    assert made.run().reason == "EPT misconfiguration"

    made = machine(f"mov al, 7\nmov [{DATA}], al\n{END}")
    made.protect(DATA, PAGE, Permission.W)

    @made.on(EptMisconfiguration)
    def mend(misconfiguration):
        made.protect(misconfiguration.gpa, PAGE, Permission.R | Permission.W)
        return True

    assert made.run().detail["value"] == 7
    assert made.read(DATA, 1) == b"\x07"


def test_a_closed_machine_can_be_read_but_not_run() -> None:
    with tiny.build(f"mov eax, 7; {END}").machine as machine:
        machine.run()
    assert machine.register("rax") == 7
    assert machine.read(CODE, 1) == b"\xb8"
    with pytest.raises(OptionError, match="closed"):
        machine.run()
    machine.write(CODE, b"\xb9")
    machine.seal(CODE, 1)
    machine.close()


def test_a_size_is_not_negative() -> None:
    with pytest.raises(OptionError, match="size"):
        machine().read(CODE, -1)


def test_page_tables_that_the_host_rewrites_count_from_then_on() -> None:
    # Two functions on two pages; at the CPUID the host makes the first one's page lead to the second one's frame.
    first, second = 0x20000, 0x21000
    source = {
        CODE: f"mov rdx, {first}; call rdx; mov ebx, eax; cpuid; mov rdx, {first}; call rdx; {END}",
        first: "mov eax, 1; ret",
        second: "mov eax, 2; ret",
    }
    maps = [tiny.map_page(first, first), tiny.map_page(second, second)]
    made = tiny.build(source, maps=maps)

    @made.machine.on(Cpuid)
    def _remap(_exit: Cpuid) -> None:
        tables = made.machine.vcpu.context.cr3
        for shift in (39, 30, 21, 12):
            place = (tables & 0xF_FFFF_FFFF_F000) + (first >> shift & 511) * 8
            tables = int.from_bytes(made.machine.read(place, 8), "little")
        made.machine.write(place, (tables - first + second).to_bytes(8, "little"))

    assert made.run().detail["value"] == 2


def test_aliases_are_found_anew_when_gpas_lead_to_other_frames() -> None:
    view, target, spare = 0x8000000, 0x20000, 0x30000
    store = f"mov rbx, {target}; call rbx; mov byte ptr [rbx + 1]"
    code = f"{store}, 2; cpuid; mov rbx, {target}; mov byte ptr [rbx + 1], 3; {END}"
    source = {CODE: code, target: "mov eax, 1; ret"}
    made = tiny.build(source, maps=[tiny.map_page(target, target), tiny.map_page(view, spare)])

    @made.machine.on(Cpuid)
    def _alias(_exit: Cpuid) -> None:
        made.machine.alias(spare, target, PAGE)

    made.run()
    assert [record.aliases for record in made.modifications] == [(target + 1,), (target + 1, view + 1)]


def test_a_window_that_loses_its_last_gpa_is_journaled_first() -> None:
    target, view = 0x20000, 0x8000000
    source = {CODE: f"mov rbx, {view}; mov byte ptr [rbx], 2; cpuid\n{END}", target: b"\x90\xc3"}
    made = tiny.build(source, maps=[tiny.map_page(view, target, "rw")], policy=Policy(writes="window", code="load"))
    made.machine.on(Cpuid)(lambda _exit: made.machine.alias(target, DATA, PAGE))
    assert made.run().reason == "port"
    (record,) = made.modifications
    assert (record.gpa, record.old, record.new, record.cause) == (target, b"\x90", b"\x02", "window")


@pytest.mark.parametrize("instruction", ["in al, 0x80", "out 0x80, al", "rdtsc", "cpuid"])
def test_an_observer_that_only_looks_may_stop_a_loop_without_refusals(instruction):
    """Such exits are answered inside of a block; the run ends at the next one."""
    made = tiny.build(f"l: {instruction}; jmp l", options=tiny.RunOptions(seconds=20))
    made.machine.observe(lambda _record: made.machine.stop())
    assert made.run().reason == "stopped"
    assert len(made.exits) == 1
