"""The patches of Debian's kernel, accounted for: the page about them is followed, and its traces are held to rules.

Run with ``pytest -m linux``; the count of patches by mechanism is printed.
"""

from __future__ import annotations

import shutil
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from vmm.patches.joined import join
from vmm.patches.mapping import Mapping
from vmm.patches.mechanism import Attributor, Mechanism
from vmm.patches.stores import Stores
from vmm.patches.summary import Summary
from vmm.patches.symbols import find_slide, read_kernel_symbols
from vmm.trace.painter import Painter
from vmm.trace.reading import TraceReader

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from pages import ROOT, Reader, blocks_of, provide_commands

pytestmark = pytest.mark.linux

#: What every boot of this kernel does.
ALWAYS = {
    Mechanism.ALTERNATIVES,
    Mechanism.RETURNS,
    Mechanism.PARAVIRT,
    Mechanism.FTRACE,
    Mechanism.STATIC_CALLS,
    Mechanism.JUMP_LABELS,
    Mechanism.SMP_LOCKS,
    Mechanism.REUSE,
}


@pytest.fixture(scope="module")
def page(files, tmp_path_factory) -> Path:
    """The folder in which docs/patches.md has been followed, with the traces of its boots."""
    folder = tmp_path_factory.mktemp("patches")
    kernel, initrd = files
    guest = folder / "guest"
    guest.mkdir()
    shutil.copy(kernel, guest / "vmlinuz")
    shutil.copy(initrd, guest / "initrd.cpio")
    provide_commands(folder / "bin")
    reader = Reader(guest, folder / "bin")
    for block in blocks_of(ROOT / "docs" / "patches.md"):
        reader.follow(block)
    return guest


@lru_cache
def summarised(page: Path, name: str) -> tuple[Summary, int]:
    """The summary of a trace, and how many modifications it has."""
    symbols = read_kernel_symbols(page / f"{name}.sym")
    trace = page / f"{name}.jsonl"
    with TraceReader(trace) as reader:
        assert find_slide(symbols, reader) == 0
    summary, attributor = Summary(), Attributor(symbols)
    with TraceReader(trace) as reader:
        for patch in join(Stores(reader)):
            summary.add(patch, attributor.of(patch))
    with trace.open("rb") as lines:
        return summary, sum(b'"kind": "modification"' in line for line in lines)


@pytest.mark.parametrize(
    ("name", "more"), [("boot", set()), ("off", {Mechanism.RETPOLINES}), ("plain", {Mechanism.WINDOW})]
)
def test_every_patch_is_accounted_for(page, name, more, capsys):
    summary, modifications = summarised(page, name)
    with capsys.disabled():
        sys.stdout.write(f"\n\nPatches of Debian's kernel, {name}.jsonl:\n\n")
        summary.show(Painter(sys.stdout.write, color=False), functions=False)
    for table in (summary.mechanisms, summary.functions, summary.mappings):
        assert sum(count.modifications for count in table.values()) == modifications
    assert {each for each, count in summary.mechanisms.items() if count.patches} >= ALWAYS | more
    unresolved = [summary.mechanisms.get(each) for each in (Mechanism.OTHER, Mechanism.TEXT_POKE)]
    assert sum(count.modifications for count in unresolved if count is not None) < modifications / 100
    assert summary.mappings[Mapping.POKE].patches > 100
    assert summary.behind_int3.patches > 5


def test_with_attribution_every_store_to_live_code_has_its_function(page):
    summary, modifications = summarised(page, "boot")
    assert Mechanism.WINDOW not in summary.mechanisms
    assert None not in summary.functions
    assert modifications > 50_000
