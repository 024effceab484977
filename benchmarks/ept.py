"""What second-stage translation costs: ``python benchmarks/ept.py``. Each figure is the best of several rounds."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from vmm.ept import ExtendedPageTables, Permission

ROUNDS = 10
RW = Permission.R | Permission.W
PAGE, MIB = 4096, 1 << 20
PAGES = 16_384  # of 64 MiB


def seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def mapped(size: int) -> ExtendedPageTables:
    ept = ExtendedPageTables()
    ept.map_range(0, 0, size, RW)
    return ept


def ask_all(ept: ExtendedPageTables) -> None:
    for gpa in range(0, PAGES * PAGE, PAGE):
        ept.translate(gpa)


def first_use() -> float:
    ept = mapped(PAGES * PAGE)
    return seconds(lambda: ask_all(ept)) / PAGES


def repeated_use() -> float:
    ept = mapped(PAGES * PAGE)
    ask_all(ept)
    return seconds(lambda: ask_all(ept)) / PAGES


def protection() -> float:
    ept = mapped(2 * MIB)
    ept.protect(0, Permission.X)
    ept.translate(0)

    def flip() -> None:
        for _ in range(PAGES // 2):
            ept.protect(0, RW)
            ept.protect(0, Permission.X)

    return seconds(flip) / PAGES


def first_change() -> float:
    """The first change of a page in each 2 MiB."""
    ept = mapped(PAGES * PAGE)
    regions = range(0, PAGES * PAGE, 2 * MIB)
    return seconds(lambda: [ept.protect(gpa, Permission.X) for gpa in regions]) / len(regions)


def best(measure: Callable[[], float]) -> float:
    return min(measure() for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    arguments = parser.parse_args()
    result = {
        "map 64 MiB at the start, us": best(lambda: seconds(lambda: mapped(64 * MIB))) * 1e6,
        "map 4 GiB at the start, us": best(lambda: seconds(lambda: mapped(4096 * MIB))) * 1e6,
        "translate a page for the first time, us": best(first_use) * 1e6,
        "translate it again, us": best(repeated_use) * 1e6,
        "change what a page allows, us": best(protection) * 1e6,
        "the first such change in 2 MiB, us": best(first_change) * 1e6,
    }
    result = {what: round(value, 3) for what, value in result.items()}
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for what, value in result.items():
        print(f"{what:45} {value}")


if __name__ == "__main__":
    main()
