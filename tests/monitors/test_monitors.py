"""Monitors see exactly the accesses to their bytes, before and after, and change nothing that the guest could tell."""

import pytest
from tiny import CODE, DATA, END, PAGE, STACK, STRICT, Tiny, assemble, build, map_page

from vmm.coherence import Coherence
from vmm.cpu.events import Event, EventType, Vector
from vmm.ept import PROFILES
from vmm.errors import OptionError
from vmm.guest.manifest import Limits, Policy
from vmm.machine import RunOptions

SINGLE = RunOptions(single_step=True, check=True)
FREE_OF_TRAPS = RunOptions(traps=False)
EVERY_WAY = pytest.mark.parametrize("options", [STRICT, SINGLE, FREE_OF_TRAPS], ids=["free", "single", "no traps"])
BOTH = pytest.mark.parametrize("options", [STRICT, SINGLE], ids=["free", "single"])
VIEW = 0x8000_0000


def watch(tiny: Tiny, gpa: int, size: int, access: str, **rest):
    """A monitor, and the list of what it tells: (stage, access)."""
    told: list = []
    monitor = tiny.machine.monitor(
        gpa,
        size,
        access,
        before=lambda seen: told.append(("before", seen)),
        after=lambda seen: told.append(("after", seen)),
        **rest,
    )
    return monitor, told


def short(told, stage: str = "after") -> list:
    return [(seen.access, seen.gva, seen.size) for when, seen in told if when == stage]


# What is seen


#: What instructions access of the four bytes at DATA, which RBX and RDI hold; RSI is DATA + 0x200, R8D is 32.
ACCESSES = {
    "mov [rbx], eax": [("w", DATA, 4)],
    "mov eax, [rbx]": [("r", DATA, 4)],
    "add [rbx], ax": [("r", DATA, 2), ("w", DATA, 2)],
    "lock xadd [rbx], rax": [("r", DATA, 8), ("w", DATA, 8)],
    "cmpxchg16b [rbx]": [("r", DATA, 16), ("w", DATA, 16)],
    "cmp [rbx], eax": [("r", DATA, 4)],
    "movdqu xmm0, [rbx]": [("r", DATA, 16)],
    "movdqu [rbx - 15], xmm0": [("w", DATA - 15, 16)],
    "fxsave [rbx - 384]": [("w", DATA - 384 + 160, 256)],
    "bts dword ptr [rbx - 4], r8d": [("r", DATA, 4), ("w", DATA, 4)],
    "push qword ptr [rbx]": [("r", DATA, 8)],
    "pop qword ptr [rbx]": [("w", DATA, 8)],
    "cmpsb byte ptr [rsi], [rdi]": [("r", DATA, 1)],
    "mov eax, [rbx + 4]": [],
    "mov [rbx - 4], eax": [],
    "lea rax, [rbx]": [],
    "prefetcht0 [rbx]": [],
}


@EVERY_WAY
def test_an_access_is_told_with_its_exact_range(options):
    text = f"mov ebx, {DATA}; mov edi, {DATA}; mov esi, {DATA + 0x200}; mov r8d, 32"
    places = {}
    for instruction in ACCESSES:
        places[CODE + len(assemble(text))] = instruction
        text += f"; {instruction}"
    tiny = build(f"{text}; {END}", options=options, maps=[map_page(DATA - PAGE, DATA - PAGE, "rw")])
    monitor, told = watch(tiny, DATA, 4, "rw")

    assert tiny.run().reason == "port"

    for stage in ("before", "after"):
        found = {instruction: [] for instruction in ACCESSES}
        for when, seen in told:
            if when == stage:
                found[places[seen.rip]].append((seen.access, seen.gva, seen.size))
        assert found == ACCESSES
    assert monitor.hits == sum(map(len, ACCESSES.values()))


