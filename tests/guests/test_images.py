"""The bundled guests are complete, and their committed images are what their sources give."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

from vmm.guest import load_guest

GUESTS = Path(__file__).parents[2] / "guests"
FOLDERS = sorted(manifest.parent for manifest in GUESTS.glob("*/guest.toml"))
EXPECTED = {
    *("alias-patch", "breakpoint", "call-site", "cross-modify", "decrypt", "implicit-stores", "lazy-binding"),
    *("lock-rmw", "mid-fault"),
    *("patch-ahead", "patch-next", "patch-self", "protected-mode", "read-code", "real-mode", "remap"),
    *("rep-movs", "shrink-wrap", "straddle", "three-aliases", "contract"),
    *("translator", "translator-by-address", "cow-fork", "cow-fork-stale", "dual-mapping", "dual-mapping-rwx"),
}

_spec = importlib.util.spec_from_file_location("guests_build", GUESTS / "build.py")
assert _spec is not None
assert _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
sys.modules["guests_build"] = build
_spec.loader.exec_module(build)

each_guest = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
needs_binutils = pytest.mark.skipif(
    shutil.which("as") is None and os.environ.get("CI") != "true", reason="no GNU binutils on this machine"
)


@pytest.fixture
def copied_guests(tmp_path, monkeypatch):
    """A copy of the guests that a test may spoil."""
    copy = tmp_path / "guests"
    shutil.copytree(GUESTS, copy)
    monkeypatch.setattr(build, "GUESTS", copy)
    return copy


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


class TestImages:
    @needs_binutils
    def test_committed_images_are_what_the_sources_give(self, capsys):
        assert build.main(["--check"]) == 0, capsys.readouterr().err

    @needs_binutils
    def test_the_same_tools_give_the_same_bytes(self, copied_guests):
        assert build.main([]) == 0
        first = {file: file.read_bytes() for file in copied_guests.glob("*/image.*")}
        assert build.main([]) == 0
        assert {file: file.read_bytes() for file in first} == first

    @needs_binutils
    def test_building_writes_nothing_but_images_and_symbols(self, copied_guests):
        before = set(copied_guests.rglob("*"))
        for image in copied_guests.glob("*/image.*"):
            image.unlink()
        assert build.main([]) == 0
        assert set(copied_guests.rglob("*")) == before


@needs_binutils
class TestCheckFinds:
    def lines(self, capsys):
        assert build.main(["--check"]) == 1
        return capsys.readouterr().err.splitlines()

    def test_a_changed_instruction(self, copied_guests, capsys):
        edit(copied_guests / "patch-ahead" / "guest.S", "mov     eax, 0x7f", "mov     eax, 0x7e")
        (line,) = self.lines(capsys)
        assert line.startswith("patch-ahead: the segment at 0x10000 (")
        assert "differs from 0x1002" in line

    def test_a_renamed_symbol(self, copied_guests, capsys):
        edit(copied_guests / "decrypt" / "guest.S", "layer_1", "outermost")
        assert self.lines(capsys) == [
            "decrypt: symbol layer_1 is at 0x1000f (size 0), the source gives missing; run guests/build.py",
            "decrypt: symbol outermost is missing, the source gives at 0x1000f (size 0); run guests/build.py",
        ]

    def test_a_segment_with_other_permissions(self, copied_guests, capsys):
        edit(copied_guests / "guest.ld", "code PT_LOAD FLAGS(5)", "code PT_LOAD FLAGS(4)")
        said = "call-site: flags of the segment at 0x10000 is 0x5, the source gives 0x4; run guests/build.py"
        assert said in self.lines(capsys)

    def test_a_changed_flat_image(self, copied_guests, capsys):
        image = copied_guests / "real-mode" / "image.bin"
        image.write_bytes(image.read_bytes()[:-1])
        (line,) = self.lines(capsys)
        assert line.startswith("real-mode: image.bin at 0x0 (")

    def test_missing_symbols_of_a_flat_image(self, copied_guests, capsys):
        (copied_guests / "patch-next" / "image.sym").unlink()
        assert self.lines(capsys) == ["patch-next: image.sym is missing; run guests/build.py"]

    def test_an_entry_that_the_manifest_has_wrong(self, copied_guests, capsys):
        edit(copied_guests / "remap" / "guest.toml", "entry = 0x10000", "entry = 0x10004")
        assert self.lines(capsys) == ["remap: cpu.entry = 0x10004 in guest.toml, 0x10000 in the source"]

    def test_a_descriptor_table_that_the_manifest_has_wrong(self, copied_guests, capsys):
        edit(copied_guests / "breakpoint" / "guest.toml", "idt = 0x11010", "idt = 0x11000")
        assert self.lines(capsys) == ["breakpoint: cpu.idt = 0x11000 in guest.toml, 0x11010 in the source"]

    def test_a_source_that_does_not_assemble(self, copied_guests, capsys):
        edit(copied_guests / "patch-self" / "guest.S", "dec     ecx", "decc    ecx")
        first, *_ = self.lines(capsys)
        assert first.startswith("patch-self: as says: ")

    def test_missing_tools(self, capsys):
        assert build.main(["--check", "--prefix", "no-such-target-"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("cannot build: no-such-target-as, ")
        assert said.endswith("not found; install GNU binutils for x86\n")


def test_no_guest_got_lost():
    assert {folder.name for folder in FOLDERS} >= EXPECTED


@each_guest
class TestEachGuest:
    def test_folder_is_complete(self, folder):
        manifest = load_guest(folder / "guest.toml").manifest
        for name in ("guest.S", "README.md", manifest.image.file.name):
            assert (folder / name).stat().st_size > 0, f"{folder.name}/{name}"
        assert manifest.image.format == "elf64" or manifest.image.symbols is not None

    def test_readme_has_two_lines(self, folder):
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 2
        assert all(lines)

    def test_manifest_says_how_it_ends(self, folder):
        manifest = load_guest(folder / "guest.toml").manifest
        assert manifest.name == folder.name
        assert manifest.summary
        assert (manifest.console.port, manifest.end.port) == (0xE9, 0xF4)
        # Zero is what a guest leaves that never computed anything.
        assert manifest.end.value not in (None, 0)

    def test_image_is_small(self, folder):
        assert load_guest(folder / "guest.toml").manifest.image.file.stat().st_size < 32 * 1024

    def test_source_text_is_plain(self, folder):
        text = (folder / "guest.S").read_text(encoding="ascii")
        assert "\t" not in text
        assert all(len(line) <= 118 and line == line.rstrip() for line in text.splitlines())


def test_between_them_the_guests_show_every_start_state():
    cpus = [load_guest(folder / "guest.toml").manifest for folder in FOLDERS]
    assert {cpu.machine.mode for cpu in cpus} == {"long", "protected", "real"}
    assert {cpu.image.format for cpu in cpus} == {"elf64", "flat"}
    assert {cpu.cpu.cpl for cpu in cpus} == {0, 3}
