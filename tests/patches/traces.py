"""Traces and files of symbols made up for tests, in the layout of a kernel."""

from __future__ import annotations

import json
from pathlib import Path

from vmm.patches.stores import Store

HEADER = {"schema": "vmm-trace/1", "guest": "vmlinuz"}
TEXT = 0xFFFF_FFFF_8100_0000
#: Where the kernel's text is in guest-physical memory, and where all memory is mapped once more.
PHYSICAL = 0x100_0000
DIRECT = 0xFFFF_8880_0000_0000
POKE = 0x7A12_3456_7000

NAMES = {
    "_text": 0x0,
    "memcpy_orig": 0x1000,
    "text_poke_early": 0x2000,
    "__text_poke": 0x2100,
    "text_poke_bp_batch": 0x2200,
    "text_poke_finish": 0x2300,
    "apply_alternatives": 0x3000,
    "apply_returns": 0x3100,
    "apply_paravirt.cold": 0x3200,
    "arch_jump_label_transform_apply": 0x3300,
    "alternatives_smp_module_add": 0x3400,
    "free_reserved_area": 0x4000,
    "clear_page_orig": 0x4100,
    "some_driver": 0x4200,
    "early_idt_handler_array": 0x5000,
    "asm_exc_page_fault": 0x6000,
    "asm_exc_int3": 0x6100,
    "irq_entries_start": 0x7000,
    "patched_function": 0x9000,
}


def at(name: str, offset: int = 0, *, slide: int = 0) -> int:
    """A linear address in a function."""
    return TEXT + NAMES[name] + offset + slide


def symbols_file(path: Path, *, slide: int = 0) -> Path:
    lines = [f"{at(name, slide=slide):016x} t {name}" for name in NAMES]
    path.write_text("\n".join(["0000000000000000 A fixed_percpu_data", *lines]) + "\n", encoding="ascii")
    return path


def physical(linear: int) -> int:
    return linear - TEXT + PHYSICAL


def store(place=None, old=b"\x90", new=b"\x91", *, rip="memcpy_orig", callers=(), gva=None, seq=1, cause="store",
          executed=True) -> Store:
    """A store to a linear address of the kernel's text, ``gva`` if through another one."""
    place = at("patched_function") if place is None else place
    names = tuple(at(name, 5) for name in callers)
    gpa = place - TEXT + PHYSICAL
    return Store(seq, gpa, place if gva is None else gva, at(rip), old, new, cause, names, place if executed else None)


def modification(made: Store, **other) -> dict:
    record = {
        "kind": "modification",
        "gpa": made.gpa,
        "gva": made.gva,
        "rip": made.rip,
        "size": len(made.new),
        "old": made.old.hex(),
        "new": made.new.hex(),
        "cause": made.cause,
        "instruction": 1,
        "aliases": [] if made.executed_at is None else [made.executed_at],
        "blocks": [],
        "callers": list(made.callers),
    }
    return {**record, **other}


def injection(vector: int, rip: int) -> dict:
    return {"kind": "injection", "vector": vector, "type": "hardware exception", "error_code": None, "rip": rip}


def fetch(gpa: int, gva: int) -> dict:
    return {"kind": "exit", "reason": "EPT_VIOLATION", "number": 48, "rip": gva, "qualification": 0x19C, "gpa": gpa,
            "gva": gva}


def trace_file(path: Path, records: list[dict]) -> Path:
    lines = [HEADER, *({"seq": number, **record} for number, record in enumerate(records, start=1))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="ascii")
    return path
