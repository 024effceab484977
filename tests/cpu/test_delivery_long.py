"""Event delivery in IA-32e mode, rule by rule (SDM vol. 3, 6.14)."""

import pytest
from attrs import define
from delivery_fakes import (
    ACCESSED,
    CODE16,
    CODE32,
    CODE64,
    CONFORMING,
    DATA32,
    DPL3,
    IF,
    LDT,
    LMA,
    NT,
    PRESENT,
    RF,
    TF,
    TSS32,
    FakeMemory,
    FakeState,
    descriptor,
    gate64,
)

from vmm.cpu.delivery import Event, EventType, TripleFault, Vector, deliver
from vmm.cpu.state import Segment

GDT, IDT, TSS, STACK, RSP0 = 0x1000, 0x2000, 0x4000, 0x8000, 0xA000
HANDLER = 0xFFFF_8000_1234_5678
CATCH_ALL = 0xFFFF_8000_0000_0000
KERNEL_CS, KERNEL_SS, USER_SS, USER_CS = 0x08, 0x10, 0x1B, 0x23

EXTERNAL = Event(0x40, EventType.EXTERNAL_INTERRUPT)
INT_40 = Event(0x40, EventType.SOFTWARE_INTERRUPT, length=2)
INT1_40 = Event(0x40, EventType.PRIVILEGED_SOFTWARE_EXCEPTION, length=1)
EXCEPTION_40 = Event(0x40, EventType.HARDWARE_EXCEPTION)


@define
class Guest:
    """Vector 40h is the gate under test; the gates of exceptions always work, on IST 7."""

    state: FakeState
    memory: FakeMemory

    def gate(self, **fields) -> None:
        self.memory.put(IDT + 0x40 * 16, gate64(**({"offset": HANDLER} | fields)))

    def describe(self, selector: int, access_rights: int) -> None:
        self.memory.put(GDT + (selector & 0xFFF8), descriptor(access_rights))

    def deliver(self, event: Event = EXTERNAL) -> tuple[Event, ...]:
        return deliver(self.state, self.memory, event).events

    def fault(self, event: Event = EXTERNAL) -> tuple[Vector, int | None]:
        """The exception that replaces the event."""
        events = self.deliver(event)
        assert events[0] is event
        assert len(events) == 2, events
        assert self.state.rip == CATCH_ALL + events[1].vector
        return Vector(events[1].vector), events[1].error_code


def long_mode_guest(cpl: int = 0) -> Guest:
    memory = FakeMemory()
    selectors = (KERNEL_CS, CODE64), (KERNEL_SS, DATA32), (USER_SS, DATA32 | DPL3), (USER_CS, CODE64 | DPL3)
    for selector, access_rights in selectors:
        memory.put(GDT + (selector & 0xFFF8), descriptor(access_rights))
    for vector in range(32):
        memory.put(IDT + vector * 16, gate64(CATCH_ALL + vector, 0x30, ist=7))
    memory.put(GDT + 0x30, descriptor(CODE64))
    memory.put_word(TSS + 4, RSP0)
    memory.put_word(TSS + 36, 0xB000)
    memory.put_word(TSS + 36 + 6 * 8, 0xC000)
    state = FakeState(efer=LMA, rsp=STACK)
    state.segments["tr"] = Segment(0x28, TSS, 0x67, TSS32)
    state.segments["cs"] = Segment(USER_CS if cpl else KERNEL_CS, 0, 0xFFFF_FFFF, CODE64 | cpl << 5)
    state.segments["ss"] = Segment(USER_SS if cpl else KERNEL_SS, 0, 0xFFFF_FFFF, DATA32 | cpl << 5)
    guest = Guest(state, memory)
    guest.gate()
    return guest


# What the handler finds


def test_the_frame_is_ss_rsp_rflags_cs_rip_also_without_a_change_of_privilege():
    guest = long_mode_guest()
    assert guest.deliver() == (EXTERNAL,)
    assert guest.state.rsp == STACK - 40
    assert guest.memory.words(STACK - 40, 5) == [0x40_1000, KERNEL_CS, IF | 2, STACK, KERNEL_SS]
    assert guest.state.rip == HANDLER
    assert guest.state.segment("cs") == Segment(KERNEL_CS, 0, 0xFFFF_FFFF, CODE64)
    assert guest.state.segment("ss").selector == KERNEL_SS


