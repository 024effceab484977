"""From what the user typed to a guest."""

import os

import pytest

import vmm
from vmm.errors import ImageError, InputError, ManifestError
from vmm.guest import Mapping, Paging, build, bundled_guests, load_guest

from .elf_builder import Elf, Load

FLAT = """schema = "vmm-guest/1"
name = "small"
summary = "Does little"
[image]
format = "flat"
file = "image.bin"
load = 0x10000
[machine]
memory = 0x40000
mode = "long"
[cpu]
entry = 0x10000
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "image.bin").write_bytes(b"\x90" * 16 + b"\xf4")
    (folder / "guest.toml").write_text(FLAT)
    return folder


@pytest.fixture
def bundle(folder, monkeypatch):
    """An installed package whose only bundled guest is the one in ``folder``."""
    package = folder.parent / "vmm"
    package.mkdir()
    folder.rename(folder.parent / "moved")
    (package / "bundled_guests").mkdir()
    (folder.parent / "moved").rename(package / "bundled_guests" / "small")
    monkeypatch.setattr(vmm, "__file__", str(package / "__init__.py"))
    return package


def rewrite(folder, old, new):
    text = (folder / "guest.toml").read_text()
    assert old in text
    (folder / "guest.toml").write_text(text.replace(old, new))


@pytest.mark.parametrize("form", ["manifest", "folder", "text"])
def test_a_manifest_or_its_folder_is_a_guest(folder, form):
    path = {"manifest": folder / "guest.toml", "folder": folder, "text": str(folder)}[form]
    guest = load_guest(path)
    assert (guest.name, guest.entry) == ("small", 0x10000)
    assert build(guest).writes == ((0x10000, b"\x90" * 16 + b"\xf4"),)


def test_bundled_guests_are_found_in_an_installed_package(bundle):
    (guest,) = bundled_guests()
    assert (guest.name, guest.summary) == ("small", "Does little")
    assert guest.path == bundle / "bundled_guests" / "small" / "guest.toml"
    assert load_guest("small").name == "small"


def test_bundled_guests_are_found_beside_the_package_in_a_source_checkout(bundle):
    (bundle / "bundled_guests").rename(bundle.parent / "guests")
    assert [guest.path.parent.parent for guest in bundled_guests()] == [bundle.parent / "guests"]


def test_no_bundled_guests_is_an_empty_list(bundle):
    (bundle / "bundled_guests").rename(bundle.parent / "elsewhere")
    assert bundled_guests() == []


def test_a_bundled_name_wins_over_a_folder_of_that_name(bundle, monkeypatch):
    (bundle.parent / "small").mkdir()
    monkeypatch.chdir(bundle.parent)
    assert load_guest("small").manifest.path.parent.parent == bundle / "bundled_guests"
    with pytest.raises(ManifestError):
        load_guest("./small")


def test_a_misspelt_name_is_recognised(bundle):
    with pytest.raises(ManifestError, match="did you mean the bundled guest small"):
        load_guest("smal")


@pytest.mark.parametrize("path", ["no/such/thing", "", "a\0b", "x" * 5000, "\x1b[2J", os.devnull])
def test_a_path_that_means_nothing_is_refused_in_one_line(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_guest(path)
    assert str(caught.value).isprintable()


def test_a_file_that_is_neither_manifest_nor_elf_is_refused(folder):
    with pytest.raises(ImageError, match=r"neither a Multiboot image, nor an ELF64 image, nor a guest\.toml"):
        load_guest(folder / "image.bin")


def test_a_manifest_that_is_not_utf8_is_refused(folder):
    (folder / "guest.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ManifestError, match="UTF-8 at byte 8"):
        load_guest(folder)


def test_a_huge_manifest_is_refused(folder):
    (folder / "guest.toml").write_text("#" * ((1 << 20) + 1))
    with pytest.raises(ManifestError, match="larger than"):
        load_guest(folder)


def test_a_missing_image_is_refused(folder):
    (folder / "image.bin").unlink()
    with pytest.raises(ImageError, match=r"\[image\].file"):
        load_guest(folder)


OWN_TABLES = "entry = 0x9999000\nregisters = { cr3 = 0x20000 }\nidt = 0x8888000"
PAGING = "[paging]\n[[paging.map]]\ngva = 0x8000000\ngpa = 0x10000\nlength = 0x1000\naccess = "


@pytest.mark.parametrize(
    ("cpu", "key", "says"),
    [
        ("entry = 0xffff", "entry", "outside of the image; the image occupies 0x10000 to 0x10011"),
        ("entry = 0x10011", "entry", "outside of the image"),
        ("entry = 0x40000", "entry", "not an address of RAM"),
        ("entry = 'main'", "entry", "no symbol 'main'"),
        (f"entry = 0x10000\n{PAGING}'rx'", "entry", "not an address of RAM; map it"),
        (f"entry = 0x8000000\n{PAGING}'rw'", "entry", 'is mapped "rw"'),
        (f"entry = 0x8000000\ncpl = 3\n{PAGING}'rx'\nuser = false", "entry", "supervisor only"),
        ("entry = 0x10000\nidt = 0x40000", "idt", "not an address of RAM"),
        ("entry = 0x10000\nrsp0 = 0x40001", "rsp0", "not an address of RAM"),
        (f"entry = 0x8000000\nidt = 0x10000\n{PAGING}'rx'", "idt", "map it in"),
    ],
)
def test_addresses_that_lead_nowhere_are_refused(folder, cpu, key, says):
    rewrite(folder, "entry = 0x10000", cpu)
    with pytest.raises(ManifestError) as caught:
        load_guest(folder)
    assert caught.value.where == f"{folder / 'guest.toml'}: [cpu].{key}"
    assert says in f"{caught.value.what}; {caught.value.fix}"


@pytest.mark.parametrize(
    "cpu",
    [
        "entry = 0x10010",
        f"entry = 0x8000010\ncpl = 3\n{PAGING}'rx'",
        f"entry = 0x8000010\ncpl = 2\n{PAGING}'rx'\nuser = false",
        "entry = 0x10000\nidt = 0x3f000\nrsp0 = 0x40000",
        OWN_TABLES,
    ],
)
def test_addresses_that_lead_somewhere_are_accepted(folder, cpu):
    rewrite(folder, "entry = 0x10000", cpu)
    build(load_guest(folder))


@pytest.mark.parametrize("mode", ["protected", "real"])
def test_without_paging_an_address_is_a_place_in_ram(folder, mode):
    rewrite(folder, "long", mode)
    assert load_guest(folder).entry == 0x10000
    rewrite(folder, "entry = 0x10000", "entry = 0x10011")
    with pytest.raises(ManifestError, match="outside of the image"):
        load_guest(folder)


def elf_folder(folder, elf, cpu=""):
    (folder / "image.elf").write_bytes(elf.build())
    text = FLAT.replace('"flat"', '"elf64"').replace("image.bin", "image.elf").replace("load = 0x10000\n", "")
    (folder / "guest.toml").write_text(text.replace("entry = 0x10000", cpu))
    return folder


NAMED = [("start", 0x12, 1, 0x10001)]


def test_an_elf_image_starts_at_its_header_s_entry_or_at_the_one_given(folder):
    assert load_guest(elf_folder(folder, Elf(entry=0x10001))).entry == 0x10001
    assert load_guest(elf_folder(folder, Elf(entry=0), "entry = 0x10001")).entry == 0x10001
    assert load_guest(elf_folder(folder, Elf(symbols=NAMED), "entry = 'start'")).entry == 0x10001


def test_a_misspelt_symbol_is_recognised(folder):
    with pytest.raises(ManifestError, match='did you mean "start"'):
        load_guest(elf_folder(folder, Elf(symbols=NAMED), "entry = 'strat'"))


def test_an_elf_image_without_any_entry_is_refused(folder):
    with pytest.raises(ImageError, match="no entry point"):
        load_guest(elf_folder(folder, Elf(entry=0)))


def test_an_elf_entry_outside_of_the_segments_is_refused(folder):
    with pytest.raises(ManifestError, match="outside of the image"):
        load_guest(elf_folder(folder, Elf(entry=0x20000)))


def bare(tmp_path, elf):
    (tmp_path / "image").write_bytes(elf.build())
    return load_guest(tmp_path / "image")


def test_a_bare_elf_image_gets_a_sensible_machine(tmp_path):
    guest = bare(tmp_path, Elf())
    manifest = guest.manifest
    assert (guest.name, guest.entry) == ("image", 0x10000)
    assert (manifest.machine.mode, manifest.machine.memory, manifest.cpu.cpl) == ("long", 4 << 20, 0)
    assert manifest.paging == Paging("rwx")
    assert (manifest.end.port, manifest.policy.code) == (0xF4, "load")
    state = build(guest)
    assert state.cpus[0].gprs["rsp"] == 4 << 20
    assert state.code_frames == (0x10000,)


def test_a_bare_elf_image_gets_memory_for_all_of_it(tmp_path):
    guest = bare(tmp_path, Elf([Load(0x1000000, b"\xf4", memsz=0x500000)], entry=0x1000000))
    assert guest.manifest.machine.memory == 0x1600000


def test_a_bare_elf_image_linked_high_is_mapped_there_too(tmp_path):
    high = 0xFFFF_FFFF_8100_0800
    guest = bare(tmp_path, Elf([Load(0x100800, b"\xf4" * 0x900, vaddr=high)], entry=high))
    expected = (Mapping(0xFFFF_FFFF_8100_0000, 0x100000, 0x2000, "rwx"),)
    assert guest.manifest.paging == Paging("rwx", expected)


@pytest.mark.parametrize("vaddr", [0x20001, 0x7FFF_FFFF_FFFF, 1 << 50, 0xFFFF_FE00_0000_0000, (1 << 64) - 2])
def test_a_bare_elf_image_that_cannot_be_mapped_is_refused(tmp_path, vaddr):
    with pytest.raises(ImageError, match="cannot map virtual address"):
        bare(tmp_path, Elf([Load(vaddr=vaddr)], entry=vaddr))


def test_a_bare_elf_image_beyond_a_gigabyte_is_refused(tmp_path):
    with pytest.raises(ImageError, match="RAM ends at 0x40000000"):
        bare(tmp_path, Elf([Load(1 << 30)], entry=1 << 30))


def test_a_bare_elf_image_must_start_inside_of_itself(tmp_path):
    with pytest.raises(ManifestError, match="outside of the image"):
        bare(tmp_path, Elf(entry=0x20000))
