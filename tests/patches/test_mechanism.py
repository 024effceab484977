"""Who made a patch, and what for."""

from __future__ import annotations

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from traces import DIRECT, NAMES, POKE, at, physical, store, symbols_file

from vmm.patches.joined import Patch
from vmm.patches.mechanism import Attribution, Attributor, Mechanism
from vmm.patches.symbols import read_kernel_symbols

PLACE = at("patched_function")
USER = 0x40_1000


@pytest.fixture(scope="module")
def attributor(tmp_path_factory) -> Attributor:
    return Attributor(read_kernel_symbols(symbols_file(tmp_path_factory.mktemp("symbols") / "map")))


def direct(**rest):
    return store(gva=DIRECT + physical(PLACE), **rest)


def poked(**rest):
    return store(gva=POKE, **rest)


ROWS = [
    (store(callers=["text_poke_early", "apply_returns"]), "apply_returns", Mechanism.RETURNS),
    (store(callers=["text_poke_early", "apply_paravirt.cold"]), "apply_paravirt", Mechanism.PARAVIRT),
    (store(rip="apply_alternatives"), "apply_alternatives", Mechanism.ALTERNATIVES),
    (store(callers=["some_driver", "apply_returns"]), "apply_returns", Mechanism.RETURNS),
    (store(callers=["some_driver"]), "some_driver", Mechanism.OTHER),
    (store(), "memcpy_orig", Mechanism.OTHER),
    (poked(callers=["__text_poke", "alternatives_smp_module_add"]), "alternatives_smp_module_add", Mechanism.SMP_LOCKS),
    (
        poked(callers=["__text_poke", "text_poke_bp_batch", "text_poke_finish", "arch_jump_label_transform_apply"]),
        "arch_jump_label_transform_apply",
        Mechanism.JUMP_LABELS,
    ),
    (poked(callers=["__text_poke", "text_poke_bp_batch"]), None, Mechanism.TEXT_POKE),
    (poked(callers=["__text_poke", "some_driver"]), "some_driver", Mechanism.TEXT_POKE),
    (direct(rip="free_reserved_area"), "free_reserved_area", Mechanism.REUSE),
    (direct(rip="clear_page_orig", callers=["some_driver"]), "some_driver", Mechanism.REUSE),
    (direct(rip="clear_page_orig", callers=["apply_returns"]), "apply_returns", Mechanism.REUSE),
    (direct(rip="clear_page_orig", callers=["text_poke_early", "some_driver"]), "some_driver", Mechanism.REUSE),
    (evolve(store(cause="window"), rip=None, gva=None), None, Mechanism.WINDOW),
    (evolve(store(cause="host"), rip=None, gva=None), None, Mechanism.OUTSIDE),
    (evolve(store(), rip=USER, gva=USER, executed_at=USER), None, Mechanism.USER_CODE),
    (evolve(store(), rip=USER, gva=USER, is_early=True), None, Mechanism.BEFORE_KERNEL),
    (evolve(store(), gva=USER, executed_at=USER), "memcpy_orig", Mechanism.USER_MEMORY),
]


@pytest.mark.parametrize(("made", "function", "mechanism"), ROWS)
def test_function_and_mechanism(attributor, made, function, mechanism):
    assert attributor.of(Patch.of(made)) == Attribution(function, mechanism)


def test_an_address_next_to_the_patch_is_no_caller(attributor):
    """A patcher has the place it works at on its stack, and there may be a CALL in front of it."""
    made = store(PLACE, bytes(5), bytes(5))
    near = evolve(made, callers=(PLACE + 5, at("text_poke_early", 5), at("some_driver", 5)))
    assert attributor.of(Patch.of(near)).function == "some_driver"


def test_the_last_byte_of_a_call_decides_whose_it_is(attributor):
    """A function that ends in a CALL has its return address at the beginning of the next one."""
    made = evolve(store(), callers=(at("apply_returns"),))
    assert attributor.of(Patch.of(made)).mechanism is Mechanism.ALTERNATIVES


@pytest.mark.parametrize(
    ("made", "mechanism"),
    [
        (store(), Mechanism.NO_SYMBOLS),
        (direct(), Mechanism.REUSE),
        (poked(), Mechanism.TEXT_POKE),
        (evolve(store(cause="window"), rip=None, gva=None), Mechanism.WINDOW),
    ],
)
def test_without_symbols_the_mapping_tells_what_it_can(made, mechanism):
    assert Attributor(None).of(Patch.of(made)) == Attribution(None, mechanism)


@given(st.lists(st.sampled_from(sorted(NAMES)), max_size=6), st.sampled_from(sorted(NAMES)))
def test_a_known_mechanism_comes_from_a_function_on_the_stack(attributor, callers, rip):
    found = attributor.of(Patch.of(store(rip=rip, callers=callers)))
    names = {name.partition(".")[0] for name in (rip, *callers)}
    assert found.function is None or found.function in names
    if found.mechanism is Mechanism.RETURNS:
        assert "apply_returns" in names
