"""Event delivery in protected and virtual-8086 mode, rule by rule (SDM vol. 2, "INT n"; vol. 3, 6.12)."""

import pytest
from attrs import define
from delivery_fakes import (
    ACCESSED,
    CODE16,
    CODE32,
    CONFORMING,
    DATA16,
    DATA32,
    DPL3,
    IF,
    IOPL3,
    NT,
    PRESENT,
    RF,
    TF,
    TSS16,
    TSS32,
    VM,
    FakeMemory,
    FakeState,
    descriptor,
    gate32,
)

from vmm.cpu.delivery import Event, EventType, TripleFault, Vector, deliver
from vmm.cpu.state import Segment
from vmm.errors import GuestError

GDT, IDT, TSS, STACK, ESP0 = 0x1000, 0x2000, 0x4000, 0x8000, 0xA000
HANDLER, HANDLER16 = 0x0012_3456, 0x3456
CATCH_ALL = 0x7000
KERNEL_CS, KERNEL_SS, USER_SS, USER_CS = 0x08, 0x10, 0x1B, 0x23
EXTERNAL = Event(0x40, EventType.EXTERNAL_INTERRUPT)
INT_40 = Event(0x40, EventType.SOFTWARE_INTERRUPT, length=2)
GATE = 0x40 * 8 + 2

INTERRUPT16, TRAP16, INTERRUPT32, TRAP32, TASK = 6, 7, 0xE, 0xF, 5


@define
class Guest:
    """Vector 40h is the gate under test; exceptions have conforming handlers, which need no new stack."""

    state: FakeState
    memory: FakeMemory

    def gate(self, **fields) -> None:
        self.memory.put(IDT + 0x40 * 8, gate32(**({"offset": HANDLER} | fields)))

    def describe(self, selector: int, access_rights: int, **fields: int) -> None:
        self.memory.put(GDT + (selector & 0xFFF8), descriptor(access_rights, **fields))

    def inner_stack(self, ss: int, esp: int) -> None:
        self.memory.put_word(TSS + 4, esp, 4)
        self.memory.put_word(TSS + 8, ss, 2)

    def deliver(self, event: Event = EXTERNAL) -> tuple[Event, ...]:
        return deliver(self.state, self.memory, event).events

    def fault(self, event: Event = EXTERNAL) -> tuple[Vector, int | None]:
        """The exception that replaces the event."""
        events = self.deliver(event)
        assert events[0] is event
        assert len(events) == 2, events
        assert self.state.rip == CATCH_ALL + events[1].vector
        return Vector(events[1].vector), events[1].error_code


def protected_guest(cpl: int = 0) -> Guest:
    memory = FakeMemory()
    selectors = (
        (KERNEL_CS, CODE32),
        (KERNEL_SS, DATA32),
        (USER_SS, DATA32 | DPL3),
        (USER_CS, CODE32 | DPL3),
        (0x30, CODE32 | CONFORMING),
    )
    for selector, access_rights in selectors:
        memory.put(GDT + (selector & 0xFFF8), descriptor(access_rights))
    for vector in range(32):
        memory.put(IDT + vector * 8, gate32(CATCH_ALL + vector, 0x30))
    state = FakeState(rsp=STACK)
    state.segments["tr"] = Segment(0x28, TSS, 0x67, TSS32)
    state.segments["cs"] = Segment(USER_CS if cpl else KERNEL_CS, 0, 0xFFFF_FFFF, CODE32 | cpl << 5)
    state.segments["ss"] = Segment(USER_SS if cpl else KERNEL_SS, 0, 0xFFFF_FFFF, DATA32 | cpl << 5)
    guest = Guest(state, memory)
    guest.gate()
    guest.inner_stack(KERNEL_SS, ESP0)
    return guest


