"""`vmm audit`: statuses, both forms of its output, bad input."""

import hashlib
import json

import pytest
from guest.elf_builder import Elf, Load, Section

from vmm.guest.loader import bundled_guests, bundled_image

CODE = Load(0x10000, b"\x90\xf4", flags=5)
STACK = Load(type=0x6474E551, data=b"", paddr=0, flags=6)
RWX = Load(0x30000, b"data", flags=7)


@pytest.fixture
def image(tmp_path):
    """Writes an ELF file with these program headers besides its code; gives the path."""

    def make(name, *loads, **options):
        path = tmp_path / name
        path.write_bytes(Elf([CODE, *loads], **options).build())
        return path

    return make


def test_0_for_an_image_without_findings(vmm, image):
    result = vmm("audit", image("clean", STACK))
    assert (result.exit_code, result.stdout.splitlines()[0].split(": ")[1]) == (0, "clean")


def test_0_for_notes(vmm, image):
    result = vmm("audit", image("noted"))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].endswith(": clean, 1 note")
    assert "note   stack-not-declared" in result.stdout


def test_1_for_an_error_in_any_image(vmm, image):
    result = vmm("audit", image("clean", STACK), image("bad", STACK, RWX), image("noted"))
    assert result.exit_code == 1
    verdicts = [line.rsplit(": ")[1] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert verdicts == ["clean", "1 error", "clean, 1 note"]


def test_a_finding_for_people(vmm, image):
    patch = Section(".patch", addr=0x30000, size=4, flags=7)
    lines = vmm("audit", image("bad", STACK, RWX, sections=[patch])).stdout.splitlines()
    assert lines[1] == "  error  writable-executable-segment"
    assert lines[2].strip() == "segment 2 is writable and executable (RWE): 0x30000 to 0x30004"
    assert lines[3].strip() == "0x30000  section .patch, both"
    assert max(map(len, lines[1:])) <= 112


def test_more_places_than_are_shown_are_counted(vmm, image):
    table = b"".join((0x10000).to_bytes(8, "little") + b"\x08" + bytes(15) for _ in range(30))
    path = image("static", STACK, sections=[Section(".rela.plt", type=4, data=table)])
    assert "           ... 22 more\n" in vmm("audit", path).stdout


def test_a_document(vmm, image):
    path = image("bad", STACK, RWX)
    result = vmm("audit", "--json", path, image("clean", STACK))
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["schema"] == "vmm-audit/1"
    bad, clean = document["images"]
    assert (bad["path"], bad["sha256"]) == (str(path), hashlib.sha256(path.read_bytes()).hexdigest())
    assert (bad["type"], bad["machine"], bad["bits"], bad["byte_order"]) == ("ET_EXEC", "EM_X86_64", 64, "little")
    assert (bad["errors"], bad["notes"], clean["errors"], clean["findings"]) == (1, 0, 0, [])
    (finding,) = bad["findings"]
    assert (finding["rule"], finding["severity"]) == ("writable-executable-segment", "error")
    assert (finding["program_headers"], finding["start"], finding["end"]) == ([2], 0x30000, 0x30004)


def test_places_without_an_address_have_none(vmm, image):
    (finding,) = json.loads(vmm("audit", "--json", image("noted")).stdout)["images"][0]["findings"]
    assert not finding.keys() & {"start", "end"}


@pytest.mark.parametrize("name", [guest.name for guest in bundled_guests()])
def test_bundled_guests_are_clean(vmm, name):
    result = vmm("audit", name)
    if bundled_image(name).suffix == ".elf":
        assert result.exit_code == 0
    else:
        assert (result.exit_code, result.stderr.count("not an ELF file")) == (2, 1)


def test_a_file_goes_before_a_guest_of_its_name(vmm, image, tmp_path, monkeypatch):
    image("decrypt", STACK, RWX)
    monkeypatch.chdir(tmp_path)
    assert vmm("audit", "decrypt").exit_code == 1


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("missing", "missing: cannot be read (No such file or directory)"),
        ("text", "text: not an ELF file; give an ELF executable or shared object"),
        (".", ".: not a regular file"),
        ("/dev/null", "/dev/null: not a regular file"),
        ("object", "object: a file of type ET_REL, which no loader maps; link it"),
        ("short", "short: truncated in the ELF header: 40 bytes of 64"),
        ("x" * 5000, "cannot be read (File name too long)"),
        ("a\0b", "not a file name"),
        ("a\x1b[2J", "a\\x1b[2J: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_nothing_else(vmm, image, tmp_path, monkeypatch, target, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("#!/bin/sh\n")
    (tmp_path / "short").write_bytes(Elf().build()[:40])
    image("object", type=1)
    result = vmm("audit", image("bad", RWX), target)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("vmm: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def test_no_image(vmm):
    result = vmm("audit")
    assert result.exit_code == 2
    assert "see `vmm audit --help`" in result.stderr


def test_names_cannot_drive_a_terminal(vmm, image):
    section = Section("a\x1b[2J", addr=0x30000, size=4, flags=7)
    path = image("b\x1b[31m", RWX, sections=[section])
    for option in ("--color=never", "--json"):
        assert "\x1b" not in vmm("audit", option, path).stdout


@pytest.mark.parametrize(("choice", "colours"), [("always", True), ("never", False), ("auto", False)])
def test_colours(vmm, image, choice, colours):
    assert ("\x1b[" in vmm("audit", "--color", choice, image("bad", RWX)).stdout) == colours


def test_a_reader_that_leaves_is_no_error(process, image):
    child = process("audit", "--json", *[image("bad", RWX)] * 400)
    child.stdout.close()
    complaint = child.stderr.read()
    assert (child.wait(30), complaint) == (1, b"")
