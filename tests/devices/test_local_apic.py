"""The local APIC by the sections of SDM vol. 3, chapter 11, and its priorities against a model of their own."""

from __future__ import annotations

import pytest
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.devices import LocalApic
from vmm.devices.local_apic import LINT0, LINT1, Message
from vmm.devices.virtual_time import SteppedClock

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
TIMER, THERMAL, PERFORMANCE, LVT_LINT0, LVT_LINT1, ERROR = range(0x320, 0x380, 0x10)
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0
LVT = (TIMER, THERMAL, PERFORMANCE, LVT_LINT0, LVT_LINT1, ERROR)
MASKED, PERIODIC, LEVEL, REMOTE_IRR = 1 << 16, 1 << 17, 1 << 15, 1 << 14
FIXED, LOWEST, SMI, NMI, INIT, STARTUP, EXTINT = 0, 1, 2, 4, 5, 6, 7
BY_1 = 0b1011


@define
class Pair8259:
    """What stands for the pair of 8259As."""

    asserted: bool = False
    acknowledged: int = 0

    def acknowledge(self) -> int:
        self.acknowledged += 1
        self.asserted = False
        return 0x21


@define
class Board:
    """A local APIC as software and the board see it, enabled unless told otherwise."""

    enabled: bool = True
    clock: SteppedClock = field(factory=SteppedClock)
    external: Pair8259 = field(factory=Pair8259)
    raised: int = 0
    nmis: int = 0
    ended: list[int] = field(factory=list)
    apic: LocalApic = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.apic = LocalApic(
            self.clock, self.clock.timers, self.external, raised=self._raise, ended=self.ended.append, nmi=self._nmi
        )
        if self.enabled:
            self[SVR] = 0x1FF

    def _raise(self) -> None:
        self.raised += 1

    def _nmi(self) -> None:
        self.nmis += 1

    def __getitem__(self, offset: int) -> int:
        return self.apic.read(offset, 4)

    def __setitem__(self, offset: int, value: int) -> None:
        self.apic.write(offset, 4, value)

    def vectors(self, bank: int) -> set[int]:
        """The vectors whose bits are set in ISR, TMR or IRR."""
        words = [self[bank + 0x10 * index] for index in range(8)]
        return {32 * index + bit for index, word in enumerate(words) for bit in range(32) if word >> bit & 1}

    def send(self, vector: int, mode: int = FIXED, destination: int = 0, **rest: bool) -> bool:
        return self.apic.receive(Message(vector, mode, destination, **rest))

    def taken(self) -> list[int]:
        """Take and end interrupts until none is asked for."""
        order = []
        while self.apic.asserted:
            order.append(self.apic.acknowledge())
            self[EOI] = 0
        return order


# 11.4: what it is, and its state after a reset


def test_it_is_an_apic_with_six_local_vectors_and_id_0():
    board = Board(enabled=False)
    assert (board[ID], board[VERSION]) == (0, 0x00050014)


def test_after_a_reset_it_is_disabled_and_all_local_vectors_are_masked():
    board = Board(enabled=False)
    assert [board[place] for place in LVT] == [MASKED] * 6
    assert (board[SVR], board[DFR], board[LDR], board[TPR], board[ESR], board[ICR]) == (0xFF, 0xFFFF_FFFF, 0, 0, 0, 0)
    assert (board[INITIAL], board[CURRENT], board[DIVIDE]) == (0, 0, 0)


def test_while_it_is_disabled_local_vectors_stay_masked_and_fixed_interrupts_are_refused():
    board = Board(enabled=False)
    board[TIMER] = 0x40
    assert board[TIMER] == MASKED | 0x40
    assert not board.send(0x40)
    assert not board.apic.asserted


def test_disabling_masks_the_local_vectors_for_good_and_keeps_what_was_accepted():
    board = Board()
    board[TIMER] = 0x40
    board.send(0x50)
    board[SVR] = 0xFF
    assert board[TIMER] == MASKED | 0x40
    board[SVR] = 0x1FF
    assert board[TIMER] == MASKED | 0x40
    assert board.taken() == [0x50]