def virtual_8086_guest() -> Guest:
    """Exceptions go to ring 0 on a stack that always has room."""
    guest = protected_guest()
    for vector in range(32):
        guest.memory.put(IDT + vector * 8, gate32(CATCH_ALL + vector, KERNEL_CS))
    guest.state.rflags |= VM | IOPL3
    guest.state.rip = 0x100
    guest.state.rsp = 0x200
    names = {"cs": 0x1111, "ss": 0x2222, "ds": 0x3333, "es": 0x4444, "fs": 0x5555, "gs": 0x6666}
    for name, selector in names.items():
        guest.state.segments[name] = Segment(selector, selector << 4, 0xFFFF, 0xF3)
    return guest


# What the handler finds


def test_without_a_change_of_privilege_eflags_cs_and_eip_are_pushed_on_the_same_stack():
    guest = protected_guest()
    assert guest.deliver() == (EXTERNAL,)
    assert guest.state.rsp == STACK - 12
    assert guest.memory.words(STACK - 12, 3, 4) == [0x40_1000, KERNEL_CS, IF | 2]
    assert guest.state.rip == HANDLER
    assert guest.state.segment("cs") == Segment(KERNEL_CS, 0, 0xFFFF_FFFF, CODE32)
    assert guest.state.segment("ss").selector == KERNEL_SS


def test_a_change_of_privilege_pushes_ss_and_esp_first_on_the_stack_of_the_tss():
    guest = protected_guest(cpl=3)
    guest.deliver()
    assert guest.state.rsp == ESP0 - 20
    assert guest.memory.words(ESP0 - 20, 5, 4) == [0x40_1000, USER_CS, IF | 2, STACK, USER_SS]
    assert guest.state.segment("ss") == Segment(KERNEL_SS, 0, 0xFFFF_FFFF, DATA32)
    assert guest.state.cpl == 0


@pytest.mark.parametrize("kind", [INTERRUPT16, TRAP16])
def test_a_16_bit_gate_has_slots_and_a_target_of_16_bits(kind):
    guest = protected_guest(cpl=3)
    guest.gate(kind=kind)
    guest.deliver(Event(0x40, EventType.HARDWARE_EXCEPTION, error_code=0x12345))
    assert guest.state.rip == HANDLER16
    assert guest.state.rsp == ESP0 - 12
    assert guest.memory.words(ESP0 - 12, 6, 2) == [0x2345, 0x1000, USER_CS, IF | 2, STACK, USER_SS]


@pytest.mark.parametrize("cpl", [0, 3])
def test_an_error_code_of_a_32_bit_gate_is_4_bytes_below_eip(cpl):
    guest = protected_guest(cpl)
    guest.deliver(Event(0x40, EventType.HARDWARE_EXCEPTION, error_code=0x12345))
    assert guest.memory.words(guest.state.rsp, 2, 4) == [0x12345, 0x40_1000]


def test_a_16_bit_tss_has_ss_and_sp_of_2_bytes_each():
    guest = protected_guest(cpl=3)
    guest.state.segments["tr"] = Segment(0x28, TSS, 0x2B, TSS16)
    guest.memory.put_word(TSS + 2, 0xB000, 2)
    guest.memory.put_word(TSS + 4, KERNEL_SS, 2)
    guest.deliver()
    assert guest.state.rsp == 0xB000 - 20


@pytest.mark.parametrize("level", [1, 2])
def test_inner_levels_take_their_own_stack(level):
    guest = protected_guest(cpl=3)
    guest.describe(0x38, CODE32 | level << 5)
    guest.describe(0x40, DATA32 | level << 5)
    guest.memory.put_word(TSS + 4 + 8 * level, 0xC000, 4)
    guest.memory.put_word(TSS + 8 + 8 * level, 0x40 | level, 2)
    guest.gate(selector=0x38)
    guest.deliver()
    assert guest.state.rsp == 0xC000 - 20
    assert guest.state.segment("cs").selector == 0x38 | level
    assert guest.state.segment("ss").selector == 0x40 | level
    assert guest.state.cpl == level


