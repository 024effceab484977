"""What a run reports, as frozen records; those of VM exits are in ``vmm.exits``.

A record knows nothing of the machine that made it; ``to_json`` gives the object that a trace line holds (see
``docs/formats.md``).
"""

from __future__ import annotations

from typing import Any, ClassVar

from attrs import field, frozen

Json = dict[str, Any]


@frozen(slots=True)
class Record:
    """What every record of a run has in common.

    ``vcpu`` is the number of the virtual processor that was at work, None on a machine that has only one.
    """

    kind: ClassVar[str] = ""

    vcpu: int | None = field(default=None, kw_only=True, repr=False)

    def to_json(self) -> Json:
        """The object of this record's trace line, without its sequence number."""
        out = self._fields()
        if self.vcpu is not None:
            out["vcpu"] = self.vcpu
        return out

    def _fields(self) -> Json:
        """What records of this class have besides ``vcpu``."""
        raise NotImplementedError


@frozen(slots=True)
class DeviceAccess(Record):
    """The instruction at ``rip`` has loaded from a device in guest-physical memory, or stored to it.

    ``size`` is 1, 2, 4 or 8 bytes; ``direction`` is "read" or "write". It comes behind the EPT violation that brought
    the access to the VMM; an instruction may make several.
    """

    kind: ClassVar[str] = "device"

    rip: int
    gpa: int
    size: int
    direction: str
    value: int

    def _fields(self) -> Json:
        names = ("rip", "gpa", "size", "direction", "value")
        return {"kind": self.kind, **{name: getattr(self, name) for name in names}}


@frozen(slots=True)
class LogEntry(Record):
    """The VMM has found the page of ``gpa`` in the page-modification log, at ``index`` 511 (the first) to 0."""

    kind: ClassVar[str] = "log"

    gpa: int
    index: int

    def _fields(self) -> Json:
        return {"kind": "log", "gpa": self.gpa, "index": self.index}


@frozen(slots=True)
class Modification(Record):
    """One architectural write that reached a code frame, or one change of code bytes by the host or a device.

    ``instruction`` numbers the stepped instruction: records of one store over two frames share it. ``gva`` and
    ``rip`` are None where no guest instruction is at work (``cause`` is not "store"). ``aliases`` are all
    linear addresses known to reach ``gpa`` in the current address space, ``blocks`` the identities of the
    translated blocks that died, in order of creation. ``callers`` are return addresses found on the stack, innermost
    first (``vmm.trap.callers``); None where they were not looked for.
    """

    kind: ClassVar[str] = "modification"

    gpa: int
    gva: int | None
    rip: int | None
    old: bytes
    new: bytes
    cause: str
    instruction: int
    aliases: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    callers: tuple[int, ...] | None = None

    def _fields(self) -> Json:
        """The modification; ``old`` and ``new`` as hexadecimal digits."""
        callers = {} if self.callers is None else {"callers": list(self.callers)}
        return {
            "kind": "modification",
            "gpa": self.gpa,
            "gva": self.gva,
            "rip": self.rip,
            "size": len(self.new),
            "old": self.old.hex(),
            "new": self.new.hex(),
            "cause": self.cause,
            "instruction": self.instruction,
            "aliases": list(self.aliases),
            "blocks": list(self.blocks),
            **callers,
        }


@frozen(slots=True)
class BlockEvent(Record):
    """A translated block was created, invalidated or evicted, and why."""

    kind: ClassVar[str] = "block"

    event: str
    block: int
    gpa: int
    gva: int
    size: int
    mode: str
    cause: str
    #: The vCPU whose block it is, None on a machine that has only one.
    owner: int | None = None

    def _fields(self) -> Json:
        owner = {} if self.owner is None else {"owner": self.owner}
        return {
            "kind": "block",
            "event": self.event,
            "block": self.block,
            "gpa": self.gpa,
            "gva": self.gva,
            "size": self.size,
            "mode": self.mode,
            "cause": self.cause,
            **owner,
        }


@frozen(slots=True)
class FrameEvent(Record):
    """A frame went from one state to another (see the state table in ``docs/architecture.md``)."""

    kind: ClassVar[str] = "frame"

    gpa: int
    before: str
    after: str
    cause: str

    def _fields(self) -> Json:
        return {"kind": "frame", "gpa": self.gpa, "from": self.before, "to": self.after, "cause": self.cause}


@frozen(slots=True)
class ViewEvent(Record):
    """Something happened to views of the EPT (see ``docs/views.md``).

    ``event`` is "added", "switched" (``view`` is in use from now on), "restricted" (``size`` bytes at ``gpa`` allow at
    most ``access``) or "mapped" (they lead to where ``target`` does in view 0). ``cause`` is "host" or "vmfunc",
    ``rip`` the VMFUNC.
    """

    kind: ClassVar[str] = "view"

    event: str
    view: int
    cause: str
    rip: int | None = None
    gpa: int | None = None
    size: int | None = None
    access: str | None = None
    target: int | None = None

    def _fields(self) -> Json:
        """Those that the event has."""
        out: Json = {"kind": "view"}
        for name in ("event", "view", "cause", "rip", "gpa", "size", "access", "target"):
            value = getattr(self, name)
            if value is not None:
                out[name] = value
        return out