@pytest.mark.parametrize(
    ("register", "writable"),
    [
        (TIMER, 0x300FF), (THERMAL, 0x107FF), (PERFORMANCE, 0x107FF), (LVT_LINT0, 0x1A7FF), (LVT_LINT1, 0x1A7FF),
        (ERROR, 0x100FF), (TPR, 0xFF), (LDR, 0xFF00_0000), (DIVIDE, 0b1011), (ICR_HIGH, 0xFF00_0000),
    ],
)  # fmt: skip
def test_a_register_keeps_the_bits_that_it_has(register, writable):
    board = Board()
    board[register] = 0xFFFF_FFFF
    assert board[register] == writable


@pytest.mark.parametrize("register", [ID, VERSION, PPR, EOI, CURRENT, IRR, ISR, TMR, 0x90, 0xC0, 0x3F0, 0x000])
def test_what_cannot_be_written_stays(register):
    board = Board()
    before = board[register]
    board[register] = 0xFFFF_FFFF
    assert board[register] == before


def test_a_load_of_another_size_gets_the_bytes_that_are_there():
    board = Board()
    board[LDR] = 0x1200_0000
    assert board.apic.read(LDR + 3, 1) == 0x12
    assert board.apic.read(LDR + 2, 2) == 0x1200
    assert board.apic.read(LDR, 8) == 0x1200_0000
    assert board.apic.read(LDR + 4, 4) == 0


@pytest.mark.parametrize(("offset", "size"), [(TPR, 1), (TPR, 2), (TPR, 8), (TPR + 4, 4), (TPR + 1, 4)])
def test_only_an_aligned_store_of_32_bits_writes(offset, size):
    board = Board()
    board.apic.write(offset, size, 0x50)
    assert board[TPR] == 0


# 11.8: acceptance and priorities


def test_the_highest_vector_comes_first():
    board = Board()
    for vector in (0x31, 0xF0, 0x80):
        board.send(vector)
    assert board.raised == 1
    assert board.taken() == [0xF0, 0x80, 0x31]


def test_a_vector_in_service_holds_back_its_class_and_those_below_until_eoi():
    board = Board()
    board.send(0x51)
    assert board.apic.acknowledge() == 0x51
    board.send(0x5F)
    board.send(0x41)
    assert not board.apic.asserted
    board.send(0x60)
    assert board.apic.acknowledge() == 0x60
    board[EOI] = 0
    assert not board.apic.asserted
    board[EOI] = 0
    assert board.taken() == [0x5F, 0x41]


def test_tpr_holds_back_its_class_and_those_below():
    board = Board()
    board[TPR] = 0x50
    board.send(0x5F)
    assert not board.apic.asserted
    board.send(0x60)
    assert board.apic.asserted
    board.apic.acknowledge()
    board[EOI] = 0
    board[TPR] = 0x4F
    assert board.taken() == [0x5F]


def test_one_that_waits_already_takes_in_the_next_of_its_vector():
    board = Board()
    board.send(0x40)
    board.send(0x40)
    assert board.taken() == [0x40]


def test_one_more_may_wait_while_one_is_in_service():
    board = Board()
    board.send(0x40)
    board.apic.acknowledge()
    board.send(0x40)
    assert board.vectors(IRR) == board.vectors(ISR) == {0x40}
    board[EOI] = 0
    assert board.taken() == [0x40]


def test_raising_tpr_over_a_request_leaves_the_spurious_vector_which_is_not_in_service():
    board = Board()
    board[SVR] = 0x1EF
    board.send(0x40)
    board[TPR] = 0x40
    assert not board.apic.asserted
    assert board.apic.acknowledge() == 0xEF
    assert board.vectors(ISR) == set()
    assert board.vectors(IRR) == {0x40}


def test_only_a_level_triggered_interrupt_is_told_of_its_end():
    board = Board()
    board.send(0x40, level=True)
    board.send(0x50)
    assert board.vectors(TMR) == {0x40}
    board.taken()
    assert board.ended == [0x40]
    board.send(0x40)
    assert board.vectors(TMR) == set()
    board.taken()
    assert board.ended == [0x40]


def test_eoi_with_nothing_in_service_does_nothing():
    board = Board()
    board[EOI] = 0
    assert board.ended == []


