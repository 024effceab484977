"""The exit qualification of EPT violations (SDM vol. 3, table 28-7)."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from attrs import evolve
from hypothesis import given

from vmm.ept import Permission, Qualification
from vmm.ept.qualification import advanced, encode

BITS = {
    "read": 0,
    "write": 1,
    "fetch": 2,
    "user_executable": 6,
    "nmi_unblocking": 12,
    "shadow_stack": 13,
    "supervisor_shadow_stack": 14,
    "guest_paging_verification": 15,
    "asynchronous": 16,
}
#: These mean something only with bits 7 and 8.
OF_A_FINAL_ACCESS = {"user_mode": 9, "read_write_page": 10, "execute_disable_page": 11}
NOTHING = Qualification(linear_valid=False, final=False)


@pytest.mark.parametrize(("name", "bit"), BITS.items())
def test_each_field_has_its_bit(name, bit):
    assert evolve(NOTHING, **{name: True}).encode() == 1 << bit
    assert Qualification.decode(1 << bit) == evolve(NOTHING, **{name: True})


@pytest.mark.parametrize(("name", "bit"), OF_A_FINAL_ACCESS.items())
def test_advanced_information_is_there_for_final_accesses_with_a_linear_address_only(name, bit):
    field = {name: True}
    assert Qualification(**field).encode() == 1 << bit | 1 << 8 | 1 << 7
    assert Qualification(**field, final=False).encode() == 1 << 7
    assert Qualification(**field, linear_valid=False).encode() == 0


@given(st.integers(0, (1 << 17) - 1))
def test_a_qualification_decodes_to_what_it_was_encoded_from(raw):
    if not raw & 1 << 7:
        raw &= ~(1 << 8)
    if not raw & 1 << 8:
        raw &= ~(7 << 9)
    assert Qualification.decode(raw).encode() == raw


def test_what_the_manual_does_not_define_is_ignored():
    assert Qualification.decode(0x182 | 1 << 17 | 1 << 63) == Qualification.decode(0x182)


def test_it_reads_as_table_28_7_has_it():
    store_to_execute_only = Qualification(write=True, allowed=Permission.X)
    assert store_to_execute_only.encode() == 1 << 1 | 1 << 5 | 1 << 7 | 1 << 8
    assert str(store_to_execute_only) == "write where the EPT allows --x"


@given(*[st.booleans()] * 4, st.integers(0, 7), *[st.booleans()] * 4)
def test_the_quick_way_says_the_same(read, write, fetch, final, allowed, user_executable, user, read_write, nx):
    record = Qualification(
        read,
        write,
        fetch,
        Permission(allowed),
        final=final,
        user_executable=user_executable,
        user_mode=user,
        read_write_page=read_write,
        execute_disable_page=nx,
    )
    quick = encode(
        read=read,
        write=write,
        fetch=fetch,
        allowed=allowed | user_executable << 10,
        final=final,
        advanced=advanced(user=user, read_write=read_write, execute_disable=nx),
    )
    assert quick == record.encode()
