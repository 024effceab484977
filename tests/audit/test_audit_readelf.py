"""The audit against `readelf`, of binutils: on executables of this machine, and on files made to have findings."""

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from audit_files import FORMATS
from readelf import readelf
from test_audit_hostile import everything

from vmm.audit import findings, read_image
from vmm.guest.loader import bundled_guests, bundled_image

pytestmark = pytest.mark.skipif(
    shutil.which("readelf") is None and os.environ.get("CI") != "true", reason="no GNU binutils on this machine"
)
_SAMPLE, _PARTS, _LARGEST = 300, 6, 2 << 20
_PLACES = ("usr/bin/*", "usr/sbin/*", "usr/libexec/*", "usr/lib/*.so*", "usr/lib/*/*.so*", "usr/lib32/*.so*")


def sample():
    """Up to 300 ELF files, evenly spread over the places where this machine has them, always the same."""
    files = sorted(path for place in _PLACES for path in Path("/").glob(place) if is_small_elf(path))
    return files[:: -(-len(files) // _SAMPLE) or 1]


def is_small_elf(path):
    if path.is_symlink() or not path.is_file() or not os.access(path, os.R_OK) or path.stat().st_size > _LARGEST:
        return False
    with path.open("rb") as file:
        start = file.read(18)
    executable, shared_object = 2, 3
    order = "little" if start[5:6] == b"\1" else "big"
    return start[:4] == b"\x7fELF" and int.from_bytes(start[16:18], order) in (executable, shared_object)


def differences(path, options="-lSWdr"):
    """What the audit and readelf do not agree on: by subject, what each of them says."""
    image = read_image(path.read_bytes(), str(path))
    ours, theirs = said_by_audit(image), said_by_readelf(readelf(path, options))
    return {subject: (ours[subject], theirs[subject]) for subject in ours if ours[subject] != theirs[subject]}


def said_by_audit(image):
    found = {}
    for finding in findings(image):
        found.setdefault(str(finding.rule), []).append(finding)
    declared = found.get("text-relocations-declared", [])
    return {
        "segments": {s.number: (s.start, s.size, s.access.replace("-", " ")) for s in image.segments},
        "writable and executable": {f.headers[0] for f in found.get("writable-executable-segment", [])},
        "executable stack": "executable-stack" in found,
        "no stack header": "stack-not-declared" in found,
        "declared": {name for name in ("DT_TEXTREL", "DF_TEXTREL") if declared and name in declared[0].what},
        "relocated": Counter(entry.address for t in image.relocations for entry in t.entries if entry.type != 0),
        "into text": {f.headers[0]: f.count for f in found.get("text-relocations", [])},
        "outside": sum(f.count for f in found.get("relocations-outside", [])),
    }


def said_by_readelf(report):
    text, outside = Counter(), 0
    for address, count in report.written().items():
        around = report.around(address)
        if not around:
            outside += count
        elif not any("W" in flags for _, flags in around):
            text[around[0][0]] += count
    return {
        "segments": report.loads,
        "writable and executable": {n for n, (_, _, flags) in report.loads.items() if flags in ("RWE", " WE")},
        "executable stack": report.stack is not None and "E" in report.stack,
        "no stack header": report.stack is None,
        "declared": report.text_relocations,
        "relocated": report.written(),
        "into text": dict(text),
        "outside": outside,
    }


@pytest.mark.parametrize("part", range(_PARTS))
def test_on_this_machine(part):
    disagreements = {str(path): differences(path) for path in sample()[part::_PARTS]}
    assert {path: what for path, what in disagreements.items() if what} == {}


@pytest.mark.parametrize("name", [guest.name for guest in bundled_guests()])
def test_on_bundled_guests(name):
    path = bundled_image(name)
    if path.suffix == ".elf":
        assert differences(path) == {}


@pytest.mark.parametrize(("bits", "order"), FORMATS)
def test_on_every_class_and_byte_order(bits, order, tmp_path):
    """All kinds of tables that this readelf knows: it has nothing to say about Android's."""
    path = tmp_path / "image"
    path.write_bytes(everything(bits, order, android=False))
    assert differences(path, "-lWdrD") == {}


SOURCE = """
.globl _start
.text
_start:
    {move} $place, {register}
    {move} $elsewhere, {register}
.data
    .balign 8
place: {word} place
    {word} place
"""
ABI = {
    "x86_64": ("--64", "elf_x86_64", {"move": "movabs", "register": "%rax", "word": ".quad"}),
    "i386": ("--32", "elf_i386", {"move": "movl", "register": "%eax", "word": ".long"}),
}
NO_STACK, STACK = "stack-not-declared", "executable-stack"
DECLARED, TEXT = "text-relocations-declared", "text-relocations"
LINKED = [
    ("-N", {"writable-executable-segment", NO_STACK}),
    ("-z execstack", {STACK}),
    ("-z noexecstack", set()),
    ("-shared -z notext", {DECLARED, TEXT, NO_STACK}),
    ("-shared -z notext -z noexecstack -z norelro", {DECLARED, TEXT}),
    ("-pie -z notext -z noexecstack", {DECLARED, TEXT}),
    ("-shared -N -z execstack", {"writable-executable-segment", STACK}),
]


@pytest.fixture
def link(tmp_path):
    """Assembles and links for an ABI with these options of ld; gives the path."""

    def make(abi, options):
        for_as, for_ld, words = ABI[abi]
        (tmp_path / "image.s").write_text(SOURCE.format(**words))
        subprocess.run(["as", for_as, "-o", "image.o", "image.s"], cwd=tmp_path, check=True)
        outside = [] if "-shared" in options else ["--defsym", "elsewhere=0x1000"]
        command = ["ld", "-m", for_ld, *options.split(), *outside, "-o", "image", "image.o"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        return tmp_path / "image"

    return make


@pytest.mark.parametrize("abi", ABI)
@pytest.mark.parametrize(("options", "expected"), LINKED, ids=[row[0] for row in LINKED])
def test_on_what_the_linker_makes(link, abi, options, expected):
    path = link(abi, options)
    assert differences(path) == {}
    assert {str(finding.rule) for finding in findings(read_image(path.read_bytes(), "image"))} == expected


def test_relr_as_the_linker_packs_it(link):
    path = link("x86_64", "-pie -z notext -z pack-relative-relocs")
    options = subprocess.run(["ld", "--help"], capture_output=True, text=True, check=True).stdout
    tables = [table.name for table in read_image(path.read_bytes(), "image").relocations]
    assert ("DT_RELR" in tables) == ("pack-relative-relocs" in options)
    assert differences(path) == {}


def test_a_text_relocation_names_its_symbol(link):
    found = findings(read_image(link("x86_64", "-shared -z notext").read_bytes(), "image"))
    (finding,) = [finding for finding in found if finding.rule == TEXT]
    assert [detail.text for detail in finding.details] == [
        "DT_RELA R_X86_64_RELATIVE in .text",
        "DT_RELA R_X86_64_64 in .text against elsewhere",
    ]
