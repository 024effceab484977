"""The listings of machine code in the sources are what the code is."""

import re
import subprocess
from pathlib import Path

import pytest

from vmm.cpu import countdown, fill_table
from vmm.cpu.machine_code import placed

LINE = re.compile(r'^    "([0-9a-f]+)" *# *(.*)$', re.MULTILINE)


@pytest.mark.parametrize("module", [countdown, fill_table], ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_listing_assembles_to_the_code(module, tmp_path):
    listing = LINE.findall(Path(module.__file__).read_text())
    assert b"".join(bytes.fromhex(code) for code, _ in listing) == module._CODE
    source, made, raw = (tmp_path / name for name in ("code.S", "code.o", "code.bin"))
    source.write_text("\n".join([".intel_syntax noprefix", *(text for _, text in listing), ""]))
    subprocess.run(["as", "-o", made, source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", made, raw], check=True)
    assert raw.read_bytes() == module._CODE


def test_code_is_never_writable_and_executable():
    address = placed(countdown._CODE)
    maps = Path("/proc/self/maps").read_text().splitlines()
    (line,) = [line for line in maps if int(line.partition("-")[0], 16) == address]
    assert line.split()[1] == "r-xs"
