"""The first line of a trace: what a run depends on besides its inputs (schema "vmm-trace/1", ``docs/formats.md``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from attrs import frozen

from vmm.guest.fields import U64_MAX
from vmm.records import Json

SCHEMA: Final = "vmm-trace/1"
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PORTS: Final = 1 << 16


@frozen(slots=True)
class RecordedBoot:
    """How the guest of a trace was loaded, if that was by a boot protocol (``vmm.guest.loader.BootProtocol``).

    ``modules`` are the SHA-256 of the files that were loaded besides the image, ``files`` how they were named.
    ``names`` are what the guest was told they are called, the image first; empty if it was not. ``apic`` is whether the
    PC had APICs.
    """

    protocol: str
    command_line: str
    modules: tuple[str, ...]
    names: tuple[str, ...]
    files: tuple[str, ...]
    apic: bool

    def to_json(self) -> Json:
        """Its keys in the header."""
        words = {
            "protocol": self.protocol,
            "command_line": self.command_line,
            "modules": list(self.modules),
            "names": list(self.names),
            **({"apic": True} if self.apic else {}),
        }
        return {"boot": words, "files": list(self.files)}

    @classmethod
    def parse(cls, line: Json) -> RecordedBoot | None:
        """From a header's object, None if that has no such keys; raises ``ValueError`` that says what it lacks."""
        if "boot" not in line:
            return None
        words = {"apic": False, **_key(line, "boot", dict)}
        modules, names, files = _texts(words, "modules"), _texts(words, "names"), _texts(line, "files")
        if not all(map(_SHA256.fullmatch, modules)):
            raise ValueError('no usable "modules"')
        if len(names) not in (0, 1 + len(modules)):
            raise ValueError('no usable "names"')
        if len(files) != len(modules):
            raise ValueError('no usable "files"')
        protocol, command_line = _key(words, "protocol", str), _key(words, "command_line", str)
        return cls(protocol, command_line, modules, names, files, _key(words, "apic", bool))


@frozen(slots=True)
class Header:
    """What the run of a trace was: of which image, under which manifest and policy, with which options.

    ``image`` and ``manifest`` are the SHA-256 of the files; ``manifest`` is None for an image without one. ``target``
    is how the guest was named, ``seed`` what the turns of several vCPUs were drawn from, ``ept`` what of the EPT's
    profile was not as by default. ``interactive`` is whether anybody could act on the guest, so that each exit was
    taken at an instruction boundary. ``exact_ports`` are those of a host program's devices that want one. ``boot`` is
    None unless the guest was loaded by a boot protocol. ``callers`` is whether modifications have return addresses; the
    header does not mention it where they have not.
    """

    guest: str
    image: str
    memory: int
    policy: Mapping[str, Any]
    ept: Mapping[str, Any]
    manifest: str | None
    target: str
    blocks: bool
    capacity: int
    single_step: bool
    traps: bool
    seed: int
    interactive: bool
    exact_ports: tuple[int, ...]
    callers: bool = False
    boot: RecordedBoot | None = None

    def to_json(self) -> Json:
        """The header's object."""
        return {
            "schema": SCHEMA,
            "guest": self.guest,
            "image": self.image,
            "memory": self.memory,
            "policy": dict(self.policy),
            "ept": dict(self.ept),
            "manifest": self.manifest,
            "target": self.target,
            "options": {
                "blocks": self.blocks,
                "capacity": self.capacity,
                "single_step": self.single_step,
                "traps": self.traps,
                **({"callers": True} if self.callers else {}),
            },
            "seed": self.seed,
            "interactive": self.interactive,
            "exact_ports": list(self.exact_ports),
            **({} if self.boot is None else self.boot.to_json()),
        }

    @classmethod
    def parse(cls, line: Json) -> Header:
        """From the object of a trace's first line; raises ``ValueError`` that says what it lacks."""
        options = _key(line, "options", dict)
        exact = _key(line, "exact_ports", list)
        policy = _key(line, "policy", dict)
        if not all(type(port) is int and 0 <= port < _PORTS for port in exact):
            raise ValueError('"exact_ports" that are no ports')
        return cls(
            guest=_key(line, "guest", str),
            image=_digest(line, "image"),
            memory=_key(line, "memory", int),
            policy=policy,
            ept=_key(line, "ept", dict),
            manifest=None if line.get("manifest", "") is None else _digest(line, "manifest"),
            target=_key(line, "target", str),
            blocks=_key(options, "blocks", bool),
            capacity=_number(options, "capacity", 1),
            single_step=_key(options, "single_step", bool),
            traps=_key(options, "traps", bool),
            seed=_number(line, "seed", 0),
            interactive=_key(line, "interactive", bool),
            exact_ports=tuple(exact),
            callers="callers" in options and _key(options, "callers", bool),
            boot=RecordedBoot.parse(line),
        )


def _key(line: Mapping[str, Any], key: str, kind: type) -> Any:  # noqa: ANN401 - of type ``kind``
    value = line.get(key)
    if type(value) is not kind:
        raise ValueError(f'no usable "{key}"')
    return value


def _texts(line: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = _key(line, key, list)
    if not all(isinstance(each, str) for each in value):
        raise ValueError(f'no usable "{key}"')
    return tuple(value)


def _number(line: Mapping[str, Any], key: str, least: int) -> int:
    value: int = _key(line, key, int)
    if not least <= value <= U64_MAX:
        raise ValueError(f'no usable "{key}"')
    return value


def _digest(line: Mapping[str, Any], key: str) -> str:
    value: str = _key(line, key, str)
    if not _SHA256.fullmatch(value):
        raise ValueError(f'no usable "{key}"')
    return value