@define
class Model:
    """Priorities as the manual words them, with vectors in sets and nothing computed before it is asked for."""

    waiting: set[int] = field(factory=set)
    served: list[int] = field(factory=list)
    level: set[int] = field(factory=set)
    tpr: int = 0

    def ppr(self) -> int:
        isrv = max(self.served, default=0)
        if self.tpr >> 4 < isrv >> 4:
            return isrv >> 4 << 4
        return self.tpr

    def wanted(self) -> int | None:
        above = [vector for vector in self.waiting if vector >> 4 > self.ppr() >> 4]
        return max(above, default=None)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["edge", "level"]), st.integers(16, 255)),
        st.tuples(st.just("tpr"), st.integers(0, 255)),
        st.tuples(st.just("take"), st.none()),
        st.tuples(st.just("eoi"), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(ACTIONS)
def test_priorities_are_those_of_the_model(actions):
    board, model, ended = Board(), Model(), []
    for action, value in actions:
        if action in ("edge", "level"):
            assert board.send(value, level=action == "level")
            model.waiting.add(value)
            (model.level.add if action == "level" else model.level.discard)(value)
        elif action == "tpr":
            board[TPR] = model.tpr = value
        elif action == "take" and board.apic.asserted:
            wanted = model.wanted()
            assert board.apic.acknowledge() == wanted
            model.waiting.remove(wanted)
            model.served.append(wanted)
        elif action == "eoi":
            board[EOI] = 0
            if model.served:
                vector = max(model.served)
                model.served.remove(vector)
                ended += [vector] if vector in model.level else []
        assert board.apic.asserted == (model.wanted() is not None)
        assert board[PPR] == model.ppr()
        assert (board.vectors(IRR), board.vectors(ISR), board.vectors(TMR)) == (
            model.waiting, set(model.served), model.level
        )  # fmt: skip
        assert board.ended == ended


# 11.6: messages and ICR


def test_an_interrupt_to_itself_by_shorthand_needs_no_destination():
    board = Board()
    board[ICR_HIGH] = 0x55 << 24
    board[ICR] = 1 << 18 | 0x40
    assert board.taken() == [0x40]


@pytest.mark.parametrize(("destination", "arrives"), [(0, True), (1, False), (0xFF, True)])
def test_a_physical_destination_is_the_id_or_everybody(destination, arrives):
    board = Board()
    board[ICR_HIGH] = destination << 24
    board[ICR] = 0x40
    assert board.taken() == ([0x40] if arrives else [])


def test_all_including_self_is_it_and_all_but_self_is_nobody():
    board = Board()
    board[ICR] = 2 << 18 | 0x40
    board[ICR] = 3 << 18 | 0x50
    assert board.taken() == [0x40]


@pytest.mark.parametrize(
    ("model", "own", "destination", "arrives"),
    [
        ("flat", 0x04, 0x06, True),
        ("flat", 0x04, 0x03, False),
        ("flat", 0x00, 0xFF, True),
        ("cluster", 0x24, 0x24, True),
        ("cluster", 0x24, 0x26, True),
        ("cluster", 0x24, 0x34, False),
        ("cluster", 0x24, 0x28, False),
    ],
)
def test_a_logical_destination_goes_by_ldr_and_dfr(model, own, destination, arrives):
    board = Board()
    board[DFR] = 0xFFFF_FFFF if model == "flat" else 0x0FFF_FFFF
    board[LDR] = own << 24
    board[ICR_HIGH] = destination << 24
    board[ICR] = 1 << 11 | LOWEST << 8 | 0x40
    assert board.taken() == ([0x40] if arrives else [])


def test_a_message_is_delivered_by_the_time_that_icr_is_read():
    board = Board()
    board[ICR] = 1 << 18 | 0xFFF0_1040
    assert board[ICR] & 1 << 12 == 0


def test_an_nmi_goes_past_priorities_and_to_a_disabled_apic():
    board = Board(enabled=False)
    board[ICR] = NMI << 8
    assert (board.nmis, board.apic.asserted) == (1, False)


@pytest.mark.parametrize("mode", [SMI, INIT, STARTUP])
def test_other_messages_do_nothing_to_a_processor_that_runs(mode):
    board = Board()
    board[ICR] = mode << 8 | 0x40
    board[ICR] = 2 << 18 | mode << 8 | 1 << 14 | 1 << 15 | 0x40
    assert (board.nmis, board.taken(), board.vectors(IRR)) == (0, [], set())


# 11.5.3: errors


def test_an_illegal_vector_shows_in_esr_once_esr_is_written():
    board = Board()
    board[ICR] = 1 << 18 | 0x0F
    assert board[ESR] == 0
    board[ESR] = 0
    assert board[ESR] == 1 << 5
    board[ESR] = 0
    assert board[ESR] == 0


def test_a_message_with_an_illegal_vector_is_an_error_of_the_receiver():
    board = Board()
    assert not board.send(0x0F)
    board[ESR] = 0
    assert board[ESR] == 1 << 6


def test_the_first_error_interrupts_and_the_same_again_does_not_before_esr_is_written():
    board = Board()
    board[ERROR] = 0x80
    for _ in range(2):
        board[ICR] = 1 << 18
    assert board.taken() == [0x80]
    board[ICR] = 1 << 18
    assert board.taken() == []
    board[ESR] = 0
    board[ICR] = 1 << 18
    assert board.taken() == [0x80]


def test_an_error_vector_that_is_illegal_itself_ends_there():
    board = Board()
    board[ERROR] = 0
    board[ICR] = 1 << 18
    board[ESR] = 0
    assert board[ESR] == 1 << 5 | 1 << 6
    assert board.taken() == []


# 11.5.1: local interrupts


def test_extint_hands_the_8259s_through_past_tpr_and_without_eoi():
    board = Board()
    board[LVT_LINT0] = EXTINT << 8
    board[TPR] = 0xFF
    board.external.asserted = True
    board.apic.drive(LINT0, True)
    assert (board.raised, board.apic.asserted) == (1, True)
    assert board.apic.acknowledge() == 0x21
    board.apic.drive(LINT0, False)
    assert not board.apic.asserted
    assert board.vectors(ISR) == set()


def test_extint_shows_when_it_is_unmasked_after_the_request():
    board = Board()
    board.external.asserted = True
    board.apic.drive(LINT0, True)
    assert not board.apic.asserted
    board[LVT_LINT0] = EXTINT << 8
    assert (board.raised, board.apic.asserted) == (1, True)
    board[LVT_LINT0] = MASKED | EXTINT << 8
    assert not board.apic.asserted


def test_a_fixed_pin_interrupts_at_its_edge():
    board = Board()
    board[LVT_LINT0] = 0x40
    for high in (True, True, False):
        board.apic.drive(LINT0, high)
    assert board.taken() == [0x40]


def test_an_active_low_pin_has_its_edge_at_the_fall():
    board = Board()
    board[LVT_LINT1] = 1 << 13 | 0x40
    board.apic.drive(LINT1, True)
    assert board.taken() == []
    board.apic.drive(LINT1, False)
    assert board.taken() == [0x40]


def test_a_level_interrupts_again_after_eoi_as_long_as_it_is_there():
    board = Board()
    board[LVT_LINT0] = LEVEL | 0x40
    board.apic.drive(LINT0, True)
    assert board[LVT_LINT0] & REMOTE_IRR
    assert board.apic.acknowledge() == 0x40
    board[EOI] = 0
    assert board.apic.acknowledge() == 0x40
    board.apic.drive(LINT0, False)
    board[EOI] = 0
    assert not board[LVT_LINT0] & REMOTE_IRR
    assert not board.apic.asserted


@pytest.mark.parametrize(("value", "nmis"), [(NMI << 8, 1), (MASKED | NMI << 8, 0)])
def test_lint1_is_an_nmi_where_its_entry_says_so(value, nmis):
    board = Board()
    board[LVT_LINT1] = value
    board.apic.drive(LINT1, True)
    assert board.nmis == nmis


# 11.5.4: the timer


@pytest.mark.parametrize("divide", range(8))
def test_the_timer_counts_the_bus_clock_divided(divide):
    board = Board()
    board[DIVIDE] = divide >> 2 << 3 | divide & 3
    divisor = (2, 4, 8, 16, 32, 64, 128, 1)[divide]
    board[TIMER] = 0x40
    board[INITIAL] = 100
    board.clock.advance(30 * divisor)
    assert board[CURRENT] == 70
    board.clock.advance(70 * divisor - 1)
    assert (board[CURRENT], board.apic.asserted) == (1, False)
    board.clock.advance(1)
    assert (board[CURRENT], board.taken()) == (0, [0x40])


def test_one_shot_is_one_shot():
    board = Board()
    board[DIVIDE] = BY_1
    board[TIMER] = 0x40
    board[INITIAL] = 100
    board.clock.advance(100)
    assert board.taken() == [0x40]
    board.clock.advance(100_000)
    assert (board.taken(), board[CURRENT], board[INITIAL]) == ([], 0, 100)


def test_periodic_interrupts_once_a_period_without_drift():
    board = Board()
    board[DIVIDE] = BY_1
    board[TIMER] = PERIODIC | 0x40
    board[INITIAL] = 100
    times = []
    for now in range(1, 501):
        board.clock.advance(1)
        times += [now for _ in board.taken()]
    assert times == [100, 200, 300, 400, 500]


def test_periods_that_pass_at_once_are_one_interrupt_and_take_no_time_to_work_out():
    board = Board()
    board[DIVIDE] = BY_1
    board[TIMER] = PERIODIC | 0x40
    board[INITIAL] = 1
    board.clock.now = 10**15
    board.clock.timers.advance(board.clock.now)
    assert board.taken() == [0x40]
    assert board.clock.timers.next == 10**15 + 1


def test_writing_the_initial_count_starts_anew_and_0_stops():
    board = Board()
    board[DIVIDE] = BY_1
    board[TIMER] = 0x40
    board[INITIAL] = 100
    board.clock.advance(60)
    board[INITIAL] = 100
    board.clock.advance(60)
    assert (board[CURRENT], board.taken()) == (40, [])
    board[INITIAL] = 0
    board.clock.advance(1000)
    assert (board[CURRENT], board.taken()) == (0, [])


def test_a_masked_timer_counts_but_does_not_interrupt_and_an_expiry_is_not_made_up_for():
    board = Board()
    board[DIVIDE] = BY_1
    board[TIMER] = MASKED | 0x40
    board[INITIAL] = 100
    board.clock.advance(40)
    assert board[CURRENT] == 60
    board.clock.advance(60)
    board[TIMER] = 0x40
    board.clock.advance(1000)
    assert board.taken() == []


def test_unmasking_a_timer_that_still_counts_is_in_time():
    board = Board()
    board[DIVIDE] = BY_1
    board[TIMER] = MASKED | 0x40
    board[INITIAL] = 100
    board.clock.advance(40)
    board[TIMER] = 0x40
    board.clock.advance(60)
    assert board.taken() == [0x40]


def test_another_divisor_goes_on_from_the_current_count():
    board = Board()
    board[DIVIDE] = BY_1
    board[TIMER] = 0x40
    board[INITIAL] = 100
    board.clock.advance(40)
    board[DIVIDE] = 0
    assert board[CURRENT] == 60
    board.clock.advance(119)
    assert board[CURRENT] == 1
    board.clock.advance(1)
    assert board.taken() == [0x40]


def test_a_one_shot_that_is_over_does_not_start_again_as_periodic():
    board = Board()
    board[DIVIDE] = BY_1
    board[TIMER] = 0x40
    board[INITIAL] = 100
    board.clock.advance(100)
    board.taken()
    board[TIMER] = PERIODIC | 0x40
    board.clock.advance(1000)
    assert (board[CURRENT], board.taken()) == (0, [])


def test_what_was_due_before_a_register_was_written_has_happened():
    """Time passes between two looks at the alarms, and a register may be written in between."""
    board = Board()
    board[DIVIDE] = BY_1
    board[TIMER] = 0x40
    board[INITIAL] = 100
    board.clock.now = 150
    board[TIMER] = MASKED | 0x40
    assert board.taken() == [0x40]
