"""Capabilities as the MSRs report them, and what may be enabled."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from attrs import fields
from hypothesis import given

from vmm.ept import PROFILES, Capabilities, EptProfile, ExtendedPageTables
from vmm.errors import OptionError

FLAGS = [field.name for field in fields(Capabilities) if field.name != "physical_address_width"]
FREE = [name for name in FLAGS if name not in ("walk_length_4", "tables_write_back")]
some = st.fixed_dictionaries({name: st.booleans() for name in FREE}).map(lambda flags: Capabilities(**flags))


@given(some)
def test_capabilities_decode_to_what_they_were_encoded_from(capabilities):
    again = Capabilities.decode(capabilities.encode(), procbased_ctls2=capabilities.encode_procbased_ctls2())
    assert again == capabilities


@pytest.mark.parametrize(
    ("bit", "name"),
    [
        (0, "execute_only"),
        (8, "tables_uncacheable"),
        (16, "pages_2m"),
        (17, "pages_1g"),
        (20, "invept"),
        (21, "accessed_dirty"),
        (22, "advanced_information"),
        (23, "supervisor_shadow_stack"),
        (25, "invept_single_context"),
        (26, "invept_all_contexts"),
        (32, "invvpid"),
        (40, "invvpid_address"),
        (41, "invvpid_single_context"),
        (42, "invvpid_all_contexts"),
        (43, "invvpid_retaining_globals"),
    ],
)
def test_each_has_its_bit_of_ia32_vmx_ept_vpid_cap(bit, name):
    needed = 1 << 6 | 1 << 14
    decoded = Capabilities.decode(needed | 1 << bit)
    assert [flag for flag in FREE if getattr(decoded, flag)] == [name]


def test_mode_based_execute_control_is_reported_among_the_secondary_controls():
    assert Capabilities.decode(0x4040, procbased_ctls2=1 << 54).mode_based_execute
    assert not Capabilities.decode(0x4040, procbased_ctls2=1 << 22).mode_based_execute


def test_a_machine_has_what_a_guest_of_today_needs():
    has = ExtendedPageTables().profile.capabilities
    assert has.execute_only
    assert has.pages_2m
    assert has.pages_1g
    assert not PROFILES["default"].accessed_dirty
    assert hex(has.encode()) == "0x234141"


@pytest.mark.parametrize("name", ["accessed_dirty", "mode_based_execute"])
def test_nothing_is_enabled_that_the_processor_does_not_have(name):
    with pytest.raises(OptionError, match=f"{name} is enabled on a processor without it"):
        EptProfile(capabilities=Capabilities(**{name: False}), **{name: True})


@pytest.mark.parametrize("width", [31, 53])
def test_physical_addresses_have_32_to_52_bits(width):
    with pytest.raises(OptionError, match="choose 32 to 52"):
        Capabilities(physical_address_width=width)


@pytest.mark.parametrize("msr", [1 << 6, 1 << 14, 0])
def test_a_processor_that_this_vmm_cannot_be_is_refused(msr):
    with pytest.raises(OptionError, match="bits 6 and 14"):
        Capabilities.decode(msr)


def test_the_eptp_says_write_back_four_levels_and_whether_there_are_accessed_and_dirty_flags():
    assert EptProfile().eptp(0x1000) == 0x101E
    assert EptProfile(accessed_dirty=True).eptp(0x1000) == 0x105E
