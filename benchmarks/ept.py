"""What second-stage translation costs, with large pages and without: ``python benchmarks/ept.py``.

Each figure is the best of several rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from vmm.ept import Capabilities, EptProfile, ExtendedPageTables, Permission

ROUNDS = 10
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


MEASURES = {
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