def test_a_null_stack_selector_is_ts_also_with_the_right_rpl():
    guest = protected_guest(cpl=3)
    guest.memory.put(GDT, descriptor(DATA32 | 1 << 5))  # what a null selector must not reach
    guest.describe(0x38, CODE32 | 1 << 5)
    guest.memory.put_word(TSS + 16, 1, 2)
    guest.gate(selector=0x38)
    assert guest.fault() == (Vector.TS, 1)


def test_a_conforming_handler_stays_at_the_cpl_and_on_the_stack_of_the_program():
    guest = protected_guest(cpl=3)
    guest.gate(selector=0x30)
    guest.deliver()
    assert guest.state.segment("cs").selector == 0x33
    assert guest.state.cpl == 3
    assert ("write", STACK - 12, 12, True) in guest.memory.accesses


def test_segment_bases_count_and_addresses_wrap_at_4_gib():
    guest = protected_guest(cpl=3)
    guest.describe(KERNEL_SS, DATA32, base=0xFFFF_6000 - 2)
    guest.deliver()
    assert guest.state.rsp == ESP0 - 20
    assert [a[1:3] for a in guest.memory.accesses if a[0] == "write"] == [(0xFFFF_FFEA, 20)]
    guest = protected_guest(cpl=3)
    guest.describe(KERNEL_SS, DATA32, base=0xFFFF_6000 + 6)
    guest.deliver()
    assert [a[1:3] for a in guest.memory.accesses if a[0] == "write"] == [(0xFFFF_FFF2, 14), (0, 6)]
    assert guest.memory.words(2, 1, 4) == [USER_SS]


def test_with_a_16_bit_stack_only_sp_moves():
    guest = protected_guest()
    guest.state.segments["ss"] = Segment(KERNEL_SS, 0, 0xFFFF, DATA16)
    guest.state.rsp = 0xABCD_0004
    guest.deliver()
    assert guest.state.rsp == 0xABCD_FFF8
    assert guest.memory.words(0, 1, 4) == [IF | 2]
    assert guest.memory.words(0xFFF8, 2, 4) == [0x40_1000, KERNEL_CS]


# Flags


@pytest.mark.parametrize(
    ("kind", "if_after"), [(INTERRUPT16, 0), (TRAP16, IF), (INTERRUPT32, 0), (TRAP32, IF)]
)
def test_an_interrupt_gate_clears_if_and_a_trap_gate_keeps_it(kind, if_after):
    guest = protected_guest()
    guest.state.rflags = IF | TF | NT | RF | 0x8D7
    guest.gate(kind=kind)
    guest.deliver()
    assert guest.state.rflags == if_after | 0x8D7


# Checks of the gate and of the code segment


@pytest.mark.parametrize(("limit", "ok"), [(0x40 * 8 + 7, True), (0x40 * 8 + 6, False)])
def test_the_whole_gate_must_lie_within_the_idt_limit(limit, ok):
    guest = protected_guest()
    guest.state.idtr = (IDT, limit)
    assert guest.deliver() == (EXTERNAL,) if ok else guest.fault() == (Vector.GP, GATE | 1)


@pytest.mark.parametrize("kind", [k for k in range(32) if k not in (5, 6, 7, 0xE, 0xF)])
def test_call_gates_and_other_descriptors_are_no_gates(kind):
    guest = protected_guest()
    guest.gate(kind=kind)
    assert guest.fault() == (Vector.GP, GATE | 1)


def test_a_gate_that_is_not_present_is_np():
    guest = protected_guest()
    guest.gate(p=0)
    assert guest.fault() == (Vector.NP, GATE | 1)


@pytest.mark.parametrize("dpl", range(4))
def test_int_n_needs_a_gate_with_dpl_of_at_least_cpl(dpl):
    guest = protected_guest(cpl=3)
    guest.gate(dpl=dpl)
    assert guest.deliver(INT_40) == (INT_40,) if dpl == 3 else guest.fault(INT_40) == (Vector.GP, GATE)


