"""EPT entries bit by bit, in the manual's order: formats, what is present, what is misconfigured."""

from __future__ import annotations

import hypothesis.strategies as st
import manual
import pytest
from hypothesis import example, given
from manual import Processor

from vmm.ept import Capabilities, EntryRules, EptEntry, EptProfile, Misconfigured, Permission

raws = st.integers(0, (1 << 64) - 1)
levels = st.integers(1, 4)
#: Entries that are often nearly right, so that single bits decide.
likely = st.builds(
    lambda low, high, extra: low | high << 12 | extra,
    st.integers(0, 0xFFF),
    st.sampled_from([0, 1 << 9, 1 << 18]),
    st.one_of(st.just(0), st.integers(0, 63).map(lambda bit: 1 << bit)),
)


def profile_of(processor: Processor) -> EptProfile:
    return EptProfile(
        capabilities=Capabilities(
            execute_only=processor.execute_only,
            pages_2m=processor.pages_2m,
            pages_1g=processor.pages_1g,
            advanced_information=processor.advanced,
            physical_address_width=processor.width,
        ),
        accessed_dirty=processor.accessed_dirty,
        mode_based_execute=processor.mode_based,
    )


processors = st.builds(
    Processor,
    execute_only=st.booleans(),
    pages_2m=st.booleans(),
    pages_1g=st.booleans(),
    width=st.sampled_from([36, 40, 46, 52]),
    accessed_dirty=st.booleans(),
    mode_based=st.booleans(),
    advanced=st.booleans(),
)


class TestFormats:
    @given(raws, levels)
    def test_no_bit_is_lost(self, raw, level):
        assert EptEntry.decode(raw, level).encode() == raw

    @given(raws, levels)
    def test_an_entry_decodes_to_what_it_was_encoded_from(self, raw, level):
        entry = EptEntry.decode(raw, level)
        assert EptEntry.decode(entry.encode(), level) == entry

    @pytest.mark.parametrize(
        ("bit", "field"),
        [
            (6, "ignore_pat"),
            (8, "accessed"),
            (9, "dirty"),
            (10, "user_execute"),
            (57, "verify_guest_paging"),
            (58, "paging_write"),
            (60, "supervisor_shadow_stack"),
            (61, "sub_page_write"),
            (63, "suppress_ve"),
        ],
    )
    def test_each_flag_of_a_pte_has_its_bit(self, bit, field):
        assert getattr(EptEntry.decode(1 << bit), field) is True
        assert getattr(EptEntry.decode(~(1 << bit) & (1 << 64) - 1), field) is False

    @pytest.mark.parametrize(
        ("level", "page_size"), [(1, 4096), (2, 2 << 20), (3, 1 << 30)]
    )
    def test_bit_7_maps_a_page_but_in_a_pml4e(self, level, page_size):
        entry = EptEntry.decode(0xFFFF_FFFF_F000 | 7 | 1 << 7, level)
        assert (entry.leaf, entry.page_size, entry.address) == (True, page_size, 0xFFFF_FFFF_F000 & -page_size)
        assert not EptEntry.decode(7 | 1 << 7, 4).leaf

    @pytest.mark.parametrize(("level", "name"), [(4, "PML4E"), (3, "PDPTE"), (2, "PDE"), (1, "PTE")])
    def test_names_are_the_manuals(self, level, name):
        assert EptEntry.decode(7, level).name == name

    @pytest.mark.parametrize("level", [2, 3, 4])
    def test_an_entry_that_refers_to_a_table_has_no_fields_of_a_page(self, level):
        entry = EptEntry.decode((1 << 64) - 1 & ~(1 << 7), level)
        absent = ("memory_type", "dirty", "ignore_pat", "verify_guest_paging", "paging_write")
        absent += ("supervisor_shadow_stack", "sub_page_write", "suppress_ve", "page_size")
        assert [getattr(entry, name) for name in absent] == [None] * len(absent)

    @pytest.mark.parametrize("level", [2, 3])
    def test_only_a_pte_has_sub_page_write_permissions(self, level):
        assert EptEntry.decode(1 << 61 | 1 << 7, level).sub_page_write is None

    @pytest.mark.parametrize("bits", range(8))
    def test_permissions_are_bits_0_to_2(self, bits):
        assert EptEntry.decode(bits | 6 << 3).permissions == bits
        assert Permission.parse(str(Permission(bits))) == bits

    @pytest.mark.parametrize("text", ["", "rw", "rwxx", "xwr", "r w", "rw1"])
    def test_permission_text_in_another_form_is_refused(self, text):
        with pytest.raises(ValueError, match=r"^"):
            Permission.parse(text)


