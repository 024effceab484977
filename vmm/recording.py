"""Recording a run: its trace holds all that it takes to have the same run again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import attrs
from attrs import frozen

from vmm.errors import ImageError, ManifestError
from vmm.guest.ept import ept_values
from vmm.guest.files import read_file
from vmm.guest.image import ELF_FILE_LIMIT
from vmm.guest.manifest import MANIFEST_LIMIT
from vmm.printed import hear_text
from vmm.state_file import state_hash
from vmm.trace.header import Header, RecordedBoot
from vmm.trace.sink import BATCH, TraceSink

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vmm.errors import InputError
    from vmm.guest.loader import BootProtocol, Guest
    from vmm.machine import Machine
    from vmm.trace.sink import Output


def record(
    machine: Machine,
    output: Output,
    *,
    target: str | None = None,
    modules: Sequence[str] | None = None,
    batch: int = BATCH,
) -> TraceSink:
    """Write the trace of a run that is about to begin, with its inputs and a hash of its final state.

    Call it before anything else is done to the machine, and ``flush`` what it returns when the run has ended.
    ``target`` is how the guest was named, by default the path of its manifest, ``modules`` how the files that were
    loaded besides its image were, by default their paths. Raises ``InputError`` if the guest's files are gone: the
    trace names them by their SHA-256.
    """
    files, names = digests(machine.guest), _Names(target, modules)
    sink = TraceSink(
        output, lambda: _header(machine, files, names).to_json(), lambda: state_hash(machine), batch=batch
    )
    machine.observe(sink.record)
    machine.inputs.listener = sink.input
    hear_text(machine, [sink.console])
    return sink


@frozen(slots=True)
class Digests:
    """SHA-256 of a guest's files, hexadecimal: ``manifest`` is None if it has none, ``modules`` are those of a boot."""

    image: str
    manifest: str | None
    modules: tuple[str, ...]


def digests(guest: Guest) -> Digests:
    """The SHA-256 of a guest's files as they are now; raises ``InputError``."""
    manifest, fix = guest.manifest, "leave the guest's files in their place"

    def digest(path: Path, limit: int, error: type[InputError]) -> str:
        return hashlib.sha256(read_file(path, limit, error=error, fix=fix)).hexdigest()

    modules = () if guest.protocol is None else guest.protocol.modules
    return Digests(
        digest(manifest.image.file, ELF_FILE_LIMIT, ImageError),
        digest(manifest.path, MANIFEST_LIMIT, ManifestError) if manifest.is_file else None,
        tuple(digest(module, ELF_FILE_LIMIT, ImageError) for module in modules),
    )


@frozen(slots=True)
class _Names:
    """What ``record`` was told of how the guest's files are named."""

    target: str | None
    modules: Sequence[str] | None


def _header(machine: Machine, files: Digests, names: _Names) -> Header:
    guest, options = machine.guest, machine.options
    policy = attrs.asdict(guest.manifest.policy)
    if options.coherence is not None:
        policy["coherence"] = options.coherence.value
    return Header(
        guest=guest.name,
        image=files.image,
        memory=guest.manifest.machine.memory,
        policy=policy,
        ept=ept_values(machine.ept.profile),
        manifest=files.manifest,
        target=str(guest.manifest.path) if names.target is None else names.target,
        blocks=options.block_events,
        capacity=options.capacity,
        single_step=options.single_step,
        traps=options.traps,
        seed=guest.manifest.schedule.seed if options.seed is None else options.seed,
        interactive=machine.reporter.interactive,
        exact_ports=tuple(machine.ports.exact_outside),
        callers=options.callers,
        boot=None if guest.protocol is None else _boot(guest.protocol, files, names.modules),
    )


def _boot(protocol: BootProtocol, files: Digests, names: Sequence[str] | None) -> RecordedBoot:
    named = map(str, protocol.modules) if names is None else names
    words = (protocol.name, protocol.command_line, files.modules, protocol.names, tuple(named))
    return RecordedBoot(*words, apic=protocol.apic)