def test_a_task_gate_is_refused_by_name():
    guest = protected_guest()
    guest.gate(kind=TASK)
    before = guest.state.snapshot(), bytes(guest.memory.data)
    with pytest.raises(GuestError, match="vector 0x40 at RIP 0x401000 goes through a task gate"):
        guest.deliver()
    assert (guest.state.snapshot(), bytes(guest.memory.data)) == before


@pytest.mark.parametrize(
    ("selector", "access_rights", "expected"),
    [
        (0, CODE32, (Vector.GP, 1)),
        (3, CODE32, (Vector.GP, 1)),
        (0x38, DATA32, (Vector.GP, 0x39)),
        (0x38, CODE32 & ~0x10, (Vector.GP, 0x39)),
        (0x38, CODE32 | DPL3, (Vector.GP, 0x39)),
        (0x38, CODE32 & ~PRESENT, (Vector.NP, 0x39)),
        (0x1000, CODE32, (Vector.GP, 0x1001)),
        (0x3C, CODE32, (Vector.GP, 0x3D)),  # no LDT
    ],
)
def test_the_code_segment_is_checked(selector, access_rights, expected):
    guest = protected_guest()
    if selector == 0x38:
        guest.describe(0x38, access_rights)
    guest.gate(selector=selector)
    assert guest.fault() == expected


@pytest.mark.parametrize(("limit", "ok"), [(0x23456, True), (0x23455, False)])
def test_the_target_must_lie_within_the_code_segment(limit, ok):
    guest = protected_guest()
    guest.describe(0x38, CODE32 & ~0x8000, limit=limit)
    guest.gate(selector=0x38, offset=0x23456)
    assert guest.deliver() == (EXTERNAL,) if ok else guest.fault() == (Vector.GP, 1)


# Checks of the inner stack


@pytest.mark.parametrize(
    ("access_rights", "limit", "ok"),
    [(TSS32, 9, True), (TSS32, 8, False), (TSS16, 5, True), (TSS16, 4, False)],
)
def test_ss_and_esp_must_lie_within_the_tss(access_rights, limit, ok):
    guest = protected_guest(cpl=3)
    guest.state.segments["tr"] = Segment(0x28, TSS, limit, access_rights)
    if access_rights == TSS16:
        guest.memory.put_word(TSS + 2, ESP0, 2)
        guest.memory.put_word(TSS + 4, KERNEL_SS, 2)
    assert guest.deliver() == (EXTERNAL,) if ok else guest.fault() == (Vector.TS, 0x28 | 1)


@pytest.mark.parametrize(
    ("ss", "access_rights", "expected"),
    [
        (0, DATA32, (Vector.TS, 1)),
        (3, DATA32, (Vector.TS, 1)),
        (0x1000, DATA32, (Vector.TS, 0x1001)),
        (0x3B, DATA32, (Vector.TS, 0x39)),  # RPL is not the new CPL
        (0x38, DATA32 | DPL3, (Vector.TS, 0x39)),  # DPL is not the new CPL
        (0x38, DATA32 & ~2, (Vector.TS, 0x39)),  # not writable
        (0x38, CODE32, (Vector.TS, 0x39)),
        (0x38, DATA32 & ~0x10, (Vector.TS, 0x39)),  # a system descriptor
        (0x38, DATA32 & ~PRESENT, (Vector.SS, 0x39)),
        (0x38, DATA32 & ~PRESENT | DPL3, (Vector.TS, 0x39)),
    ],
)
def test_the_inner_stack_segment_is_checked(ss, access_rights, expected):
    guest = protected_guest(cpl=3)
    guest.describe(0x38, access_rights)
    guest.memory.put(GDT, descriptor(access_rights))  # a null selector never gets that far
    guest.inner_stack(ss, ESP0)
    assert guest.fault() == expected