def test_an_error_code_is_an_8_byte_slot_below_rip():
    guest = long_mode_guest()
    guest.gate()
    guest.deliver(Event(0x40, EventType.HARDWARE_EXCEPTION, error_code=0x1234))
    assert guest.state.rsp == STACK - 48
    assert guest.memory.words(STACK - 48, 2) == [0x1234, 0x40_1000]


@pytest.mark.parametrize("misalignment", [0, 1, 8, 15])
def test_rsp_is_aligned_down_to_16_before_the_pushes(misalignment):
    guest = long_mode_guest()
    guest.state.rsp = STACK + misalignment
    guest.deliver()
    assert guest.state.rsp == STACK - 40
    assert guest.memory.words(STACK - 40, 5)[3] == STACK + misalignment


def test_a_change_of_privilege_takes_rsp0_and_a_null_ss():
    guest = long_mode_guest(cpl=3)
    guest.deliver()
    assert guest.state.rsp == RSP0 - 40
    assert guest.memory.words(RSP0 - 40, 5) == [0x40_1000, USER_CS, IF | 2, STACK, USER_SS]
    assert guest.state.segment("ss") == Segment(0, 0, 0, 0)
    assert guest.state.cpl == 0


@pytest.mark.parametrize("level", [1, 2])
def test_inner_levels_take_their_own_rsp_and_an_ss_with_their_rpl(level):
    guest = long_mode_guest(cpl=3)
    guest.describe(0x38, CODE64 | level << 5)
    guest.memory.put_word(TSS + 4 + 8 * level, 0x9000 + level)
    guest.gate(selector=0x38)
    guest.deliver()
    assert guest.state.rsp == 0x9000 - 40
    assert guest.state.segment("cs").selector == 0x38 | level
    assert guest.state.segment("ss") == Segment(level, 0, 0, level << 5)
    assert guest.state.cpl == level


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("ist", range(1, 8))
def test_ist_switches_stacks_with_and_without_a_change_of_privilege(cpl, ist):
    guest = long_mode_guest(cpl)
    guest.gate(ist=ist)
    guest.memory.put_word(TSS + 28 + 8 * ist, 0xD008)
    guest.deliver()
    assert guest.state.rsp == 0xD000 - 40
    assert guest.memory.words(0xD000 - 40, 5)[3] == STACK
    assert guest.state.segment("ss").selector == (0 if cpl else KERNEL_SS)


def test_a_conforming_handler_stays_at_the_cpl_of_the_program():
    guest = long_mode_guest(cpl=3)
    guest.describe(0x38, CODE64 | CONFORMING)
    guest.gate(selector=0x38)
    guest.deliver()
    assert guest.state.cpl == 3
    assert guest.state.segment("cs").selector == 0x3B
    assert guest.state.rsp == STACK - 40
    assert ("write", STACK - 40, 40, True) in guest.memory.accesses


def test_only_pushes_to_a_user_stack_are_user_accesses():
    guest = long_mode_guest(cpl=3)
    guest.deliver()
    assert guest.memory.accesses
    assert not any(user for *_, user in guest.memory.accesses)


def test_compatibility_mode_saves_32_bits_of_rip():
    guest = long_mode_guest(cpl=3)
    guest.state.segments["cs"] = Segment(0x3B, 0, 0xFFFF_FFFF, CODE32 | DPL3)
    guest.state.rip = 0xFFFF_FFFF
    guest.deliver(Event(0x40, EventType.EXTERNAL_INTERRUPT))
    assert guest.memory.words(RSP0 - 40, 2) == [0xFFFF_FFFF, 0x3B]
    guest = long_mode_guest(cpl=3)
    guest.state.segments["cs"] = Segment(0x3B, 0, 0xFFFF_FFFF, CODE32 | DPL3)
    guest.state.rip = 0xFFFF_FFFF
    guest.gate(dpl=3)
    guest.deliver(INT_40)
    assert guest.memory.words(RSP0 - 40, 2) == [1, 0x3B]


# Flags


@pytest.mark.parametrize(("kind", "if_after"), [(0xE, 0), (0xF, IF)])
def test_an_interrupt_gate_clears_if_and_a_trap_gate_keeps_it(kind, if_after):
    guest = long_mode_guest()
    guest.state.rflags = IF | TF | NT | RF | 0x8D7
    guest.gate(kind=kind)
    guest.deliver()
    assert guest.state.rflags == if_after | 0x8D7
    assert guest.memory.words(STACK - 40, 3)[2] == IF | TF | NT | RF | 0x8D7