@EVERY_WAY
def test_a_store_is_told_with_old_and_new_bytes_before_it_happens(options):
    tiny = build(f"mov ebx, {DATA}; mov dword ptr [rbx], 0x11223344; {END}", options=options)
    tiny.machine.write(DATA, b"abcd")
    held = []
    tiny.machine.monitor(
        DATA,
        1,
        "w",
        before=lambda seen: held.append((tiny.machine.read(DATA, 4), seen.old, seen.new)),
        after=lambda seen: held.append((tiny.machine.read(DATA, 4), seen.old, seen.new)),
    )

    tiny.run()

    new = bytes.fromhex("44332211")
    assert held == [(b"abcd", b"abcd", new), (new, b"abcd", new)]


@BOTH
def test_each_iteration_of_a_string_instruction_is_an_access(options):
    tiny = build(f"mov edi, {DATA}; mov al, 7; mov ecx, 6; rep stosb; {END}", options=options)
    told = watch(tiny, DATA + 2, 3, "w")[1]

    tiny.run()

    assert short(told) == [("w", DATA + 2 + i, 1) for i in range(3)]


@BOTH
def test_implicit_stores_are_accesses(options):
    tiny = build(f"call over; over: push rax; enter 16, 0; {END}", options=options)
    told = watch(tiny, STACK - 64, 64, "w")[1]

    tiny.run()

    assert short(told) == [("w", STACK - 8, 8), ("w", STACK - 16, 8), ("w", STACK - 24, 8)]


@BOTH
def test_an_access_over_two_pages_is_one(options):
    tiny = build(
        f"mov ebx, {DATA + PAGE - 2}; mov eax, [rbx]; mov [rbx], eax; {END}",
        options=options,
        maps=[map_page(DATA + PAGE, DATA + 3 * PAGE, "rw")],
    )
    told = watch(tiny, DATA + 3 * PAGE, 1, "rw")[1]  # its second page, which lies elsewhere

    tiny.run()

    assert short(told) == [("r", DATA + PAGE - 2, 4), ("w", DATA + PAGE - 2, 4)]
    assert told[0][1].gpa == DATA + PAGE - 2


@BOTH
def test_a_monitor_belongs_to_the_frame_whatever_the_address(options):
    tiny = build(
        f"mov ebx, {VIEW}; mov [rbx + 8], eax; mov edi, {DATA}; mov ecx, [rdi + 8]; {END}",
        options=options,
        maps=[map_page(VIEW, DATA, "rw")],
    )
    told = watch(tiny, DATA + 8, 4, "rw")[1]

    tiny.run()

    assert [(seen.access, seen.gva, seen.gpa) for when, seen in told if when == "after"] == [
        ("w", VIEW + 8, DATA + 8),
        ("r", DATA + 8, DATA + 8),
    ]


def test_any_number_of_monitors_share_a_page():
    tiny = build(f"mov ebx, {DATA}; mov rax, [rbx]; mov [rbx + 2], al; {END}")
    machine = tiny.machine
    reader, writer = machine.monitor(DATA, 8, "r"), machine.monitor(DATA + 2, 1, "w")
    both, elsewhere = machine.monitor(DATA + 2, 1, "rw"), machine.monitor(DATA + 8, 8, "rwx")

    tiny.run()

    assert [monitor.hits for monitor in (reader, writer, both, elsewhere)] == [1, 1, 2, 0]


@BOTH
def test_an_instruction_that_faults_has_made_no_access(options):
    source = {CODE: f"mov ebx, {DATA + PAGE - 2}; mov [rbx], eax; {END}"}
    tiny = build(source, options=options)
    told = watch(tiny, DATA + PAGE - 2, 2, "w")[1]

    assert tiny.run().reason == "triple fault"
    assert told == []


# The trap under it


def test_stores_to_monitored_code_stay_on_record_once():
    source = {
        CODE: f"mov ebx, {CODE + PAGE}; mov byte ptr [rbx + 1], 5; call rbx; {END}",
        CODE + PAGE: "mov al, 1; ret",
    }
    tiny = build(source, maps=[map_page(CODE + PAGE, CODE + PAGE)])
    told = watch(tiny, CODE + PAGE, 2, "rwx")[1]

    assert tiny.run().detail["value"] == 5

    assert [(m.old, m.new) for m in tiny.modifications] == [(b"\x01", b"\x05")]
    assert short(told) == [("w", CODE + PAGE + 1, 1), ("x", CODE + PAGE, 2)]
    assert told[-1][1].old == b"\xb0\x05"


