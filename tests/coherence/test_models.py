"""Which instructions synchronise in which coherence model."""

from __future__ import annotations

import pytest
import tiny

from vmm.coherence import Coherence
from vmm.coherence.model import Synchronises, has_synchronisation, synchronisation_of

SERIALISING = [
    *("cpuid", "iretq", "mov cr3, rax", "mov cr0, rax", "mov cr4, rax", "mov dr7, rax", "invlpg [rax]", "wbinvd"),
    *("invd", "lgdt [rax]", "lidt [rax]", "lldt ax", "ltr ax", "wrmsr", "rsm"),
]
SERIALIZE = b"\x0f\x01\xe8"
NOT_SERIALISING = [
    *("nop", "mov rax, cr3", "mov cr8, rax", "mov rax, dr7", "mfence", "lfence", "sfence", "int3"),
    *("lock inc dword ptr [rax]", "clflush [rax]", "rdmsr", "sidt [rax]", "syscall", "ret", "rdtsc", "mov ds, ax"),
]


@pytest.mark.parametrize("text", SERIALISING)
def test_serialising_instructions(text):
    """SDM vol. 3, 9.3."""
    assert synchronisation_of(tiny.assemble(text), 64, Coherence.SERIALISED) is Synchronises.EVERYTHING


def test_serialize():
    assert synchronisation_of(SERIALIZE, 64, Coherence.SERIALISED) is Synchronises.EVERYTHING


@pytest.mark.parametrize("text", NOT_SERIALISING)
def test_others_do_not_serialise(text):
    assert synchronisation_of(tiny.assemble(text), 64, Coherence.SERIALISED) is Synchronises.NOTHING


def test_a_line_is_flushed_explicitly():
    assert synchronisation_of(tiny.assemble("clflush [rax]"), 64, Coherence.EXPLICIT) is Synchronises.ITS_LINE
    assert synchronisation_of(b"\x66\x0f\xae\x38", 64, Coherence.EXPLICIT) is Synchronises.ITS_LINE  # clflushopt [rax]


@pytest.mark.parametrize("text", ["wbinvd", "invd"])
def test_everything_is_flushed_explicitly(text):
    assert synchronisation_of(tiny.assemble(text), 64, Coherence.EXPLICIT) is Synchronises.EVERYTHING


@pytest.mark.parametrize("text", ["cpuid", "iretq", "mov cr3, rax", "mfence", "clwb [rax]", "nop"])
def test_nothing_else_flushes(text):
    assert synchronisation_of(tiny.assemble(text), 64, Coherence.EXPLICIT) is Synchronises.NOTHING


def test_a_block_has_one_anywhere():
    assert has_synchronisation(tiny.assemble("nop; inc eax; iretq"), 64, Coherence.SERIALISED)
    assert not has_synchronisation(tiny.assemble("nop; inc eax; ret"), 64, Coherence.SERIALISED)
    assert has_synchronisation(b"\x0f\xa2", 16, Coherence.SERIALISED)


def test_bytes_that_are_no_instruction_synchronise_nothing():
    assert synchronisation_of(b"\x0f\x0b\xff\xff", 64, Coherence.SERIALISED) is Synchronises.NOTHING
    assert synchronisation_of(b"", 64, Coherence.EXPLICIT) is Synchronises.NOTHING
