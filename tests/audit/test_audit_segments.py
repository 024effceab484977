"""W^X of what is mapped, execution that starts in data, and the stack."""

import pytest
from audit_files import (
    AARCH64,
    ARM,
    CODE,
    DATA,
    FINI,
    FORMATS,
    I386,
    INIT,
    MIPS,
    NO_EXECUTABLE_STACK,
    PPC64,
    RISCV,
    STACK_HEADER,
    TEXT,
    X86_64,
    R,
    W,
    X,
    dynamic,
    elf,
    found,
    rules,
)
from guest.elf_builder import Elf, Load, Section

RULE = "writable-executable-segment"


@pytest.mark.parametrize(("bits", "order"), FORMATS)
@pytest.mark.parametrize("flags", range(8))
def test_a_segment_is_writable_or_executable_or_neither(flags, bits, order):
    file = elf(Load(0x30000, b"data", flags=flags, memsz=0x200), bits=bits, order=order)
    assert (RULE in rules(file)) == (flags & (W | X) == W | X)


def test_the_finding_says_which_segment_and_where():
    finding = found(elf(Load(0x30000, b"data", flags=R | W | X, memsz=0x200)))[RULE]
    assert (finding.severity, finding.headers, finding.start, finding.end) == ("error", (1,), 0x30000, 0x30200)
    assert "segment 1 is writable and executable (RWE)" in finding.what


def test_a_segment_without_memory_is_no_segment():
    assert rules(elf(Load(0x30000, b"", flags=R | W | X))) == []


def test_its_sections_that_are_both_are_details():
    both, code = 7, 6
    sections = [
        Section(".patch", addr=0x30010, size=8, flags=both),
        Section(".text", addr=0x30000, size=8, flags=code),
        Section(".elsewhere", addr=0x50000, size=8, flags=both),
    ]
    finding = found(elf(Load(0x30000, b"data", flags=7, memsz=0x200), sections=sections))[RULE]
    assert [(detail.address, detail.text) for detail in finding.details] == [(0x30010, "section .patch, both")]


def test_section_flags_alone_are_nothing_that_a_loader_looks_at():
    assert rules(elf(sections=[Section(".both", addr=TEXT, size=8, flags=7)])) == []


@pytest.mark.parametrize(("bits", "order"), FORMATS)
@pytest.mark.parametrize(
    ("entry", "starts"),
    [
        *((0, False), (TEXT, False), (TEXT + 63, False), (TEXT + 64, False)),
        *((0x30000, True), (0x3000F, True), (0x30010, False)),
    ],
)
def test_execution_starts_in_code(entry, starts, bits, order):
    file = elf(Load(0x30000, bytes(16), flags=R | W), entry=entry, bits=bits, order=order)
    assert ("start-not-executable" in rules(file)) == starts


def test_a_shared_object_without_an_entry_point_starts_nowhere():
    """Although 0 is an address of its first segment."""
    assert rules(Elf([Load(0, bytes(64), flags=R), CODE, NO_EXECUTABLE_STACK], entry=0, type=3)) == []


@pytest.mark.parametrize("tag", [INIT, FINI])
def test_what_the_loader_calls_is_code(tag):
    assert rules(dynamic([(tag, TEXT + 8)])) == []
    finding = found(dynamic([(tag, DATA + 4)]))["start-not-executable"]
    assert finding.what.startswith("DT_INIT lies" if tag == INIT else "DT_FINI lies")
    assert (finding.severity, finding.start) == ("error", DATA + 4)


@pytest.mark.parametrize(("order", "starts"), [("<", True), (">", False)])
def test_an_address_of_a_function_descriptor_is_data(order, starts):
    """The 64-bit big-endian ABI of PowerPC."""
    file = elf(Load(0x30000, bytes(16), flags=R | W), entry=0x30000, machine=PPC64, order=order)
    assert ("start-not-executable" in rules(file)) == starts


@pytest.mark.parametrize(("bits", "order"), FORMATS)
@pytest.mark.parametrize("flags", range(8))
def test_the_stack_is_data(flags, bits, order):
    file = elf(Load(type=STACK_HEADER, data=b"", paddr=0, flags=flags), stack=False, bits=bits, order=order)
    assert rules(file) == (["executable-stack"] if flags & X else [])


def test_one_of_several_stack_headers_is_enough():
    executable = Load(type=STACK_HEADER, data=b"", paddr=0, flags=R | W | X)
    finding = found(elf(NO_EXECUTABLE_STACK, executable))["executable-stack"]
    assert (finding.headers, finding.severity) == ((2,), "error")


@pytest.mark.parametrize(
    ("machine", "bits", "loaded", "severity"),
    [
        (X86_64, 64, False, "note"),
        (X86_64, 64, True, "error"),  # glibc
        (X86_64, 32, False, "error"),  # x32: Linux goes by the class
        (I386, 32, False, "error"),
        (AARCH64, 64, False, "note"),
        (AARCH64, 64, True, "note"),
        (PPC64, 64, True, "note"),
        (ARM, 32, False, "error"),
        (MIPS, 32, True, "error"),
        (RISCV, 64, False, "error"),
        (0xFEED, 64, False, "error"),
    ],
)
def test_what_no_stack_header_means_depends_on_the_machine(machine, bits, loaded, severity):
    options = {"bits": bits, "machine": machine, "stack": False}
    file = dynamic([], **options) if loaded else elf(**options)
    finding = found(file)["stack-not-declared"]
    assert finding.severity == severity
    assert "PT_GNU_STACK" in finding.what
    assert "noexecstack" in finding.why
