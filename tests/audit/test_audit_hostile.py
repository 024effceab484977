"""Files that are damaged, or made to do harm: nothing but an ImageError of one line may come out."""

import struct
import tracemalloc
from pathlib import Path

import pytest
from audit_files import (
    ANDROID_RELA,
    ANDROID_RELASZ,
    DATA,
    FLAGS,
    FORMATS,
    JMPREL,
    PLTREL,
    PLTRELSZ,
    RELA,
    RELASZ,
    RELR,
    RELRSZ,
    STRTAB,
    SYMTAB,
    TEXT,
    TEXTREL,
    dynamic,
    elf,
    image_of,
    packed,
    rel,
    relr,
    rules,
    sleb128,
)
from guest.elf_builder import Elf, Load, Section
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.audit import findings, read_image
from vmm.errors import ImageError, InputError
from vmm.guest.loader import bundled_image

BAD = [
    (b"", "not an ELF file"),
    (b"MZ" + bytes(100), "not an ELF file"),
    (b"\x7fELF", "truncated in the ELF header"),
    (elf().build()[:63], "truncated in the ELF header: 63 bytes of 64"),
    (elf(bits=32).build()[:51], "truncated in the ELF header: 51 bytes of 52"),
    (elf().build()[:64], "program header 0 lies beyond the end"),
    (elf().build()[:100], "program header 0 is cut off"),
    (Elf(ident=b"\x7fELF\x03\x01\x01" + bytes(9)), "ELF class 3"),
    (Elf(ident=b"\x7fELF\x02\x00\x01" + bytes(9)), "data encoding 0"),
    (Elf(ident=b"\x7fELF\x02\x01\x02" + bytes(9)), "ELF version 2"),
    (elf(type=1), "type ET_REL, which no loader maps"),
    (elf(type=4), "type ET_CORE"),
    (elf(type=0xBEEF), "type 0xbeef"),
    (elf(phentsize=55), "program headers of 55 bytes instead of 56"),
    (elf(phentsize=56, bits=32), "program headers of 56 bytes instead of 32"),
    (elf(phnum=0), "no program headers"),
    (elf(phnum=1025), "1025 program headers, more than 1024"),
    (elf(phnum=0xFFFF), "65535 program headers"),
    (Elf([Load(type=6)]), "no PT_LOAD segment"),
]


@pytest.mark.parametrize(("file", "says"), BAD, ids=[f"{i}-{row[1]}" for i, row in enumerate(BAD)])
def test_what_cannot_be_audited_is_refused(file, says):
    with pytest.raises(ImageError) as caught:
        image_of(file)
    assert caught.value.where == "image"
    assert says in caught.value.what
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shentsize": 41}, "section headers of 41 bytes instead of 64"),
        ({"shnum": 5000}, "5000 section headers, more than 4096"),
        ({"shnum": 40}, "section header 3 lies beyond the end of the file"),
    ],
)
def test_damaged_section_headers_hide_nothing(options, says):
    """Loaders do not look at them."""
    file = elf(Load(0x30000, b"data", flags=7), sections=[Section(".text", addr=TEXT, size=64)], **options)
    assert rules(file) == ["writable-executable-segment", "sections-unreadable"]
    note = findings(image_of(file))[-1]
    assert says in note.what
    assert note.severity == "note"


def test_names_of_sections_beyond_the_end():
    file = elf(sections=[Section(".text", addr=TEXT, size=64)]).build()
    place = file.rindex(struct.pack("<Q", len(b"\0.text\0.shstrtab\0")))
    assert rules(file[:place] + b"\xff" * 8 + file[place + 8 :]) == ["sections-unreadable"]


