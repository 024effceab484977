"""Comparing the two processors, for the tests."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import evolve

from .emulated import WAYS, Way, run_in_vmm
from .processor import run_on_processor
from .program import Program, differences

BY_NAME = {way.name: way for way in WAYS}


def disagreements(program: Program, ways: Iterable[Way] = WAYS) -> dict[str, list[str]]:
    """For each way to run the program, what is otherwise than on the processor. Raises ``Unjudgeable``."""
    real = run_on_processor(program)
    found = {}
    for way in ways:
        expected = real if way.watched else evolve(real, faults=())
        different = differences(program, expected, run_in_vmm(program, way))
        if different:
            found[way.name] = different
    return found
