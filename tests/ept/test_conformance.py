"""Guest accesses against the manual: every combination of what an EPT can say, and what comes out."""

from __future__ import annotations

import itertools

import pytest
from attrs import evolve
from conformance import Bench, Case, final_cases, flipped_cases, linear_cases, structure_cases
from manual import READ, Linear, Processor

PLAIN = range(8)
#: Under mode-based execute control: R, W, X and XU.
MODE_BASED = [bits | user << 10 for bits in range(8) for user in (0, 1)]
PROCESSORS = {
    f"{'XO' if execute_only else 'no-XO'}-{'AD' if flags else 'no-AD'}": Processor(
        execute_only=execute_only, accessed_dirty=flags, advanced=True
    )
    for execute_only, flags in itertools.product((True, False), repeat=2)
}
PROCESSORS["default"] = Processor()
MODE_BASED_PROCESSORS = {
    "XO": Processor(mode_based=True, advanced=True),
    "no-XO-AD": Processor(mode_based=True, execute_only=False, accessed_dirty=True),
}


def check(bench: Bench, cases: list[Case], record_property) -> None:
    deviations = bench.run(cases)
    record_property("cases", bench.count)
    print(f"{bench.count} cases, {len(deviations)} deviations")  # noqa: T201 - shown with `-s`
    assert not deviations, "\n".join(deviations[:20])
    assert bench.count == len(cases)


@pytest.mark.parametrize("single_step", [False, True], ids=["free", "stepped"])
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_accesses(processor, cpl, single_step, record_property):
    bench = Bench(processor, cpl, single_step)
    check(bench, [*final_cases(cpl, PLAIN), *linear_cases(cpl)], record_property)


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_accesses_to_the_guests_paging_structures(processor, cpl, record_property):
    check(Bench(processor, cpl), list(structure_cases(cpl, PLAIN)), record_property)


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_accesses_to_the_guests_paging_structures_of_stepped_instructions(processor, record_property):
    check(Bench(processor, 3, single_step=True), list(structure_cases(3, PLAIN)), record_property)


@pytest.mark.parametrize(("cpl", "single_step"), [(0, False), (3, False), (3, True)])
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_accesses_to_the_guests_paging_structures_in_5_level_paging(processor, cpl, single_step, record_property):
    check(Bench(processor, cpl, single_step, root=5), list(structure_cases(cpl, PLAIN, root=5)), record_property)


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("processor", MODE_BASED_PROCESSORS.values(), ids=MODE_BASED_PROCESSORS)
def test_accesses_under_mode_based_execute_control(processor, cpl, record_property):
    check(Bench(processor, cpl), list(final_cases(cpl, MODE_BASED)), record_property)
    check(Bench(processor, cpl), list(structure_cases(cpl, MODE_BASED)), record_property)


@pytest.mark.parametrize("width", [36, 40, 46])
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_ignored_and_reserved_bits(processor, width, record_property):
    processor = evolve(processor, width=width)
    check(Bench(processor, 3), list(flipped_cases(processor, 3)), record_property)


def test_a_deviation_would_be_seen():
    bench = Bench(Processor(), 0)
    begin = bench._begin

    def wrongly(case):
        begin(case)
        bench._expected = ("fine",)

    bench._begin = wrongly
    assert bench.run([Case(0x1000, 1, 4, READ, Linear(user=False))])