@pytest.mark.parametrize(
    ("event", "rf"),
    [
        (Event(Vector.UD, EventType.HARDWARE_EXCEPTION), RF),
        (Event(Vector.PF, EventType.HARDWARE_EXCEPTION, 2, cr2=0), RF),
        (Event(Vector.DB, EventType.HARDWARE_EXCEPTION, dr6=1 << 13), RF),
        (Event(Vector.DB, EventType.HARDWARE_EXCEPTION, dr6=1 << 14), 0),
        (Event(Vector.DB, EventType.HARDWARE_EXCEPTION, dr6=1), 0),
        (Event(Vector.DF, EventType.HARDWARE_EXCEPTION, 0), 0),
        (Event(Vector.BP, EventType.SOFTWARE_EXCEPTION, length=1), 0),
        (Event(Vector.GP, EventType.SOFTWARE_INTERRUPT, length=2), 0),
        (Event(Vector.GP, EventType.EXTERNAL_INTERRUPT), 0),
        (Event(Vector.NMI, EventType.NMI), 0),
    ],
)
@pytest.mark.parametrize("before", [0, RF])
def test_faults_push_rf_and_everything_else_pushes_what_it_was(event, rf, before):
    guest = long_mode_guest()
    guest.state.rflags |= before
    guest.deliver(event)
    saved = guest.memory.words(guest.state.rsp, 6)[3 if event.error_code is not None else 2]
    assert saved & RF == rf | before
    assert not guest.state.rflags & RF


@pytest.mark.parametrize(
    ("kind", "offset"),
    [
        (EventType.SOFTWARE_INTERRUPT, 2),
        (EventType.SOFTWARE_EXCEPTION, 2),
        (EventType.PRIVILEGED_SOFTWARE_EXCEPTION, 2),
        (EventType.HARDWARE_EXCEPTION, 0),
        (EventType.EXTERNAL_INTERRUPT, 0),
        (EventType.NMI, 0),
    ],
)
def test_software_events_return_behind_their_instruction(kind, offset):
    guest = long_mode_guest()
    guest.deliver(Event(0x40, kind, length=2))
    assert guest.memory.words(STACK - 40, 1) == [0x40_1000 + offset]


# CR2 and the debug registers


def test_a_page_fault_sets_cr2():
    guest = long_mode_guest()
    guest.deliver(Event(Vector.PF, EventType.HARDWARE_EXCEPTION, 2, cr2=0x1234_5678_9ABC))
    assert guest.state.cr2 == 0x1234_5678_9ABC


def test_a_debug_exception_sets_dr6_and_allows_its_handler_the_debug_registers():
    guest = long_mode_guest()
    guest.state.dr6 |= 0x8005
    guest.state.dr7 |= 1 << 13
    guest.deliver(Event(Vector.DB, EventType.HARDWARE_EXCEPTION, dr6=1 << 14 | 2))
    assert guest.state.dr6 == 0xFFFF_0FF0 | 0x8000 | 1 << 14 | 2
    assert guest.state.dr7 == 0x400


def test_int1_leaves_the_debug_registers_alone():
    guest = long_mode_guest()
    guest.state.dr7 |= 1 << 13
    before = guest.state.dr6, guest.state.dr7
    guest.deliver(Event(Vector.DB, EventType.PRIVILEGED_SOFTWARE_EXCEPTION, length=1))
    assert (guest.state.dr6, guest.state.dr7) == before


# Checks of the gate. The error code is vector * 8 + 2 (IDT) + EXT.

GATE = 0x40 * 8 + 2


@pytest.mark.parametrize(("limit", "ok"), [(0x40 * 16 + 15, True), (0x40 * 16 + 14, False)])
def test_the_whole_gate_must_lie_within_the_idt_limit(limit, ok):
    guest = long_mode_guest()
    guest.state.idtr = (IDT, limit)
    if ok:
        assert guest.deliver() == (EXTERNAL,)
    else:
        assert guest.fault() == (Vector.GP, GATE | 1)


@pytest.mark.parametrize("kind", [k for k in range(32) if k not in (0xE, 0xF)])
def test_only_64_bit_interrupt_and_trap_gates_are_gates(kind):
    guest = long_mode_guest()
    guest.gate(kind=kind)
    assert guest.fault() == (Vector.GP, GATE | 1)


