"""What the end of a run means: whether the guest did what its manifest says, and in which words."""

from __future__ import annotations

import enum
from typing import Final

from attrs import frozen

from vmm.exits import End, Json
from vmm.guest.manifest import Manifest


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


@frozen(slots=True)
class Outcome:
    """``what`` is one sentence about the end; ``complaint`` says why it is not a good one, None if it is."""

    status: Status
    what: str
    complaint: str | None = None


def judge(manifest: Manifest, end: End) -> Outcome:
    """Compare the end of a run with what the manifest asks for.

    A run that a script or a handler stopped ended as it should: whoever stops it has the say.
    """
    what = describe(end)
    match end.reason:
        case "port":
            return _by_port(manifest, end.detail, what)
        case "halt" if manifest.end.halt:
            return Outcome(Status.OK, what)
        case "stopped":
            return Outcome(Status.OK, what)
        case "interrupted":
            return Outcome(Status.INTERRUPTED, what, "the run was interrupted before the guest had ended")
        case reason if reason in DEATHS:
            return Outcome(Status.DIED, what, f"the guest died: {what}{_advice(reason)}")
        case "error":
            return Outcome(Status.WRONG, what, f"the VMM gave up: {end.detail.get('what')}")
    return Outcome(Status.WRONG, what, f"the guest ended with {what}, and its manifest wants {_wanted(manifest)}")


def describe(end: End) -> str:
    """The end of a run in words, without a judgement."""
    detail = end.detail
    match end.reason:
        case "port":
            return f"{detail['value']:#x} written to port {detail['port']:#x}"
        case "halt":
            return f"HLT at {end.rip - 1:#x} with no interrupt to come"
        case "triple fault":
            return f"triple fault at {end.rip:#x}, while vector {detail['vector']} was delivered"
        case "unmapped memory":
            where = f"GPA {detail['gpa']:#x}"
            return f"access to {where}, where there is no memory, by the instruction at {end.rip:#x}"
        case "exits":
            return f"the budget of {detail['limit']:,} exits was used up at {end.rip:#x}"
        case "time":
            return f"the time limit of {detail['limit']:g} s was reached at {end.rip:#x}"
        case "error":
            return f"{detail.get('error', 'error')} at {end.rip:#x}"
    return f"{end.reason} at {end.rip:#x}"


def _by_port(manifest: Manifest, detail: Json, what: str) -> Outcome:
    wanted = manifest.end.value
    if wanted is None or detail["value"] == wanted:
        return Outcome(Status.OK, what)
    return Outcome(Status.WRONG, what, f"the guest ended with {what}, and its manifest wants {wanted:#x}")


def _wanted(manifest: Manifest) -> str:
    port, value = manifest.end.port, manifest.end.value
    ways = []
    if port is not None:
        ways.append(f"{'a byte' if value is None else hex(value)} on port {port:#x}")
    if manifest.end.halt:
        ways.append("HLT")
    return " or ".join(ways) or "no end at all"


def _advice(reason: str) -> str:
    key = {"exits": "exits", "time": "seconds"}.get(reason)
    return f"; if it needs more, raise [limits].{key} in its manifest" if key else ""
