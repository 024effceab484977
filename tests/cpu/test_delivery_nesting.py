"""Faults on the way to a handler: which event comes out, and that nothing else does (SDM vol. 3, 6.15)."""

import copy

import pytest
from attrs import evolve
from delivery_fakes import (
    CODE64,
    LMA,
    PAGE,
    RF,
    gate64,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_delivery_long import CATCH_ALL, EXTERNAL, GDT, IDT, STACK, TSS, long_mode_guest
from test_delivery_protected import protected_guest, real_mode_guest, virtual_8086_guest

from vmm.cpu.delivery import Event, EventType, TripleFault, Vector, combine, deliver
from vmm.errors import GuestError, OptionError

# Table 6-5


def exception(vector: int) -> Event:
    return Event(vector, EventType.HARDWARE_EXCEPTION)


CONTRIBUTORY = [exception(v) for v in (0, 10, 11, 12, 13, 21)]
PAGE_FAULTS = [exception(14), exception(20)]
BENIGN = [
    *(exception(v) for v in (1, 3, 4, 5, 6, 7, 16, 17, 18, 19)),
    Event(Vector.NMI, EventType.NMI),
    *(Event(v, EventType.EXTERNAL_INTERRUPT) for v in (8, 13, 14, 0x40)),
    *(Event(v, EventType.SOFTWARE_INTERRUPT, length=2) for v in (8, 13, 14, 0x40)),
]
DOUBLE_FAULT = Event(Vector.DF, EventType.HARDWARE_EXCEPTION, 0)
SECOND, DOUBLE, TRIPLE = "second", "double fault", "triple fault"


@pytest.mark.parametrize(
    ("firsts", "seconds", "result"),
    [
        (BENIGN, BENIGN + CONTRIBUTORY + PAGE_FAULTS, SECOND),
        (CONTRIBUTORY, BENIGN + PAGE_FAULTS, SECOND),
        (CONTRIBUTORY, CONTRIBUTORY, DOUBLE),
        (PAGE_FAULTS, BENIGN, SECOND),
        (PAGE_FAULTS, CONTRIBUTORY + PAGE_FAULTS, DOUBLE),
        ([DOUBLE_FAULT], BENIGN, SECOND),
        ([DOUBLE_FAULT], CONTRIBUTORY + PAGE_FAULTS, TRIPLE),
    ],
)
def test_two_events_combine_by_their_classes(firsts, seconds, result):
    for first in firsts:
        for second in seconds:
            if result is TRIPLE:
                with pytest.raises(TripleFault):
                    combine(first, second)
            else:
                assert combine(first, second) == (second if result is SECOND else DOUBLE_FAULT)


@pytest.mark.parametrize(
    "fields",
    [{"vector": -1}, {"vector": 256}, {"length": 16}, {"error_code": 1 << 32}, {"cr2": 1 << 64}, {"dr6": -1}],
)
def test_an_event_that_no_processor_could_deliver_is_refused(fields):
    with pytest.raises(OptionError):
        Event(**({"vector": 0, "type": EventType.HARDWARE_EXCEPTION} | fields))


# Whole deliveries


def break_gate(guest, *vectors):
    for vector in vectors:
        guest.memory.put(IDT + vector * 16, gate64(0, p=0))


def test_a_fault_while_an_interrupt_is_delivered_replaces_it_and_returns_to_the_program():
    guest = long_mode_guest()
    break_gate(guest, 0x40)
    assert guest.deliver() == (EXTERNAL, Event(Vector.NP, EventType.HARDWARE_EXCEPTION, 0x40 * 8 + 3))
    assert guest.state.rip == CATCH_ALL + Vector.NP
    assert guest.memory.words(guest.state.rsp, 4)[1:4:2] == [0x40_1000, guest.state.rflags | 1 << 9 | RF]


def test_a_fault_while_int_n_is_delivered_returns_to_the_int_n():
    guest = long_mode_guest()
    break_gate(guest, 0x40)
    guest.deliver(Event(0x40, EventType.SOFTWARE_INTERRUPT, length=2))
    assert guest.memory.words(guest.state.rsp, 2) == [0x40 * 8 + 2, 0x40_1000]


def test_contributory_twice_is_a_double_fault_with_error_code_0():
    guest = long_mode_guest()
    break_gate(guest, Vector.GP)
    gp = Event(Vector.GP, EventType.HARDWARE_EXCEPTION, 0)
    assert guest.deliver(gp) == (gp, DOUBLE_FAULT)
    assert guest.state.rip == CATCH_ALL + Vector.DF
    assert guest.memory.words(guest.state.rsp, 2) == [0, 0x40_1000]


def test_an_interrupt_can_end_in_a_double_fault_and_a_double_fault_in_the_end():
    guest = long_mode_guest()
    break_gate(guest, 0x40, Vector.NP)
    events = guest.deliver()
    assert [event.vector for event in events] == [0x40, Vector.NP, Vector.DF]
    guest = long_mode_guest()
    break_gate(guest, 0x40, Vector.NP, Vector.DF)
    before = guest.state.snapshot(), bytes(guest.memory.data)
    with pytest.raises(TripleFault, match="triple fault: vector 64, then vector 11, then vector 8") as caught:
        guest.deliver()
    assert [event.vector for event in caught.value.events] == [0x40, Vector.NP, Vector.DF]
    assert (guest.state.snapshot(), bytes(guest.memory.data)) == before


@pytest.mark.parametrize(
    ("where", "address", "error_code"),
    [("absent", STACK - 40, 2), ("read_only", STACK - 40, 3)],
)
def test_a_stack_that_faults_is_a_page_fault_with_cr2(where, address, error_code):
    guest = long_mode_guest()
    getattr(guest.memory, where).add(address // PAGE)
    events = guest.deliver()
    assert events == (EXTERNAL, Event(14, EventType.HARDWARE_EXCEPTION, error_code, cr2=address))
    assert guest.state.cr2 == address


def test_pushes_to_the_stack_of_a_user_are_user_accesses():
    guest = long_mode_guest(cpl=3)
    guest.describe(0x38, CODE64 | 4)
    guest.gate(selector=0x38)
    guest.memory.supervisor.add((STACK - 40) // PAGE)
    assert guest.fault() == (Vector.PF, 7)


def test_a_page_fault_during_a_page_fault_is_a_double_fault_and_cr2_is_the_second_address():
    guest = long_mode_guest()
    guest.memory.put(IDT + 14 * 16, gate64(CATCH_ALL + 14))
    guest.memory.absent.add((STACK - 48) // PAGE)
    events = guest.deliver(Event(14, EventType.HARDWARE_EXCEPTION, 0, cr2=0x1234))
    assert [event.vector for event in events] == [14, 8]
    assert guest.state.cr2 == STACK - 48


def test_a_page_fault_replaced_by_a_double_fault_leaves_its_address_in_cr2():
    guest = long_mode_guest()
    break_gate(guest, Vector.PF)
    events = guest.deliver(Event(14, EventType.HARDWARE_EXCEPTION, 0, cr2=0x1234))
    assert events[1] == DOUBLE_FAULT
    assert guest.state.cr2 == 0x1234


@pytest.mark.parametrize("page", [GDT // PAGE, IDT // PAGE])
def test_tables_that_are_not_there_end_in_a_triple_fault_with_nothing_changed(page):
    guest = long_mode_guest()
    guest.memory.absent.add(page)
    guest.memory.absent.add(TSS // PAGE)
    memory = bytes(guest.memory.data)
    rip, rsp = guest.state.rip, guest.state.rsp
    with pytest.raises(TripleFault):
        guest.deliver()
    assert (memory, rip, rsp) == (bytes(guest.memory.data), guest.state.rip, guest.state.rsp)


def test_an_accessed_bit_that_cannot_be_set_leaves_the_stack_unwritten():
    guest = long_mode_guest()
    guest.describe(0x38, CODE64 & ~1)
    guest.gate(selector=0x38)
    guest.memory.read_only.add(GDT // PAGE)
    assert guest.fault() == (Vector.PF, 3)
    assert guest.state.cr2 == GDT + 0x3D
    assert guest.memory.data[STACK - 40 : STACK] == bytes(40)


def test_a_frame_that_straddles_into_a_page_that_faults_is_not_written_at_all():
    guest = long_mode_guest()
    guest.describe(0x38, CODE64 & ~1)
    guest.gate(selector=0x38)
    guest.state.rsp = STACK + 16
    guest.memory.absent.add(STACK // PAGE - 1)
    assert guest.fault() == (Vector.PF, 2)
    assert guest.memory.data[STACK : STACK + 16] == bytes(16)
    assert guest.memory.data[GDT + 0x3D] & 1 == 0


# Hostile guests: working ones with a few things broken

ADDRESSES = st.one_of(
    st.sampled_from([STACK, STACK + 8, STACK + 24, 0, 2, 6, 20, 0x9FF0]),
    st.builds(
        lambda edge, distance: (edge + distance) % (1 << 64),
        st.sampled_from([0, 1 << 16, 1 << 32, 0x8000_0000_0000, 0xFFFF_8000_0000_0000]),
        st.integers(-64, 64),
    ),
    st.integers(0, (1 << 64) - 1),
)
VECTORS = st.sampled_from(
    [0x40, 0x40, 0x40, Vector.DF, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.PF]
)
SEGMENT_NAMES = st.sampled_from(["cs", "ss", "ldtr", "tr"])
TABLE_PAGES = st.sampled_from([0, GDT // PAGE, IDT // PAGE, TSS // PAGE, 7, 8, 9])
EVENTS = st.builds(
    Event,
    VECTORS,
    st.sampled_from([kind for kind in EventType if kind is not EventType.OTHER_EVENT]),  # that one is not delivered
    st.none() | st.integers(0, 0xFFFF),
    st.integers(0, 15),
    st.none() | ADDRESSES,
    st.integers(0, 0xFFFF),
)


def break_byte(draw, state, memory):
    idt, gate_size = (IDT, 16 if state.efer & LMA else 8) if state.cr0 else (0, 4)
    gate = idt + draw(VECTORS) * gate_size
    start, size = draw(st.sampled_from([(GDT + 8, 0x38), (TSS, 0x68), (gate, gate_size)]))
    memory.data[start + draw(st.integers(0, size - 1))] ^= 1 << draw(st.integers(0, 7))


def break_page(draw, state, memory):
    draw(st.sampled_from([memory.absent, memory.read_only, memory.supervisor])).add(draw(TABLE_PAGES))


def break_register(draw, state, memory):
    name = draw(st.sampled_from(["rip", "rsp", "rflags", "cr4"]))
    values = {"rflags": st.integers(0, 0x3F_FFFF), "cr4": st.sampled_from([1, 1 << 12])}
    setattr(state, name, draw(values.get(name, ADDRESSES)))


def break_table_register(draw, state, memory):
    name = draw(st.sampled_from(["gdtr", "idtr"]))
    base, limit = getattr(state, name)
    setattr(
        state, name, draw(st.sampled_from([(draw(ADDRESSES), limit), (base, draw(st.integers(0, limit)))]))
    )


def break_segment(draw, state, memory):
    name = draw(SEGMENT_NAMES)
    old = state.segment(name)
    base, limit = draw(ADDRESSES) % 2**32, draw(ADDRESSES) % 2**32
    field, value = draw(
        st.sampled_from([("base", base), ("limit", limit), ("access_rights", limit & 0xF0FF)])
    )
    state.set_segment(name, evolve(old, **{field: value}))


@st.composite
def hostile_guests(draw):
    make = draw(
        st.sampled_from(
            [
                long_mode_guest,
                lambda: long_mode_guest(cpl=3),
                protected_guest,
                lambda: protected_guest(cpl=3),
                virtual_8086_guest,
                real_mode_guest,
            ]
        )
    )
    guest = make()
    breakages = [break_byte, break_byte, break_page, break_register, break_table_register, break_segment]
    for breakage in draw(st.lists(st.sampled_from(breakages), max_size=4)):
        breakage(draw, guest.state, guest.memory)
    return guest.state, guest.memory


def outcome(state, memory, event):
    """(last event or error, registers but CR2 and DR6, memory) after a delivery."""
    try:
        result = deliver(state, memory, event).event
    except (TripleFault, GuestError) as error:
        result = error
    registers = state.snapshot()
    del registers["cr2"], registers["dr6"]
    return result, registers, bytes(memory.data)


@settings(max_examples=600, deadline=None)
@given(hostile_guests(), EVENTS)
def test_whatever_the_tables_hold_only_the_last_event_leaves_a_trace(guest, event):
    state, memory = guest
    before = copy.deepcopy(guest)
    result, registers, data = outcome(state, memory, event)
    if isinstance(result, Event):
        assert outcome(*before, result) == (result, registers, data)
    else:
        unchanged = before[0].snapshot()
        del unchanged["cr2"], unchanged["dr6"]
        assert (registers, data) == (unchanged, bytes(before[1].data))