def test_a_gate_that_is_not_present_is_np():
    guest = long_mode_guest()
    guest.gate(p=0)
    assert guest.fault() == (Vector.NP, GATE | 1)


@pytest.mark.parametrize(
    ("kind", "checked"),
    [
        (EventType.SOFTWARE_INTERRUPT, True),
        (EventType.SOFTWARE_EXCEPTION, True),
        (EventType.PRIVILEGED_SOFTWARE_EXCEPTION, False),
        (EventType.HARDWARE_EXCEPTION, False),
        (EventType.EXTERNAL_INTERRUPT, False),
        (EventType.NMI, False),
    ],
)
@pytest.mark.parametrize("dpl", range(4))
def test_int_n_int3_and_into_need_a_gate_with_dpl_of_at_least_cpl(kind, checked, dpl):
    guest = long_mode_guest(cpl=3)
    guest.gate(dpl=dpl)
    event = Event(0x40, kind, length=1)
    if checked and dpl < 3:
        assert guest.fault(event) == (Vector.GP, GATE)
    else:
        assert guest.deliver(event) == (event,)


def test_the_gate_dpl_comes_before_its_presence_and_its_type_before_both():
    guest = long_mode_guest(cpl=3)
    guest.gate(dpl=0, p=0)
    assert guest.fault(INT_40) == (Vector.GP, GATE)
    guest = long_mode_guest()
    guest.gate(kind=0, p=0)
    assert guest.fault() == (Vector.GP, GATE | 1)


# Checks of the code segment. The error code is its selector without RPL, + EXT.


@pytest.mark.parametrize(("event", "ext"), [(EXTERNAL, 1), (INT_40, 0), (INT1_40, 1), (EXCEPTION_40, 1)])
def test_ext_is_clear_only_for_software_interrupts(event, ext):
    guest = long_mode_guest()
    guest.gate(selector=0)
    vector, code = guest.fault(event)
    # A fault after a benign event is delivered as it is.
    assert (vector, code) == (Vector.GP, ext)


@pytest.mark.parametrize("selector", range(4))
def test_a_null_code_selector_is_gp_0(selector):
    guest = long_mode_guest()
    guest.memory.put(GDT, descriptor(CODE64))  # what a null selector must not reach
    guest.gate(selector=selector)
    assert guest.fault(INT_40) == (Vector.GP, 0)


@pytest.mark.parametrize("selector", [0x38, 0x3B])
def test_a_code_selector_beyond_the_gdt_is_gp(selector):
    guest = long_mode_guest()
    guest.describe(0x38, CODE64)
    guest.gate(selector=selector)
    guest.state.gdtr = (GDT, 0x3E)
    assert guest.fault() == (Vector.GP, 0x38 | 1)
    guest.state.gdtr = (GDT, 0x3F)
    assert guest.deliver() == (EXTERNAL,)


@pytest.mark.parametrize(
    ("access_rights", "expected"),
    [
        (DATA32, (Vector.GP, 0x39)),
        (CODE64 & ~0x10, (Vector.GP, 0x39)),  # a system descriptor
        (CODE64 | DPL3, (Vector.GP, 0x39)),  # DPL > CPL
        (CODE64 | DPL3 | CONFORMING, (Vector.GP, 0x39)),
        (CODE32, (Vector.GP, 0x39)),  # L clear
        (CODE16, (Vector.GP, 0x39)),
        (CODE64 | 0x4000, (Vector.GP, 0x39)),  # L and D set
        (CODE64 & ~PRESENT, (Vector.NP, 0x39)),
        (CODE64 & ~PRESENT | DPL3, (Vector.GP, 0x39)),  # privilege before presence
    ],
)
def test_the_code_segment_must_be_64_bit_code_that_is_present_and_privileged_enough(access_rights, expected):
    guest = long_mode_guest()
    guest.describe(0x38, access_rights)
    guest.gate(selector=0x38)
    assert guest.fault() == expected


def test_the_code_segment_can_come_from_the_ldt():
    guest = long_mode_guest()
    guest.state.segments["ldtr"] = Segment(0x50, 0x6000, 0xF, LDT)
    guest.memory.put(0x6008, descriptor(CODE64))
    guest.gate(selector=0xC)
    guest.deliver()
    assert guest.state.segment("cs").selector == 0xC


