"""The final state of a run as one JSON document (schema "vmm-state/1", ``docs/formats.md``)."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.machine import Machine
    from vmm.records import End, Json

SCHEMA: Final = "vmm-state/1"
_NUMBER: Final = r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}"
_RANGE: Final = re.compile(rf"({_NUMBER}):({_NUMBER})", re.ASCII)


@frozen(slots=True)
class MemoryRange:
    """``length`` bytes (1 or more) of RAM from ``gpa`` on."""

    gpa: int
    length: int

    @classmethod
    def parse(cls, text: str, *, memory: int) -> MemoryRange:
        """From ``GPA:LENGTH``, decimal or 0x.

        Raises ``OptionError`` unless it lies in ``memory`` bytes of RAM.
        """
        found = _RANGE.fullmatch(text)
        if found is None:
            what = f"{text[:60]!a} is not GPA:LENGTH"
            raise OptionError(what, where="--hash", fix="write two numbers, like 0x10000:4096")
        gpa, length = (int(part, 16 if part[:2] in ("0x", "0X") else 10) for part in found.groups())
        if not length:
            raise OptionError(f"{text} has no length", where="--hash", fix="give a length of 1 or more")
        if gpa + length > memory:
            what = f"{text} lies out of RAM, which ends at {memory:#x}"
            raise OptionError(what, where="--hash", fix="stay inside of the guest's RAM")
        return cls(gpa, length)


def state_of(machine: Machine, end: End, ranges: Iterable[MemoryRange] = ()) -> Json:
    """The state document of a machine whose run has ended with ``end``."""
    return {
        "schema": SCHEMA,
        "end": {"reason": end.reason, **end.detail},
        "registers": machine.vcpu.context.registers(),
        **_of_several(machine),
        "hashes": [_hash(machine, wanted) for wanted in ranges],
        "counters": counters_of(machine),
    }


def _of_several(machine: Machine) -> Json:
    """The registers of all vCPUs, where there are several."""
    several = len(machine.vcpus) > 1
    return {"vcpus": [vcpu.context.registers() for vcpu in machine.vcpus]} if several else {}


def counters_of(machine: Machine) -> Json:
    """What was counted: exits in all and by reason, modifications, blocks, bytes of console output kept."""
    counts, blocks = machine.reporter.counts, machine.blocks.counters
    return {
        "exits": machine.reporter.total,
        "exits_by_reason": {reason.name: counts[reason] for reason in sorted(counts)},
        "modifications": machine.door.modifications,
        **({} if machine.sanitizer is None else {"stale": machine.sanitizer.found}),
        **({} if machine.tlb is None else {"stale_translations": machine.tlb.found}),
        "blocks": {
            "created": blocks.created,
            "live": len(machine.blocks),
            "invalidated": blocks.invalidated,
            "evicted": blocks.evicted,
        },
        "console_bytes": len(machine.console.output),
    }


def state_hash(machine: Machine) -> Json:
    """Digests of the final state: of all vCPUs' registers, RAM and console output, and of these three together.

    ``docs/formats.md`` says what exactly is hashed.
    """
    registers = json.dumps([vcpu.context.registers() for vcpu in machine.vcpus]).encode("ascii")
    ram = machine.memory.bytes[: machine.guest.manifest.machine.memory]
    parts = [hashlib.sha256(data) for data in (registers, ram, machine.console.output)]
    whole = hashlib.sha256(b"".join(part.digest() for part in parts))
    names = ("sha256", "registers", "memory", "console")
    return dict(zip(names, [digest.hexdigest() for digest in (whole, *parts)], strict=True))


def encode(state: Json) -> bytes:
    """The document's text: ASCII, indented by one, with an end of line."""
    return json.dumps(state, indent=1).encode("ascii") + b"\n"


def _hash(machine: Machine, wanted: MemoryRange) -> Json:
    digest = hashlib.sha256()
    step = 1 << 20
    for start in range(wanted.gpa, wanted.gpa + wanted.length, step):
        digest.update(machine.read(start, min(step, wanted.gpa + wanted.length - start)))
    return {"gpa": wanted.gpa, "length": wanted.length, "sha256": digest.hexdigest()}
