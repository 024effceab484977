"""Recording a run: its trace holds all that it takes to have the same run again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import attrs

from vmm.errors import ImageError, ManifestError
from vmm.guest.ept import ept_values
from vmm.guest.files import read_file
from vmm.guest.image import ELF_FILE_LIMIT
from vmm.guest.manifest import MANIFEST_LIMIT
from vmm.printed import hear_text
from vmm.state_file import state_hash
from vmm.trace.header import Header
from vmm.trace.sink import BATCH, TraceSink

if TYPE_CHECKING:
    from vmm.guest.loader import Guest
    from vmm.machine import Machine
    from vmm.trace.sink import Output


def record(machine: Machine, output: Output, *, target: str | None = None, batch: int = BATCH) -> TraceSink:
    """Write the trace of a run that is about to begin, with its inputs and a hash of its final state.

    Call it before anything else is done to the machine, and ``flush`` what it returns when the run has ended.
    ``target`` is how the guest was named, by default the path of its manifest. Raises ``InputError`` if the guest's
    files are gone: the trace names them by their SHA-256.
    """
    files = digests(machine.guest)
    sink = TraceSink(
        output, lambda: _header(machine, files, target).to_json(), lambda: state_hash(machine), batch=batch
    )
    machine.observe(sink.record)
    machine.inputs.listener = sink.input
    hear_text(machine, [sink.console])
    return sink


def digests(guest: Guest) -> tuple[str, str | None]:
    """SHA-256 of a guest's image and of its manifest, None if it has none; raises ``InputError``."""
    manifest, fix = guest.manifest, "leave the guest's files in their place"
    image = read_file(manifest.image.file, ELF_FILE_LIMIT, error=ImageError, fix=fix)
    if not manifest.is_file:
        return _sha256(image), None
    return _sha256(image), _sha256(read_file(manifest.path, MANIFEST_LIMIT, error=ManifestError, fix=fix))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _header(machine: Machine, files: tuple[str, str | None], target: str | None) -> Header:
    guest, options = machine.guest, machine.options
    image, manifest = files
    policy = attrs.asdict(guest.manifest.policy)
    if options.coherence is not None:
        policy["coherence"] = options.coherence.value
    return Header(
        guest=guest.name,
        image=image,
        memory=guest.manifest.machine.memory,
        policy=policy,
        ept=ept_values(machine.ept.profile),
        manifest=manifest,
        target=str(guest.manifest.path) if target is None else target,
        blocks=options.block_events,
        capacity=options.capacity,
        single_step=options.single_step,
        traps=options.traps,
        seed=guest.manifest.schedule.seed if options.seed is None else options.seed,
        interactive=machine.reporter.interactive,
        exact_ports=tuple(machine.ports.exact_outside),
    )