class TestPresence:
    @pytest.mark.parametrize("mode_based", [False, True])
    @pytest.mark.parametrize("level", [1, 2, 3, 4])
    @given(raw=raws)
    def test_bits_2_to_0_make_an_entry_present_and_bit_10_under_mode_based_control(self, raw, level, mode_based):
        rules = EntryRules.of(EptProfile(mode_based_execute=mode_based))
        for entry in (raw, raw & ~7, raw & ~0x407, raw & ~7 | 0x400):
            assert rules.is_present(entry) == (entry & 7 != 0 or (mode_based and entry & 0x400 != 0))

    @given(raws, levels)
    def test_of_one_that_is_not_present_the_rest_is_ignored(self, raw, level):
        for mode_based in (False, True):
            rules = EntryRules.of(EptProfile(mode_based_execute=mode_based))
            assert rules.misconfigured(raw & ~0x407, level) == []


class TestMisconfigurations:
    @given(st.one_of(raws, likely), levels, processors)
    @example(0x400, 1, Processor(mode_based=True, execute_only=False))
    def test_exactly_those_of_the_manual(self, raw, level, processor):
        rules = EntryRules.of(profile_of(processor))
        assert bool(rules.misconfigured(raw, level)) == manual.is_misconfigured(processor, raw, level)
        assert rules.reserved_bits(raw, level) == raw & manual.reserved_bits(processor, raw, level)

    @pytest.mark.parametrize(
        ("level", "raw", "wrong"),
        [
            (1, 0b010 | 6 << 3, Misconfigured.WRITE_WITHOUT_READ),
            (1, 0b110 | 6 << 3, Misconfigured.WRITE_WITHOUT_READ),
            (4, 0b010, Misconfigured.WRITE_WITHOUT_READ),
            (1, 0b111 | 2 << 3, Misconfigured.MEMORY_TYPE),
            (1, 0b111 | 3 << 3, Misconfigured.MEMORY_TYPE),
            (1, 0b111 | 7 << 3, Misconfigured.MEMORY_TYPE),
            (2, 0b111 | 7 << 3 | 1 << 7, Misconfigured.MEMORY_TYPE),
            (1, 0b111 | 6 << 3 | 1 << 40, Misconfigured.RESERVED_BITS),
            (1, 0b111 | 6 << 3 | 1 << 51, Misconfigured.RESERVED_BITS),
            (2, 0b111 | 1 << 3, Misconfigured.RESERVED_BITS),
            (2, 0b111 | 1 << 6, Misconfigured.RESERVED_BITS),
            (4, 0b111 | 1 << 7, Misconfigured.RESERVED_BITS),
            (2, 0b111 | 6 << 3 | 1 << 7 | 1 << 12, Misconfigured.RESERVED_BITS),
            (2, 0b111 | 6 << 3 | 1 << 7 | 1 << 20, Misconfigured.RESERVED_BITS),
            (3, 0b111 | 6 << 3 | 1 << 7 | 1 << 21, Misconfigured.RESERVED_BITS),
            (3, 0b111 | 6 << 3 | 1 << 7 | 1 << 29, Misconfigured.RESERVED_BITS),
        ],
    )
    def test_each_with_its_reason(self, level, raw, wrong):
        assert EntryRules.of(EptProfile()).misconfigured(raw, level) == [wrong]

    @pytest.mark.parametrize(
        ("level", "raw"),
        [
            (1, 0b100 | 6 << 3),  # execute-only, which the VMM lives by
            (1, 0b001),
            (1, 0b111 | 6 << 3 | 1 << 7 | 1 << 11),  # ignored bits of a PTE
            (1, 0b111 | 6 << 3 | 0xFFF << 52),
            (2, 0b111 | 1 << 8 | 1 << 9 | 1 << 11),  # and of a PDE
            (2, 0b111 | 6 << 3 | 1 << 7 | 1 << 21),
            (3, 0b111 | 6 << 3 | 1 << 7 | 1 << 30),
            (4, 0b111 | 0xFFF << 52),
        ],
    )
    def test_what_is_none(self, level, raw):
        assert EntryRules.of(EptProfile()).misconfigured(raw, level) == []

    @pytest.mark.parametrize(("level", "size"), [(2, "pages_2m"), (3, "pages_1g")])
    def test_a_page_of_a_size_that_the_processor_does_not_have(self, level, size):
        without = EntryRules.of(EptProfile(capabilities=Capabilities(**{size: False})))
        large = 0b111 | 1 << 7
        assert without.misconfigured(large, level) == [Misconfigured.RESERVED_BITS]
        assert EntryRules.of(EptProfile()).misconfigured(large, level) == []

    def test_execute_only_without_the_capability_and_under_mode_based_execute_control(self):
        has_not = Capabilities(execute_only=False)
        plain = EntryRules.of(EptProfile(capabilities=has_not))
        mode_based = EntryRules.of(EptProfile(capabilities=has_not, mode_based_execute=True))
        assert plain.misconfigured(0b100, 1) == [Misconfigured.EXECUTE_ONLY]
        assert plain.misconfigured(0x400, 1) == []  # not present
        assert mode_based.misconfigured(0x400, 1) == [Misconfigured.USER_EXECUTE_ONLY]
        assert mode_based.misconfigured(0x404, 1) == [Misconfigured.EXECUTE_ONLY, Misconfigured.USER_EXECUTE_ONLY]
        assert mode_based.misconfigured(0x401, 1) == []
