"""Guests: from a path on the command line to a description of the initial machine.

::

    path ──load_guest──▶ Guest(manifest, image) ──build──▶ BootState
            manifest_reader.py   elf.py, image.py    boot.py, descriptors.py, pagetables.py

Nothing here knows an engine. All input is hostile: whatever is wrong with it comes out as one
``InputError`` that says what, where and what to do.
"""

from __future__ import annotations

from vmm.guest.boot import BootState, SystemArea, build
from vmm.guest.image import LoadedImage, Segment
from vmm.guest.loader import BundledGuest, Guest, bundled_guests, load_guest
from vmm.guest.manifest import (
    Console,
    CpuSpec,
    End,
    Image,
    Limits,
    MachineSpec,
    Manifest,
    Mapping,
    Paging,
    Policy,
)
from vmm.guest.manifest_reader import parse_manifest, read_manifest
from vmm.guest.symbols import Symbols

__all__ = [
    "BootState",
    "BundledGuest",
    "Console",
    "CpuSpec",
    "End",
    "Guest",
    "Image",
    "Limits",
    "LoadedImage",
    "MachineSpec",
    "Manifest",
    "Mapping",
    "Paging",
    "Policy",
    "Segment",
    "Symbols",
    "SystemArea",
    "build",
    "bundled_guests",
    "load_guest",
    "parse_manifest",
    "read_manifest",
]
