"""Which mapping a store used: a row for each."""

import pytest
from traces import DIRECT, POKE, TEXT

from vmm.patches.mapping import Mapping, classify
from vmm.patches.stores import Store

KERNEL, USER = TEXT + 0x1000, 0x40_1000
GPA = 0x123_4000
MODULE, VMALLOC = 0xFFFF_FFFF_C000_1000, 0xFFFF_C900_0012_3000

ROWS = [
    (TEXT + 0x9000, KERNEL, TEXT + 0x9000, False, Mapping.OWN),
    (TEXT + 0x9000, KERNEL, None, False, Mapping.OWN),
    (MODULE, KERNEL, None, False, Mapping.OWN),
    (VMALLOC + 4, KERNEL, VMALLOC, False, Mapping.OWN),
    (VMALLOC, KERNEL, TEXT + 0x9000, False, Mapping.OTHER),
    (DIRECT + GPA, KERNEL, TEXT + 0x9000, False, Mapping.DIRECT),
    (DIRECT + (37 << 30) + GPA, KERNEL, None, False, Mapping.DIRECT),
    (DIRECT + (37 << 30) + GPA + 0x1000, KERNEL, None, False, Mapping.OTHER),
    (POKE, KERNEL, TEXT + 0x9000, False, Mapping.POKE),
    (POKE, KERNEL, USER, False, Mapping.USER),
    (POKE, KERNEL, None, False, Mapping.USER),
    (USER, USER + 0x5000, USER, False, Mapping.USER_OWN),
    (USER + 0x8000, USER, USER, False, Mapping.USER),
    (GPA, GPA + 0x1000, GPA, True, Mapping.IDENTITY),
    (GPA, GPA + 0x1000, GPA, False, Mapping.USER_OWN),
    (None, None, TEXT, False, Mapping.UNKNOWN),
]


@pytest.mark.parametrize(("gva", "rip", "executed", "early", "mapping"), ROWS)
def test_the_mapping_of_a_store(gva, rip, executed, early, mapping):
    store = Store(1, GPA, gva, rip, b"\x90", b"\xcc", "store", (), executed, early)
    assert classify(store) is mapping
