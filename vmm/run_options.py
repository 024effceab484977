"""How a run is to be: what the host chooses besides what a guest's manifest says."""

from __future__ import annotations

from typing import Literal

from attrs import evolve, frozen

from vmm.coherence import Coherence
from vmm.ept import EptProfile
from vmm.errors import OptionError
from vmm.guest.loader import Guest
from vmm.translation.cache import DEFAULT_CAPACITY
from vmm.trap.wx import ANSWERS

#: How long translations are cached: as it comes, or as long as a processor may (``vmm.tlb``).
TLBS = ("loose", "strict")


@frozen(slots=True)
class RunOptions:
    """How to run a guest, beyond what its manifest says.

    ``audit`` checks the bytes of every block at every entry (slow). ``check`` verifies the rules of the trap after
    every transition. ``single_step`` executes everything on the stepping engine, one instruction at a time, as an
    oracle for the rest; without ``traps`` it does so in memory that is readable, writable and executable, so that no
    access is refused and nothing is recorded. ``block_events`` has every block event reported, ``callers`` the return
    addresses that are found on the stack at each modification of code (``vmm.trap.callers``). ``capacity`` is that of
    the block cache, in blocks. ``seconds`` overrides the manifest's wall-clock limit, ``seed`` (64 bits) that of its
    schedule, ``coherence``, ``wx`` and ``tlb`` its policy's, ``ept`` what the processor's EPT can do and what of it is
    enabled. ``input`` is what the guest reads at its input port instead of the manifest's file, ``time`` what its clock
    shows, in nanoseconds since 1970.
    """

    audit: bool = False
    check: bool = False
    single_step: bool = False
    traps: bool = True
    block_events: bool = False
    callers: bool = False
    capacity: int = DEFAULT_CAPACITY
    seconds: float | None = None
    seed: int | None = None
    coherence: Coherence | None = None
    ept: EptProfile | None = None
    wx: Literal["off", "fault", "stop"] | None = None
    tlb: Literal["loose", "strict"] | None = None
    input: bytes | None = None
    time: int | None = None


def with_policy(guest: Guest, options: RunOptions) -> Guest:
    """The guest with the W^X and TLB policies of this run; raises ``OptionError`` for what does not go together."""
    guest = _with_tlb(guest, options)
    model = options.coherence or Coherence(guest.manifest.policy.coherence)
    if not (options.traps or model is Coherence.COHERENT):
        what = f"no traps in the coherence model {model.value}"
        raise OptionError(what, where="options", fix="give one of the two: the model rests on traps")
    wx = guest.manifest.policy.wx if options.wx is None else options.wx
    if wx not in ANSWERS:
        raise OptionError(f"wx = {wx!r}", where="policy", fix=f"choose one of {', '.join(ANSWERS)}")
    if wx != "off" and not guest.manifest.has_page_tables:
        fix = "give it [paging], or no W^X policy"
        raise OptionError("without page tables everything is writable and executable", where="wx", fix=fix)
    if wx != "off" and model is not Coherence.COHERENT:
        fix = "use one of the two policies"
        raise OptionError("frames that must be approved have no stale code", where="wx and coherence", fix=fix)
    if not options.traps and (wx != "off" or guest.manifest.policy.code == "seal"):
        what = "no traps with a policy that refuses accesses"
        raise OptionError(what, where="options", fix="give one of the two: wx and sealed code rest on traps")
    if wx == guest.manifest.policy.wx:
        return guest
    manifest = guest.manifest
    return evolve(guest, manifest=evolve(manifest, policy=evolve(manifest.policy, wx=wx)))


def _with_tlb(guest: Guest, options: RunOptions) -> Guest:
    policy = guest.manifest.policy
    tlb = policy.tlb if options.tlb is None else options.tlb
    if tlb not in TLBS:
        raise OptionError(f"tlb = {tlb!r}", where="policy", fix=f"choose one of {', '.join(TLBS)}")
    if tlb == "strict" and (options.coherence or Coherence(policy.coherence)) is not Coherence.COHERENT:
        fix = "use one of the two"
        raise OptionError("stale translations and stale code at once", where="tlb and coherence", fix=fix)
    if tlb == policy.tlb:
        return guest
    return evolve(guest, manifest=evolve(guest.manifest, policy=evolve(policy, tlb=tlb)))
