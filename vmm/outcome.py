"""What the end of a run means: whether the guest did what its manifest says, and in which words."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from attrs import frozen

if TYPE_CHECKING:
    from vmm.guest.manifest import Manifest
    from vmm.records import End


class Status(enum.IntEnum):
    """Exit statuses of the command line."""

    OK = 0
    """The guest ended as its manifest says, and the script holds."""
    WRONG = 1
    """It did not."""
    BAD_INPUT = 2
    DIED = 3
    """Triple fault, budget or time used up, or memory that does not exist."""
    INTERRUPTED = 130


#: Ends that are the death of a guest.
DEATHS: Final = frozenset({"triple fault", "exits", "time", "unmapped memory"})

_WORDS: Final = {
    "port": "{value:#x} written to port {port:#x}",
    "halt": "HLT at {rip:#x}, with no interrupt to come",
    "reset": "a reset of the machine at {rip:#x}",
    "triple fault": "triple fault at {rip:#x}, while vector {vector} was delivered",
    "W^X violation": "a {access} at {gva:#x} that the W^X policy refuses (rule {rule}), by the instruction at {rip:#x}",
    "unmapped memory": "the instruction at {rip:#x} reached for GPA {gpa:#x}, where there is no memory",
    "exits": "the budget of {limit:,} exits was used up at {rip:#x}",
    "time": "the time limit of {limit:g} s was reached at {rip:#x}",
    "error": "{error} at {rip:#x}",
}
_ADVICE: Final = {
    "exits": "; if it needs more, raise [limits].exits in its manifest",
    "time": "; if it needs more, raise [limits].seconds in its manifest, or give --seconds",
}


@frozen(slots=True)
class Outcome:
    """``what`` is the end in words; ``complaint`` says why it is not a good one, None if it is."""

    status: Status
    what: str
    complaint: str | None = None


def judge(manifest: Manifest, end: End, *, stale: int = 0, translations: int = 0) -> Outcome:
    """Compare the end of a run with what the manifest asks for.

    A run that a script or a handler stopped ended as it should: whoever stops it has the say. ``stale`` counts the
    executions of stale code that nobody expects, ``translations`` the uses of stale translations. What another vCPU has
    written may be stale by any protocol for cross-modifying code, until the vCPU synchronises: that says nothing.
    """
    what = describe(end)
    if end.reason in DEATHS:
        return Outcome(Status.DIED, what, f"the guest died: {what}{_ADVICE.get(end.reason, '')}")
    if end.reason == "interrupted":
        return Outcome(Status.INTERRUPTED, what, "interrupted before the guest had ended")
    if end.reason == "error":
        return Outcome(Status.WRONG, what, f"{end.detail['error']}: {end.detail['what']}")
    if end.reason == "stopped" or _is_wanted(manifest, end):
        if stale:
            words = f"{stale:,} execution{'' if stale == 1 else 's'} of stale code"
            return Outcome(Status.WRONG, what, f"{words}: it was changed, and executed without synchronising")
        if translations:
            words = f"{translations:,} use{'' if translations == 1 else 's'} of stale translations"
            return Outcome(Status.WRONG, what, f"{words}: an invalidation is missing")
        return Outcome(Status.OK, what)
    return Outcome(Status.WRONG, what, f"the guest ended by {what}; its manifest wants {_wanted(manifest)}")


def describe(end: End) -> str:
    """The end of a run in words, without a judgement."""
    words = _WORDS.get(end.reason, f"{end.reason} at {{rip:#x}}")
    rip = end.rip - 1 if end.reason == "halt" else end.rip
    return words.format(rip=rip, **end.detail)


def _is_wanted(manifest: Manifest, end: End) -> bool:
    if end.reason in ("halt", "reset"):
        return manifest.end.halt
    return end.reason == "port" and manifest.end.value in (None, end.detail["value"])


def _wanted(manifest: Manifest) -> str:
    port, value = manifest.end.port, manifest.end.value
    byte = "a byte" if value is None else f"{value:#x}"
    ways = [f"{byte} written to port {port:#x}"] if port is not None else []
    return " or ".join(ways + ["HLT"] * manifest.end.halt) or "no end at all"