@pytest.mark.parametrize(
    "rest",
    [
        {"policy": Policy(code="load", writes="window", reads="grant")},
        {"policy": Policy(code="load", writes="adaptive")},
        {"options": RunOptions(check=True, coherence=Coherence.SERIALISED)},
        {"options": RunOptions(check=True, coherence=Coherence.EXPLICIT)},
    ],
    ids=["window", "adaptive", "serialised", "explicit"],
)
def test_whatever_the_policy_the_same_accesses_are_told(rest):
    patched = CODE + PAGE
    source = {
        CODE: f"mov ebx, {patched}; mov ecx, 40\nagain: mov [rbx + 1], cl; mov al, [rbx + 1]; cpuid; mov ecx, eax\n"
        f"mov ebx, {patched}; call rbx; {END}",
        patched: "mov al, 1; ret",
    }
    tiny = build(source, maps=[map_page(patched, patched)], **rest)
    told = watch(tiny, patched + 1, 1, "rw")[1]

    assert tiny.run().reason == "port"

    assert short(told) == [("w", patched + 1, 1), ("r", patched + 1, 1)]
    assert [seen.new for _, seen in told[:2]] == [b"\x28", b"\x28"]


def test_under_w_xor_x_it_is_seen_as_well():
    tiny = build(
        f"mov ebx, {DATA}; mov [rbx], ebx; mov eax, [rbx]; {END}",
        options=RunOptions(check=True, wx="fault"),
        maps=[map_page(CODE, CODE, "rx")],
    )
    told = watch(tiny, DATA, 4, "rw")[1]
    tiny.run()
    assert short(told) == [("w", DATA, 4), ("r", DATA, 4)]


def test_the_run_is_the_same_as_without_monitors():
    source = {
        CODE: f"mov ebx, {CODE + PAGE}; mov ecx, 9\nagain: mov [rbx + 1], cl; call rbx; rdtsc; mov [rbx + 64], eax\n"
        f"cpuid; mov ebx, {CODE + PAGE}; mov ecx, [rbx + 1]; dec cl; jnz again; {END}",
        CODE + PAGE: "mov al, 1; ret",
    }
    plain, watched = (build(source, maps=[map_page(CODE + PAGE, CODE + PAGE)]) for _ in range(2))
    watch(watched, CODE + PAGE, 128, "rwx")
    watch(watched, CODE, 64, "rwx")

    assert plain.run() == watched.run()

    assert plain.state() == watched.state()
    assert plain.exits == watched.exits
    assert plain.architectural() == watched.architectural()
    assert plain.machine.reporter.total == watched.machine.reporter.total


# What callbacks may do


def test_an_access_that_is_dealt_with_does_not_happen():
    tiny = build(f"mov ebx, {DATA}; mov dword ptr [rbx], 5; mov eax, [rbx]; {END}")
    context = tiny.machine.vcpu.context

    def skip(seen):
        context.rip += seen.length
        return True

    monitor = tiny.machine.monitor(DATA, 4, "w", before=skip)

    assert tiny.run().detail["value"] == 0
    assert monitor.hits == 0


def test_an_event_is_delivered_in_place_of_the_access():
    tiny = build(f"mov ebx, {DATA}; mov dword ptr [rbx], 5; {END}")
    fault = Event(Vector.GP, EventType.HARDWARE_EXCEPTION, 0)
    tiny.machine.monitor(DATA, 4, "w", before=lambda _: fault)

    assert tiny.run().reason == "triple fault"
    assert tiny.machine.read(DATA, 4) == bytes(4)


@pytest.mark.parametrize(("stage", "left"), [("before", 0), ("after", 5)])
def test_the_run_can_be_stopped_at_an_access(stage, left):
    tiny = build(f"mov ebx, {DATA}; mov dword ptr [rbx], 5; {END}")
    tiny.machine.monitor(DATA, 4, "w", **{stage: lambda _: tiny.machine.stop()})

    assert tiny.run().reason == "stopped"
    assert tiny.machine.read(DATA, 1) == bytes([left])


