"""The pair of 8259As: priorities, masks, end of interrupt, cascade, spurious requests, polling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.devices import InterruptController


class Pair:
    """The pair as an operating system sees it."""

    def __init__(self, *, level: bool = False, icw4: int = 1) -> None:
        self.raised = 0
        self.pic = InterruptController(self._count)
        self.lines = {irq: self.pic.line(irq) for irq in range(16) if irq != 2}
        self.chips = [self.pic.registers(self.pic.master), self.pic.registers(self.pic.slave)]
        for number, (base, cascade) in enumerate(((0x20, 4), (0x28, 2))):
            self.out(number, 0, 0x19 if level else 0x11)
            for word in (base, cascade, icw4):
                self.out(number, 1, word)

    def _count(self, high: bool) -> None:
        self.raised += high

    def out(self, chip: int, offset: int, value: int) -> None:
        self.chips[chip].write_register(offset, value)

    def read(self, chip: int, offset: int) -> int:
        return self.chips[chip].read_register(offset)

    def pulse(self, irq: int) -> None:
        self.lines[irq](False)
        self.lines[irq](True)

    def eoi(self, irq: int) -> None:
        if irq >= 8:
            self.out(1, 0, 0x60 | irq - 8)
            irq = 2
        self.out(0, 0, 0x60 | irq)


@pytest.mark.parametrize("irq", [0, 1, 7, 8, 15])
def test_an_edge_interrupts_with_the_vector_of_its_level(irq):
    pair = Pair()
    pair.pulse(irq)
    assert pair.pic.asserted
    assert pair.pic.acknowledge() == 0x20 + irq
    assert not pair.pic.asserted


def test_the_processor_is_told_once_until_it_acknowledges():
    pair = Pair()
    pair.pulse(4)
    pair.pulse(3)
    assert pair.raised == 1


def test_nothing_of_equal_or_lower_priority_interrupts_before_the_end_of_interrupt():
    pair = Pair()
    pair.pulse(3)
    pair.pic.acknowledge()
    pair.pulse(3)
    pair.pulse(7)
    assert not pair.pic.asserted
    pair.pulse(1)
    assert pair.pic.acknowledge() == 0x21
    pair.eoi(1)
    assert not pair.pic.asserted
    pair.eoi(3)
    assert pair.pic.acknowledge() == 0x23


def test_the_slave_ranks_between_irq_1_and_irq_3():
    pair = Pair()
    for irq in (3, 15, 8, 1):
        pair.pulse(irq)
    order = []
    while pair.pic.asserted:
        order.append(pair.pic.acknowledge() - 0x20)
        pair.eoi(order[-1])
    assert order == [1, 8, 15, 3]


def test_a_higher_level_of_the_slave_waits_unless_fully_nested():
    """SFNM lets the master take another request of the slave that it is serving already."""
    for icw4, nested in ((0x01, False), (0x11, True)):
        pair = Pair(icw4=icw4)
        pair.pulse(12)
        pair.pic.acknowledge()
        pair.pulse(8)
        assert pair.pic.asserted is nested


def test_masked_requests_wait_and_are_not_lost():
    pair = Pair()
    pair.out(0, 1, 0x10)
    pair.pulse(4)
    assert not pair.pic.asserted
    assert pair.read(0, 0) == 0x10
    pair.out(0, 1, 0)
    assert pair.pic.asserted
    assert pair.read(0, 1) == 0


def test_reads_give_what_ocw3_selects():
    pair = Pair()
    pair.pulse(5)
    pair.pic.acknowledge()
    pair.pulse(6)
    pair.out(0, 0, 0x0B)
    assert pair.read(0, 0) == 1 << 5
    pair.out(0, 0, 0x0A)
    assert pair.read(0, 0) == 1 << 6


def test_a_non_specific_eoi_ends_the_highest_in_service():
    pair = Pair()
    pair.pulse(5)
    pair.pic.acknowledge()
    pair.pulse(2 + 1)
    pair.pic.acknowledge()
    pair.out(0, 0, 0x20)
    pair.out(0, 0, 0x0B)
    assert pair.read(0, 0) == 1 << 5


def test_automatic_eoi_leaves_nothing_in_service():
    pair = Pair(icw4=3)
    pair.pulse(4)
    pair.pic.acknowledge()
    pair.out(0, 0, 0x0B)
    assert pair.read(0, 0) == 0
    pair.pulse(4)
    assert pair.pic.asserted


def test_rotation_makes_the_served_level_the_lowest():
    pair = Pair()
    pair.pulse(1)
    pair.pic.acknowledge()
    pair.out(0, 0, 0xA0)
    pair.pulse(1)
    pair.pulse(6)
    assert pair.pic.acknowledge() == 0x26


def test_special_mask_mode_lets_lower_levels_through_a_masked_one_in_service():
    pair = Pair()
    pair.pulse(3)
    pair.pic.acknowledge()
    pair.out(0, 1, 1 << 3)
    pair.pulse(6)
    assert not pair.pic.asserted
    pair.out(0, 0, 0x68)
    assert pair.pic.acknowledge() == 0x26


def test_a_request_that_goes_away_is_spurious():
    pair = Pair()
    pair.pulse(4)
    pair.lines[4](False)
    assert not pair.pic.asserted
    assert pair.pic.acknowledge() == 0x27
    pair.out(0, 0, 0x0B)
    assert pair.read(0, 0) == 0


def test_a_level_interrupts_as_long_as_it_lasts():
    pair = Pair(level=True)
    pair.lines[4](True)
    pair.pic.acknowledge()
    pair.eoi(4)
    assert pair.pic.asserted
    pair.lines[4](False)
    assert not pair.pic.asserted


def test_an_edge_interrupts_once_however_long_it_lasts():
    pair = Pair()
    pair.lines[4](True)
    pair.pic.acknowledge()
    pair.eoi(4)
    assert not pair.pic.asserted


def test_polling_acknowledges_without_the_processor():
    pair = Pair()
    pair.pulse(4)
    pair.out(0, 0, 0x0C)
    assert pair.read(0, 0) == 0x84
    assert not pair.pic.asserted
    pair.out(0, 0, 0x0C)
    assert pair.read(0, 0) == 0


def test_initialisation_forgets_what_was_there():
    pair = Pair()
    pair.pulse(4)
    pair.pic.acknowledge()
    pair.out(0, 0, 0x11)
    for word in (0x40, 4, 1):
        pair.out(0, 1, word)
    pair.pulse(5)
    assert pair.pic.acknowledge() == 0x45


_IRQS = st.sampled_from([0, 1, 3, 4, 5, 6, 7, 8, 10, 15])
_DEEDS = st.one_of(
    st.tuples(st.just("line"), _IRQS, st.booleans()),
    st.tuples(st.just("mask"), st.integers(0, 1), st.integers(0, 255)),
    st.tuples(st.just("take"), st.none(), st.none()),
    st.tuples(st.just("eoi"), st.none(), st.none()),
)


@given(st.lists(_DEEDS, max_size=60))
def test_what_interrupts_is_the_best_request_that_is_not_masked(deeds):
    """Against a model that keeps sets and sorts them."""
    pair, high, requests, serving, masks = Pair(), set(), set(), [], [0, 0]
    rank = [0, 1, *range(8, 16), *range(3, 8)].index

    def best() -> int | None:
        open_ = [irq for irq in requests if not masks[irq >> 3] >> (irq & 7) & 1]
        open_ = [irq for irq in open_ if irq < 8 or not masks[0] & 4]
        master = {2 if irq >= 8 else irq for irq in serving}
        slave = [irq for irq in serving if irq >= 8]
        open_ = [irq for irq in open_ if all(rank(irq) < rank(s) for s in (s for s in serving if s < 8))]
        open_ = [irq for irq in open_ if irq < 8 or (2 not in master and not slave)]
        if 2 in master:
            open_ = [irq for irq in open_ if irq < 2]
        return min(open_, key=rank, default=None)

    for deed, what, value in deeds:
        if deed == "line":
            pair.lines[what](value)
            if value and what not in high:
                requests.add(what)
            elif not value:
                requests.discard(what)
            (high.add if value else high.discard)(what)
        elif deed == "mask":
            pair.out(what, 1, value)
            masks[what] = value
        elif deed == "take" and pair.pic.asserted:
            expected = best()
            assert pair.pic.acknowledge() == 0x20 + expected
            requests.discard(expected)
            serving.append(expected)
        elif deed == "eoi" and serving:
            pair.eoi(serving.pop())
        assert pair.pic.asserted is (best() is not None)