@pytest.mark.parametrize(
    ("access_rights", "limit", "esp", "ok"),
    [
        (DATA32 & ~0x8000, 0x9FFF, ESP0, True),
        (DATA32 & ~0x8000, 0x9FFE, ESP0, False),
        (DATA32, 0xFFFFF, 0, True),  # wraps to the top of a flat segment
        (DATA32, 0xFFFFF, 20, True),
        (DATA32, 0xFFFFF, 18, False),  # a slot may not wrap
        (DATA16, 0xFFFF, 0, True),
        (DATA16, 0xFFFE, 0, False),
        # Expand down: valid are the offsets above the limit.
        (DATA32 & ~0x8000 | 4, ESP0 - 21, ESP0, True),
        (DATA32 & ~0x8000 | 4, ESP0 - 20, ESP0, False),
        (DATA32 & ~0x8000 | 4, 0x100, 0, True),
        (DATA16 | 4, 0x100, 0, True),
        (DATA16 | 4, 0xFFF0, 0, False),
        (DATA16 | 4, 0x100, 2, False),
    ],
)
def test_the_inner_stack_must_have_room_within_its_limit(access_rights, limit, esp, ok):
    guest = protected_guest(cpl=3)
    guest.describe(0x38, access_rights, limit=limit)
    guest.inner_stack(0x38, esp)
    assert guest.deliver() == (EXTERNAL,) if ok else guest.fault() == (Vector.SS, 0x39)


def test_no_room_on_the_same_stack_is_ss_without_a_selector():
    guest = protected_guest(cpl=3)
    guest.gate(selector=0x30)  # conforming: it stays on the user's stack
    guest.memory.put(IDT + 12 * 8, gate32(CATCH_ALL + 12, KERNEL_CS))
    guest.state.rsp = 6
    assert guest.fault() == (Vector.SS, 1)


@pytest.mark.parametrize("accessed", [0, ACCESSED])
def test_accessed_bits_of_both_loaded_segments_are_set_if_they_are_clear(accessed):
    guest = protected_guest(cpl=3)
    guest.describe(KERNEL_CS, CODE32 & ~ACCESSED | accessed)
    guest.describe(KERNEL_SS, DATA32 & ~ACCESSED | accessed)
    guest.deliver()
    assert guest.memory.data[GDT + 8 : GDT + 24] == descriptor(CODE32) + descriptor(DATA32)
    assert guest.state.segment("ss").access_rights == DATA32
    writes = [a[1:] for a in guest.memory.accesses if a[0] == "write"]
    assert writes[:-1] == ([] if accessed else [(GDT + 0xD, 1, False), (GDT + 0x15, 1, False)])


# From virtual-8086 mode


@pytest.mark.parametrize(("kind", "size"), [(INTERRUPT32, 4), (INTERRUPT16, 2)])
def test_leaving_virtual_8086_mode_pushes_and_clears_the_data_segments(kind, size):
    guest = virtual_8086_guest()
    guest.gate(kind=kind, offset=HANDLER16)
    flags = guest.state.rflags
    guest.deliver()
    assert guest.state.rsp == ESP0 - 9 * size
    assert guest.memory.words(ESP0 - 9 * size, 9, size) == [
        0x100, 0x1111, flags & (1 << 8 * size) - 1, 0x200, 0x2222, 0x4444, 0x3333, 0x5555, 0x6666,
    ]  # fmt: skip
    assert [guest.state.segment(name) for name in ("ds", "es", "fs", "gs")] == [Segment(0, 0, 0, 0)] * 4
    assert not guest.state.rflags & VM
    assert guest.state.cpl == 0
    assert guest.state.segment("cs").selector == KERNEL_CS


@pytest.mark.parametrize("access_rights", [CODE32 | CONFORMING, CODE32 | 1 << 5, CODE16 | DPL3])
def test_virtual_8086_mode_is_left_only_to_ring_0(access_rights):
    guest = virtual_8086_guest()
    guest.describe(0x38, access_rights)
    guest.gate(selector=0x38)
    assert guest.fault() == (Vector.GP, 0x39)