def test_what_a_callback_changes_is_what_the_instruction_sees():
    tiny = build(f"mov ebx, {DATA}; mov [rbx], eax; mov eax, [rbx]; {END}")

    def change(seen):
        if seen.access == "w":
            tiny.machine.vcpu.context.set_gpr("rax", 7)
        else:
            tiny.machine.write(DATA, b"\x09")

    told = []
    tiny.machine.monitor(DATA, 4, "rw", before=change, after=told.append)

    assert tiny.run().detail["value"] == 9
    assert [(seen.access, seen.old[0]) for seen in told] == [("w", 0), ("r", 9)]
    assert told[0].new[0] == 7


def test_a_monitor_may_remove_itself_and_others():
    tiny = build(f"mov ebx, {DATA}; mov ecx, 5\nagain: mov [rbx], ecx; dec ecx; jnz again; {END}")
    told = []

    def once(seen):
        told.append(seen.new[0])
        first.remove()
        other.remove()

    first = tiny.machine.monitor(DATA, 4, "w", after=once)
    other = tiny.machine.monitor(DATA, 4, "w", before=lambda _: first.remove() if len(told) == 9 else None)
    last = tiny.machine.monitor(DATA, 4, "w")

    tiny.run()

    assert told == [5]
    assert (first.hits, other.hits, last.hits) == (1, 0, 5)


def test_a_condition_chooses():
    tiny = build(f"mov ebx, {DATA}; mov ecx, 5\nagain: mov [rbx], ecx; dec ecx; jnz again; {END}")
    monitor, told = watch(tiny, DATA, 4, "w", condition=lambda seen: seen.new[0] % 2 == 1)

    tiny.run()

    assert [seen.new[0] for when, seen in told if when == "before"] == [5, 3, 1]
    assert monitor.hits == 3


def test_a_guest_that_is_held_for_ever_comes_to_an_end():
    tiny = build(f"mov ebx, {DATA}; mov [rbx], eax; {END}", limits=Limits(exits=100, seconds=60.0))
    tiny.machine.monitor(DATA, 4, "w", before=lambda _: True)

    assert tiny.run().reason == "exits"


def test_devices_hear_of_a_rehearsed_instruction_once():
    tiny = build(f"mov edi, {DATA}; mov edx, 0x60; mov ecx, 3; rep insb; {END}")

    class Counter:
        exact = False
        reads = 0

        def read(self, _port, _size):
            self.reads += 1
            return self.reads

        def write(self, _port, _size, _value):
            pass

    device = Counter()
    tiny.machine.ports.attach(device, 0x60)
    told = watch(tiny, DATA, 3, "w")[1]

    tiny.run()

    assert device.reads == 3
    assert [seen.new for when, seen in told if when == "before"] == [None] * 3
    assert [seen.new for when, seen in told if when == "after"] == [b"\x01", b"\x02", b"\x03"]


@pytest.mark.parametrize(
    ("gpa", "size", "access"), [(DATA, 4, "q"), (DATA, 4, ""), (DATA, 0, "r"), (0x4000_0000, 4, "r")]
)
def test_what_cannot_be_monitored_is_refused(gpa, size, access):
    with pytest.raises(OptionError):
        build(END).machine.monitor(gpa, size, access)


def test_an_unusable_answer_is_refused():
    tiny = build(f"mov ebx, {DATA}; mov [rbx], eax; {END}")
    tiny.machine.monitor(DATA, 4, "w", before=lambda _: "no")
    with pytest.raises(OptionError, match="before an access"):
        tiny.run()


# Execution


@EVERY_WAY
def test_execution_is_told_of_each_instruction_with_a_monitored_byte(options):
    source = f"mov ecx, 3\nagain: nop; add eax, 2; dec ecx; jnz again; {END}"
    tiny = build(source, options=options)
    add = CODE + len(assemble("mov ecx, 3; nop"))
    monitor, told = watch(tiny, add + 1, 1, "x")

    assert tiny.run().detail["value"] == 6

    assert short(told) == short(told, "before") == [("x", add, 3)] * 3
    assert [when for when, _ in told] == ["before", "after"] * 3
    assert monitor.hits == 3


