"""Names of relocation types."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

from elftools.elf import enums

_TYPES: Final[dict[str, Mapping[str, int]]] = {
    "EM_386": enums.ENUM_RELOC_TYPE_i386,
    "EM_X86_64": enums.ENUM_RELOC_TYPE_x64,
    "EM_ARM": enums.ENUM_RELOC_TYPE_ARM,
    "EM_AARCH64": enums.ENUM_RELOC_TYPE_AARCH64,
    "EM_MIPS": enums.ENUM_RELOC_TYPE_MIPS,
    "EM_PPC": enums.ENUM_RELOC_TYPE_PPC,
    "EM_PPC64": enums.ENUM_RELOC_TYPE_PPC64,
    "EM_S390": enums.ENUM_RELOC_TYPE_S390X,
}


def relocation_type(machine: str, number: int) -> str:
    """The name of a type of relocation as the machine's ABI gives it, or its number."""
    return _names(machine).get(number, f"type {number}")


@cache
def _names(machine: str) -> dict[int, str]:
    return {number: name for name, number in _TYPES.get(machine, {}).items() if name.startswith("R_")}
