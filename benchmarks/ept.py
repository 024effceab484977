"""What second-stage translation costs, with large pages and without: ``python benchmarks/ept.py``.

Each figure is the best of several rounds, in microseconds. A *fill* is the whole of one: the question of the engine,
the walk of the four levels of the guest and of the EPT, the answer, and the load that it was for.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from keystone import KS_ARCH_X86, KS_MODE_64, Ks

from vmm.ept import Capabilities, EptProfile, ExtendedPageTables, Permission
from vmm.guest.manifest import Mapping
from vmm.guest.pagetables import FOUR_LEVEL, PageTables
from vmm.machine import Machine, RunOptions

ROUNDS = 5
RW = Permission.R | Permission.W
PAGE, MIB = 4096, 1 << 20
PAGES = 16_384  # of 64 MiB
PROFILES = {
    "large pages": EptProfile(),
    "4 KiB only": EptProfile(capabilities=Capabilities(pages_2m=False, pages_1g=False)),
}


def seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def mapped(profile: EptProfile, size: int) -> ExtendedPageTables:
    ept = ExtendedPageTables(profile)
    ept.map_range(0, 0, size, RW)
    return ept


def ask_all(ept: ExtendedPageTables) -> None:
    for gpa in range(0, PAGES * PAGE, PAGE):
        ept.translate(gpa)


def start(profile: EptProfile) -> float:
    return seconds(lambda: mapped(profile, 4096 * MIB))


def first_use(profile: EptProfile) -> float:
    ept = mapped(profile, PAGES * PAGE)
    return seconds(lambda: ask_all(ept)) / PAGES


def repeated_use(profile: EptProfile) -> float:
    ept = mapped(profile, PAGES * PAGE)
    ask_all(ept)
    return seconds(lambda: ask_all(ept)) / PAGES


def change(profile: EptProfile) -> float:
    ept = mapped(profile, 2 * MIB)
    ept.protect(0, Permission.X)
    ept.translate(0)

    def flip() -> None:
        for _ in range(PAGES // 2):
            ept.protect(0, RW)
            ept.protect(0, Permission.X)

    return seconds(flip) / PAGES


def first_change(profile: EptProfile) -> float:
    ept = mapped(profile, PAGES * PAGE)
    regions = range(0, PAGES * PAGE, 2 * MIB)
    return seconds(lambda: [ept.protect(gpa, Permission.X) for gpa in regions]) / len(regions)


#: The guest of the fills: code, then its own four levels of page tables; it loads from each of ``PAGES`` pages.
CODE, TABLES, DATA = 0x10000, 0x20000, 0x100_0000
MANIFEST = """
schema = "vmm-guest/1"
name = "fills"
image = { format = "flat", file = "image.bin", load = 0x10000 }
machine = { memory = 0x6000000, mode = "long" }
cpu = { entry = 0x10000, registers = { cr3 = 0x20000 } }
"""
#: Loads from all pages, as many times as there are rounds; with a flush of the TLB before each, if it says so.
LOADS = """
    mov ebx, {rounds}
round: {flush}
    mov edi, {data}
    mov ecx, {pages}
page: mov al, [rdi]
    add edi, 4096
    dec ecx
    jnz page
    dec ebx
    jnz round
    xor eax, eax
    out 0xf4, al
"""
FLUSH = "mov rax, cr3; mov cr3, rax"


def loads(profile: EptProfile, rounds: int, flush: str) -> float:
    """Seconds for a guest's loads from its pages."""
    tables = PageTables(TABLES, FOUR_LEVEL)
    tables.map(Mapping(CODE, CODE, PAGE, "rx"))
    tables.map(Mapping(DATA, DATA, PAGES * PAGE, "rw"))
    code, _ = Ks(KS_ARCH_X86, KS_MODE_64).asm(
        LOADS.format(rounds=rounds, flush=flush, data=DATA, pages=PAGES), CODE, as_bytes=True
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "image.bin").write_bytes(code.ljust(TABLES - CODE, b"\xcc") + tables.to_bytes())
        Path(folder, "guest.toml").write_text(MANIFEST, encoding="utf-8")
        with Machine.from_manifest(folder, RunOptions(ept=profile)) as machine:
            took = seconds(machine.run)
            assert machine.end is not None
            assert machine.end.reason == "port", machine.end
            return took


def first_fill(profile: EptProfile) -> float:
    return loads(profile, 1, FLUSH) / PAGES


def repeated_fill(profile: EptProfile) -> float:
    return (loads(profile, 103, FLUSH) - loads(profile, 3, FLUSH)) / (100 * PAGES)


MEASURES = {
    "a fill, of a page for the first time": first_fill,
    "a fill, of the same page again": repeated_fill,
    "map 4 GiB at the start": start,
    "translate a page for the first time": first_use,
    "translate it again": repeated_use,
    "change what a page allows": change,
    "the first such change in 2 MiB": first_change,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    arguments = parser.parse_args()
    result = {
        what: {
            name: round(min(measure(profile) for _ in range(ROUNDS)) * 1e6, 2) for name, profile in PROFILES.items()
        }
        for what, measure in MEASURES.items()
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for what, figures in result.items():
        print(f"{what:37}" + "".join(f"  {name} {value:>9}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
