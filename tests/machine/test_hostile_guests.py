"""A guest is hostile by definition: it cannot hang the VMM, take the host's memory, or slip past its budgets."""

from __future__ import annotations

import threading

import pytest
from tiny import CODE, END, STRICT, build, map_page

from vmm.cpu import engine
from vmm.cpu.events import Event, EventType, Vector
from vmm.exits import Cpuid, ExitReason
from vmm.guest.manifest import Limits
from vmm.machine import RunOptions
from vmm.mmu import Mmu

FUNCTION = 0x20000
VIEW = 0x8000000
FEW = Limits(exits=500, seconds=60.0)
PATCH_FOR_EVER = f"mov rbx, {VIEW + 1}; again: inc ecx; mov [rbx], ecx; mov rdx, {FUNCTION}; call rdx; jmp again"


def reason(source: object, **rest: object) -> str:
    return build(source, **rest).run().reason  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "loop",
    ["jmp $", "again: inc rax; jmp again", "again: pause; jmp again"],
)
def test_a_loop_without_exits_ends_when_its_time_is_over(loop: str) -> None:
    assert reason(loop.replace("$", str(CODE)), limits=Limits(exits=100, seconds=0.3)) == "time"


def test_a_loop_of_an_instruction_that_is_always_stepped_ends_when_its_time_is_over() -> None:
    # SHLD by an immediate with a RIP-relative operand is never executed freely.
    source = "again: shld qword ptr [rip + 0x200], rax, 3; jmp again"
    assert reason({CODE: source, CODE + 0x200: bytes(64)}, limits=Limits(exits=100_000, seconds=0.3)) == "time"


@pytest.mark.parametrize(
    "instruction",
    ["out 0xe9, al", "in al, 0x60", "cpuid", "rdtsc", "rdtscp"],
)
def test_exits_that_are_answered_inside_a_block_count_against_the_budget(instruction: str) -> None:
    made = build(f"again: {instruction}; jmp again", limits=FEW)
    assert made.run().reason == "exits"
    assert made.machine.reporter.total <= FEW.exits + 2


def test_a_string_of_trapped_stores_is_cut_off_by_the_budget() -> None:
    source = f"mov rdi, {CODE + 0x100}; mov ecx, 0x10000000; rep stosb; {END}"
    assert reason(source, limits=FEW) == "exits"


def test_exceptions_in_a_circle_are_cut_off_by_the_budget_or_a_triple_fault() -> None:
    assert reason("ud2") == "triple fault"


def test_translations_that_died_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # With little room for translated code the engine drops all of it many times in this run.
    monkeypatch.setattr(engine, "CODE_BUFFER", 1 << 20)
    maps = [map_page(FUNCTION, FUNCTION, "rx"), map_page(VIEW, FUNCTION, "rw")]
    count = 8000
    source = PATCH_FOR_EVER.replace("jmp again", f"add rdi, rax; cmp ecx, {count}; jne again; {END}")
    made = build({CODE: source, FUNCTION: b"\xb8\x00\x00\x00\x00\xc3"}, maps=maps, options=STRICT)
    assert made.run().reason == "port"
    assert made.machine.register("rdi") == count * (count + 1) // 2
    assert len(made.modifications) == count


def test_pages_that_code_was_fetched_from_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.mmu.fetch_pages.CAPACITY", 4)
    views = [map_page(VIEW + 0x1000 * i, FUNCTION, "rx") for i in range(64)]
    source = f"mov rbx, {VIEW}; mov ecx, 64; again: call rbx; add rbx, 0x1000; dec ecx; jnz again; {END}"
    made = build({CODE: source, FUNCTION: b"\xff\xc0\xc3"}, maps=views)
    assert made.run().reason == "port"
    assert made.machine.register("rax") == 64
    assert isinstance(made.machine.vcpu.mmu, Mmu)


def test_a_host_that_breaks_in_stops_a_guest_that_never_exits() -> None:
    made = build(f"jmp {CODE}", options=RunOptions(seconds=60))
    timer = threading.Timer(0.2, made.machine.break_in)
    timer.start()
    assert made.run().reason == "interrupted"


def test_an_event_reaches_a_guest_that_loops_in_a_block_that_is_always_stepped() -> None:
    source = "again: shld qword ptr [rip + 0x200], rax, 3; cpuid; jmp again"
    made = build({CODE: source, CODE + 0x200: bytes(64)}, limits=Limits(exits=5_000, seconds=60.0))

    @made.machine.on(Cpuid)
    def _inject(_exit: Cpuid) -> None:
        made.machine.inject(Event(Vector.UD, EventType.HARDWARE_EXCEPTION))

    assert made.run().reason == "triple fault"  # there is no IDT
    assert made.count(ExitReason.CPUID) == 1


@pytest.mark.parametrize("seconds", [0.1, 60.0])
def test_an_engine_that_misses_the_first_request_to_stop_is_asked_again(seconds, monkeypatch) -> None:
    """As one does that is about to start at that moment."""
    made = build("l: jmp l", options=RunOptions(seconds=seconds))
    ask, asked = made.machine.state.stop_engines, []

    def deaf_at_first() -> None:
        asked.append(seconds)
        if len(asked) > 1:
            ask()

    monkeypatch.setattr(made.machine.state, "stop_engines", deaf_at_first)
    if seconds == 60.0:
        threading.Timer(0.1, made.machine.break_in).start()
    assert made.run().reason == ("interrupted" if seconds == 60.0 else "time")
    assert len(asked) > 1