@pytest.mark.parametrize(("limit", "access_rights"), [(0xE, LDT), (0xF, 0)])
def test_an_ldt_selector_beyond_the_ldt_or_without_one_is_gp(limit, access_rights):
    guest = long_mode_guest()
    guest.state.segments["ldtr"] = Segment(0x50, 0x6000, limit, access_rights)
    guest.memory.put(0x6008, descriptor(CODE64))
    guest.gate(selector=0xF)
    assert guest.fault() == (Vector.GP, 0xC | 1)


@pytest.mark.parametrize("accessed", [0, ACCESSED])
def test_the_accessed_bit_of_the_code_segment_is_set_by_a_supervisor_write_if_it_is_clear(accessed):
    guest = long_mode_guest(cpl=3)
    guest.describe(0x38, CODE64 & ~ACCESSED | accessed)
    guest.gate(selector=0x38)
    guest.deliver()
    assert guest.memory.data[GDT + 0x38 : GDT + 0x40] == descriptor(CODE64)
    assert guest.state.segment("cs").access_rights == CODE64
    assert (("write", GDT + 0x3D, 1, False) in guest.memory.accesses) is not bool(accessed)


# Checks of the stack and of the target


@pytest.mark.parametrize(
    ("cpl", "ist", "limit", "ok"),
    [(3, 0, 11, True), (3, 0, 10, False), (0, 1, 43, True), (0, 1, 42, False), (3, 1, 42, False)],
)
def test_the_stack_pointer_must_lie_within_the_tss_limit(cpl, ist, limit, ok):
    guest = long_mode_guest(cpl)
    guest.gate(ist=ist)
    if ok:
        guest.state.segments["tr"] = Segment(0x28, TSS, limit, TSS32)
        assert guest.deliver() == (EXTERNAL,)
    else:
        for vector in (Vector.TS, Vector.DF):  # their own gates must not need the TSS
            guest.memory.put(IDT + vector * 16, gate64(CATCH_ALL + vector, 0x33))
        guest.describe(0x30, CODE64 | CONFORMING)
        guest.state.segments["tr"] = Segment(0x28, TSS, limit, TSS32)
        assert guest.fault() == (Vector.TS, 0x28 | 1)


LOW_END, HIGH_START = 0x8000_0000_0000, 0xFFFF_8000_0000_0000


@pytest.mark.parametrize(
    ("rsp", "la57", "ok"),
    [
        (LOW_END - 16, False, True),
        (LOW_END, False, False),
        (LOW_END, True, True),
        (HIGH_START, False, False),  # canonical itself, but the pushes are not
        (HIGH_START, True, True),
        (HIGH_START + 48, False, True),
        (HIGH_START + 32, False, False),
        (1 << 56, True, False),
        (0, False, True),  # pushes go to the top of the address space
        (16, False, True),
    ],
)
def test_the_stack_must_be_canonical(rsp, la57, ok):
    guest = long_mode_guest(cpl=3)
    guest.state.cr4 = la57 << 12
    guest.memory.put_word(TSS + 4, rsp)
    if ok:
        assert guest.deliver() == (EXTERNAL,)
        assert guest.state.rsp == (rsp - 40) % (1 << 64)
    else:
        assert guest.fault() == (Vector.SS, 1)


@pytest.mark.parametrize("event", [EXTERNAL, INT_40])
def test_a_target_that_is_not_canonical_is_gp(event):
    guest = long_mode_guest()
    guest.gate(offset=LOW_END)
    assert guest.fault(event) == (Vector.GP, event.ext)


def test_the_stack_is_checked_before_the_target():
    guest = long_mode_guest()
    guest.gate(offset=LOW_END)
    guest.state.rsp = LOW_END
    assert guest.fault() == (Vector.SS, 1)


def test_a_gdt_at_an_address_that_is_not_canonical_is_gp():
    guest = long_mode_guest()
    guest.state.gdtr = (LOW_END, 0xFFF)
    guest.state.segments["ldtr"] = Segment(0x50, 0x6000, 0xF, LDT)
    guest.memory.put(0x6008, descriptor(CODE64))
    guest.memory.put(IDT + Vector.GP * 16, gate64(CATCH_ALL + Vector.GP, 0xC, ist=7))
    assert guest.fault() == (Vector.GP, 1)


def test_an_idt_at_an_address_that_is_not_canonical_is_the_end():
    guest = long_mode_guest()
    guest.state.idtr = (LOW_END, 0xFFF)
    with pytest.raises(TripleFault):
        guest.deliver()