@BOTH
def test_a_string_instruction_is_executed_once(options):
    tiny = build(f"mov edi, {DATA}; mov ecx, 5; rep stosb; {END}", options=options)
    rep = CODE + len(assemble(f"mov edi, {DATA}; mov ecx, 5"))
    told = watch(tiny, rep, 1, "x")[1]

    tiny.run()

    assert [when for when, _ in told] == ["before", "after"]


def test_a_hook_may_change_arguments_and_go_elsewhere():
    start = f"mov edi, 5; call function; add eax, ebx; {END}"
    tiny = build(f"{start}\nfunction: lea eax, [rdi + 1]; ret\nother: mov ebx, 40; jmp function")
    function = CODE + len(assemble(f"mov edi, 5; call {CODE}; add eax, ebx; {END}"))
    other = function + len(assemble("lea eax, [rdi + 1]; ret"))
    context = tiny.machine.vcpu.context

    def divert(seen):
        if not context.gprs[3]:
            context.set_gpr("rdi", 1)
            context.rip = other

    hook = tiny.machine.hook(function, divert)

    assert tiny.run().detail["value"] == 42
    assert hook.hits == 1


def test_a_hook_stays_when_the_guest_rewrites_the_page():
    source = {
        CODE: f"mov ebx, {CODE + PAGE}; call rbx; mov byte ptr [rbx + 1], 9; call rbx; {END}",
        CODE + PAGE: "mov al, 1; ret",
    }
    tiny = build(source, maps=[map_page(CODE + PAGE, CODE + PAGE)])
    seen = []
    tiny.machine.hook(CODE + PAGE, lambda access: seen.append(access.old))

    assert tiny.run().detail["value"] == 9
    assert seen == [b"\xb0\x01", b"\xb0\x09"]


def test_only_blocks_with_the_hooked_instruction_are_stepped():
    source = f"mov ecx, 200\nagain: dec ecx; jnz again\nafter: mov al, 3; {END}"
    tiny = build(source)
    hooked = CODE + len(assemble("mov ecx, 200; dec ecx; jnz 0x10005"))
    hook = tiny.machine.hook(hooked, lambda _: None)

    tiny.run()

    assert hook.hits == 1
    assert len([e for e in tiny.block_events if e.cause == "monitor" and e.event == "evicted"]) == 1


def test_removing_a_hook_frees_its_block():
    source = f"mov ecx, 5\nagain: add eax, 1; dec ecx; jnz again; {END}"
    tiny = build(source)
    hook = tiny.machine.hook(CODE + 5, lambda _: hook.remove() if len(seen) == 2 else seen.append(1) and None)
    seen: list = []

    assert tiny.run().detail["value"] == 5
    assert not hook.active
    assert hook.hits == 2


def test_dirty_flags_and_the_log_of_the_ept_take_nothing_from_a_monitor():
    profile = PROFILES["page-modification-log"]
    source = f"mov ebx, {DATA}; mov [rbx + 8], eax; mov ecx, [rbx]; mov [rbx], ecx; mov eax, [rbx]; {END}"
    tiny = build(source, options=RunOptions(check=True, audit=True, ept=profile))
    told = watch(tiny, DATA, 4, "r")[1]

    tiny.run()

    assert short(told) == [("r", DATA, 4)] * 2


@pytest.mark.parametrize("stage", ["before", "after"])
def test_a_store_that_sub_page_permissions_let_through_is_seen(stage):
    tiny = build(f"mov ebx, {DATA}; mov [rbx + 8], eax; {END}", options=RunOptions(ept=PROFILES["sub-page-write"]))
    tiny.machine.protect_sub_pages(DATA, 1)
    told = watch(tiny, DATA + 8, 4, "w")[1]

    assert tiny.run().reason == "port"

    assert short(told, stage) == [("w", DATA + 8, 4)]
