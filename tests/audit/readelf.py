"""What binutils' readelf says of a file: an independent reading of what the audit is about."""

import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field

_HEADER = re.compile(r"^  (\S.*?) +0x\w+ 0x(\w+) 0x\w+ 0x\w+ 0x(\w+) ([R ])([W ])([E ]) ")
_SECTION = re.compile(r"^  \[ *\d+\] (\S+) +\S+ +[0-9a-f]{8,16} [0-9a-f]{6,} [0-9a-f]{6,} [0-9a-f]{2,} +([A-Za-z]*) ")
_RELOCATIONS = re.compile(r"^(?:Relocation section '(.*)'|'(\w+)' relocation section) at offset")
_RELOCATION = re.compile(r"^([0-9a-f]{8,16}) +[0-9a-f]{8,16} +(\S+)")
_RELR_OFFSET = re.compile(r"^([0-9a-f]{8}|[0-9a-f]{16})$")


@dataclass
class Readelf:
    """Segments by the number of their program header; relocations by address and type, those of RELR by address."""

    #: Start, size, and flags as ``R E``.
    loads: dict = field(default_factory=dict)
    stack: str | None = None
    text_relocations: set = field(default_factory=set)
    relocations: Counter = field(default_factory=Counter)
    relr: Counter = field(default_factory=Counter)

    def written(self):
        """All places that a loader writes to, as often as it does."""
        places = Counter()
        for (address, kind), count in self.relocations.items():
            places[address] += 0 if kind.endswith("_NONE") else count
        return +(places + self.relr)

    def around(self, address):
        """The numbers and flags of the segments at an address."""
        return [(n, flags) for n, (start, size, flags) in self.loads.items() if start <= address < start + size]


def readelf(path, options="-lSWdr"):
    """Run it; ``options`` with ``D`` make it find the relocations by the dynamic table."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(["readelf", options, str(path)], capture_output=True, check=False, env=environment)
    return _parse(done.stdout.decode("utf-8", "replace").splitlines(), by_section="D" not in options)


def _parse(lines, *, by_section):
    result, number, in_memory, counted = Readelf(), 0, set(), False
    for line in lines:
        if header := _HEADER.match(line):
            kind, start, size, *flags = header.groups()
            if kind == "LOAD" and int(size, 16):
                result.loads[number] = (int(start, 16), int(size, 16), "".join(flags))
            elif kind == "GNU_STACK":
                result.stack = "".join(flags)
            number += 1
        elif section := _SECTION.match(line):
            if "A" in section[2]:
                in_memory.add(section[1])
        elif "(TEXTREL)" in line:
            result.text_relocations.add("DT_TEXTREL")
        elif "(FLAGS)" in line and "TEXTREL" in line:
            result.text_relocations.add("DF_TEXTREL")
        elif table := _RELOCATIONS.match(line):
            counted = not by_section or table[1] in in_memory
        elif counted and (relocation := _RELOCATION.match(line)):
            result.relocations[int(relocation[1], 16), relocation[2]] += 1
        elif counted and (offset := _RELR_OFFSET.match(line)):
            result.relr[int(offset[1], 16)] += 1
    return result