@frozen(slots=True)
class RefusedAccess(Record):
    """A store or fetch that the W^X policy or a seal does not let happen, although the guest's page tables do.

    ``rule`` is "mapping" (the frame is writable and executable by the guest's own page tables), "approval" (a fetch
    from a frame that was written, or never approved), "tracking" (more aliases in use than are tracked) or "seal".
    ``access`` is "write" or "fetch". ``gva`` is None for an access to a paging structure, ``rip`` the instruction at
    work. ``writable`` and ``executable`` are the linear addresses in use, in any address space, through which the
    guest's page tables allow each now; both are empty for a seal.
    """

    kind: ClassVar[str] = "refusal"

    rule: str
    access: str
    gpa: int
    gva: int | None
    rip: int
    writable: tuple[int, ...] = ()
    executable: tuple[int, ...] = ()

    def _fields(self) -> Json:
        """The refusal's."""
        return {
            "kind": "refusal",
            "rule": self.rule,
            "access": self.access,
            "gpa": self.gpa,
            "gva": self.gva,
            "rip": self.rip,
            "writable": list(self.writable),
            "executable": list(self.executable),
        }


@frozen(slots=True)
class Injection(Record):
    """An event was delivered through the guest's IDT at VM entry (SDM vol. 3, 27.6 "Event injection").

    ``type`` is "hardware exception", "software interrupt", "software exception" or "external interrupt";
    ``rip`` is where the handler starts.
    """

    kind: ClassVar[str] = "injection"

    vector: int
    type: str
    error_code: int | None
    rip: int

    def _fields(self) -> Json:
        return {
            "kind": "injection",
            "vector": self.vector,
            "type": self.type,
            "error_code": self.error_code,
            "rip": self.rip,
        }


@frozen(slots=True)
class StaleExecution(Record):
    """An instruction was executed from bytes that memory does not hold any more (a weaker coherence model).

    ``rip`` is its linear address, ``gpa`` that of its first stale piece; ``executed`` are the bytes that ran,
    ``memory`` what memory holds. ``writer`` is the linear address of the instruction that wrote that (None: the host
    did), ``writer_vcpu`` the vCPU at work then, ``instruction`` the number of its modification (None: the frame was
    data at the time, and this is the first store to it), ``time`` how many exits there had been. ``missing`` says what
    would have made the processor see it.
    """

    kind: ClassVar[str] = "stale"

    rip: int
    gpa: int
    executed: bytes
    memory: bytes
    writer: int | None
    writer_vcpu: int
    instruction: int | None
    time: int
    missing: str

    def _fields(self) -> Json:
        return {
            "kind": "stale",
            "rip": self.rip,
            "gpa": self.gpa,
            "executed": self.executed.hex(),
            "memory": self.memory.hex(),
            "writer": self.writer,
            "writer_vcpu": self.writer_vcpu,
            "instruction": self.instruction,
            "time": self.time,
            "missing": self.missing,
        }


@frozen(slots=True)
class StaleTranslation(Record):
    """An access was allowed, or went where it went, only because a translation was cached (strict staleness).

    ``access`` is "read", "write" or "fetch" by the instruction at ``rip`` to ``gva``, which reached ``gpa``. ``entry``
    names the paging-structure entry that has changed since ("PTE", "EPT PTE", …), ``place`` is its GPA, or for an EPT
    entry the first GPA that it translates; ``old`` is what was cached of it, ``new`` what it is. ``writer`` is the
    instruction that changed it last (None: the host), ``writer_vcpu`` the vCPU at work then, ``time`` how many exits
    there had been; the last two are None if that is not known any more. ``missing`` is the instruction that should
    have followed: "INVLPG" or "INVEPT". ``view`` is the EPT view in use, None on a machine that has only one.
    """

    kind: ClassVar[str] = "stale_translation"

    rip: int
    access: str
    gva: int
    gpa: int
    entry: str
    place: int
    old: int
    new: int
    writer: int | None
    writer_vcpu: int | None
    time: int | None
    missing: str
    view: int | None = None

    def _fields(self) -> Json:
        names = ("rip", "access", "gva", "gpa", "entry", "place", "old", "new")
        authors = ("writer", "writer_vcpu", "time", "missing")
        view = {} if self.view is None else {"view": self.view}
        return {"kind": self.kind, **{name: getattr(self, name) for name in (*names, *authors)}, **view}


@frozen(slots=True)
class End(Record):
    """How the run ended. ``detail`` carries what the reason defines (port and value, for one)."""

    kind: ClassVar[str] = "end"

    reason: str
    rip: int
    detail: Json = field(factory=dict)

    def _fields(self) -> Json:
        return {"kind": "end", "reason": self.reason, "rip": self.rip, **self.detail}