def everything(bits, order, *, android=True):
    """A file with all that the audit reads."""
    options = {"bits": bits, "order": order}
    file = elf(**options)
    blobs = {
        "rela": rel(file, (TEXT, 1, 1), (DATA + 8, 0, 8), (0x90000, 0, 8), addend=7),
        "plt": rel(file, (TEXT + 8, 1, 7)),
        "relr": file.words(*relr([DATA, DATA + 16, DATA + 64], bits // 8)),
        "packed": packed([(TEXT + 16, 8), (DATA + 8, 8), (DATA + 16, 0x3_0000_0001)], seed=5),
        "sym": bytes(40) + b"\1" + bytes(40),
        "str": b"\0name\0",
    }
    tags = [(FLAGS, 4), (TEXTREL, 0), (RELA, "rela"), (RELASZ, "len rela"), (JMPREL, "plt"), (PLTRELSZ, "len plt")]
    tags += [(PLTREL, 17), (RELR, "relr"), (RELRSZ, "len relr"), (SYMTAB, "sym"), (STRTAB, "str")]
    tags += [(ANDROID_RELA, "packed"), (ANDROID_RELASZ, "len packed")] if android else []
    sections = [Section(".text", addr=TEXT, size=64, flags=7), Section(".data", addr=DATA, size=64, flags=3)]
    return dynamic(tags, blobs, loads=[Load(0x40000, b"\xcc" * 16, flags=7)], sections=sections, **options).build()


def real_files():
    """An executable and a shared object of this machine, if it has such, and a guest."""
    candidates = [bundled_image("alias-patch"), Path("/bin/true"), *sorted(Path("/usr/lib").glob("*/libdl.so.2"))[:1]]
    return [path.read_bytes() for path in candidates if path.exists() and path.stat().st_size < 1 << 20]


FILES = [everything(*form) for form in FORMATS] + real_files()
NASTY = [0, 1, 4, 7, 0x7F, 0xFF, 0x1000, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1, DATA, TEXT]


@st.composite
def mutated(draw):
    data = bytearray(draw(st.sampled_from(FILES)))
    # The headers, or anything.
    place = st.one_of(st.integers(0, min(len(data), 1200)), st.integers(0, len(data)))
    for _ in range(draw(st.integers(0, 6))):
        size, value = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(NASTY))
        at = draw(place)
        data[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, draw(st.sampled_from(["little", "big"])))
    return bytes(data[: draw(st.one_of(st.none(), st.integers(0, len(data))))])


def check_is_safe(data):
    refused, found = "", ()
    try:
        found = findings(read_image(data, "image"))
    except InputError as error:
        refused = str(error)
    assert refused.isprintable()
    for finding in found:
        assert all(text.isprintable() for text in (finding.what, finding.why, *(d.text for d in finding.details)))
        assert len(finding.details) <= max(finding.count, 8)


@given(mutated())
@settings(max_examples=1500, deadline=5000)
def test_mutated_files_give_findings_or_an_error(data):
    check_is_safe(data)


@given(st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.binary(max_size=400))
@settings(max_examples=300, deadline=5000)
def test_noise_behind_the_magic(bits, order, noise):
    check_is_safe(b"\x7fELF" + bytes([bits, order, 1]) + bytes(9) + noise)


def bombs():
    ones = b"\xff" * (1 << 20)
    many_sections = [Section("", type=4, offset=0, size=(1 << 16) * 24) for _ in range(4000)]
    yield "relr", dynamic([(RELR, "r"), (RELRSZ, len(ones))], {"r": ones})
    yield "one table in thousands of sections", elf(Load(0x30000, bytes(2 << 20)), sections=many_sections)
    for count in (1 << 16, (1 << 22) + 1, 1 << 62):
        table = b"APS2" + b"".join(map(sleb128, [count, 0, count, 3, 0, 8]))
        yield f"packed {count}", dynamic([(ANDROID_RELA, "p"), (ANDROID_RELASZ, len(table))], {"p": table})
    unending = {"sym": bytes(24) + b"\1", "str": b"A" * (4 << 20)}
    tags = [(RELA, "rela"), (RELASZ, "len rela"), (SYMTAB, "sym"), (STRTAB, "str")]
    text = rel(elf(), *[(TEXT, 1, 1)] * 10_000, addend=0)
    yield "names without an end", dynamic(tags, {"rela": text, **unending})
    yield "memory without an end", elf(*[Load(0x30000, b"", memsz=1 << 62, flags=7)] * 300)
    yield "bytes without an end", elf(Load(0x30000, b"", filesz=1 << 62, memsz=1 << 62))


@pytest.mark.parametrize("file", [pytest.param(file, id=name) for name, file in bombs()])
def test_what_a_file_claims_costs_no_memory(file):
    data = file.build()
    tracemalloc.start()
    check_is_safe(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20