@pytest.mark.parametrize("iopl", range(4))
@pytest.mark.parametrize("kind", [EventType.SOFTWARE_INTERRUPT, EventType.SOFTWARE_EXCEPTION])
def test_int_n_but_not_int3_needs_iopl_3_in_virtual_8086_mode(iopl, kind):
    guest = virtual_8086_guest()
    guest.state.rflags = VM | iopl << 12 | 2
    guest.gate(dpl=3)
    event = Event(0x40, kind, length=2)
    if kind is EventType.SOFTWARE_INTERRUPT and iopl < 3:
        assert guest.fault(event) == (Vector.GP, 0)
    else:
        assert guest.deliver(event) == (event,)


def test_int_n_with_virtual_mode_extensions_is_refused_by_name():
    guest = virtual_8086_guest()
    guest.state.cr4 = 1
    with pytest.raises(GuestError, match=r"CR4\.VME"):
        guest.deliver(INT_40)


# Real mode


def real_mode_guest() -> Guest:
    state = FakeState(cr0=0, rip=0x100, rsp=0x200, idtr=(0, 0x3FF), rflags=IF | 2)
    state.segments["cs"] = Segment(0x1000, 0x10000, 0xFFFF, 0x9B)
    state.segments["ss"] = Segment(0x800, 0x8000, 0xFFFF, 0x93)
    guest = Guest(state, FakeMemory())
    for vector in range(256):
        guest.memory.put_word(vector * 4, 0xF000 << 16 | CATCH_ALL + vector, 4)
    return guest


def test_real_mode_goes_through_a_table_of_far_pointers():
    guest = real_mode_guest()
    guest.state.rflags = IF | TF | 0x40000 | 0xC07
    guest.deliver(INT_40)
    assert guest.memory.words(0x81FA, 3, 2) == [0x102, 0x1000, IF | TF | 0xC07]
    assert guest.state.rsp == 0x1FA
    assert guest.state.rip == CATCH_ALL + 0x40
    assert guest.state.rflags == 0xC07
    assert guest.state.segment("cs") == Segment(0xF000, 0xF0000, 0xFFFF, 0x9B)


def test_real_mode_pushes_no_error_code_and_takes_its_table_from_idtr():
    guest = real_mode_guest()
    guest.state.idtr = (0x3000, 0x3FF)
    guest.memory.put_word(0x3000 + 13 * 4, 0x1234_5678, 4)
    guest.deliver(Event(Vector.GP, EventType.HARDWARE_EXCEPTION, 0))
    assert guest.state.rsp == 0x1FA
    assert (guest.state.segment("cs").base, guest.state.rip) == (0x12340, 0x5678)


@pytest.mark.parametrize(("sp", "ok"), [(0, True), (2, True), (6, True), (1, False), (3, False)])
def test_a_real_mode_stack_wraps_between_slots_but_not_within_one(sp, ok):
    guest = real_mode_guest()
    guest.state.rsp = sp
    if ok:
        assert guest.deliver() == (EXTERNAL,)
        assert guest.state.rsp == (sp - 6) % 0x10000
    else:
        with pytest.raises(TripleFault, match="triple fault: vector 64, then vector 12, then vector 8"):
            guest.deliver()


def test_a_vector_beyond_the_real_mode_table_is_gp():
    guest = real_mode_guest()
    guest.state.idtr = (0, 0x40 * 4 + 2)
    assert guest.fault() == (Vector.GP, 0)
    guest.state.idtr = (0, 0x40 * 4 + 3)
    assert guest.deliver() == (EXTERNAL,)


def test_a_target_beyond_the_real_mode_code_limit_is_gp():
    guest = real_mode_guest()
    guest.state.segments["cs"] = Segment(0x1000, 0x10000, CATCH_ALL + 13, 0x9B)
    assert guest.fault() == (Vector.GP, 0)
