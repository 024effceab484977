"""W^X as a policy: no frame is both written and executed, unless the host approves what was written.

A frame that is *approved* is code (or sealed): the EPT lets nothing write to it. A frame that is written becomes a
window, or stays data, and the EPT lets nothing be fetched from it. So both turns of a frame always reach the VMM::

              a store that the guest's page tables allow; a write by the host, by event delivery, by a page walk
            ┌───────────────────────────────────────────────────────────────────────────────────────────────────┐
            │                                                                                                   ▼
    approved: code ◄──────────────────────────────── approve ────────────────────────────── not approved: window, data
            fetch: see "mapping"                                                  store: see "mapping"; fetch: refused

Rules, by the name that a ``RefusedAccess`` gives:

========  ==========================================================================================================
mapping   the guest's own page tables must not make a frame writable through one alias in use and executable through
          one (the same or another), at the first store and at the first fetch through each alias in each turn
approval  nothing is fetched from a frame that is not approved
tracking  a frame has at most ``MAX_ALIASES`` aliases in use
========  ==========================================================================================================

An alias, (CR3 or ``UNPAGED``, linear page), is *in use* once the guest has stored or fetched through it. Whether it
still allows what it did is looked up in the page tables when it matters.

A decision depends on page tables and on the state of the frame only, and is taken at an instruction that is the same
in every run, although TLB fills come when they like: the first use of a permission in a turn always needs a fill,
because each turn begins with empty TLBs (``FrameControl.move``) and a fill for a read grants no stores; and a later
fill for the same use is granted unseen (``Frame.judged``).
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from vmm.cpu.engine import FETCH, WRITE
from vmm.memory.frames import MAX_ALIASES, Frame, FrameState
from vmm.mmu import Mmu

#: What a refusal does: nothing is refused; the guest gets a #PF; the run ends.
ANSWERS: Final = ("off", "fault", "stop")

#: States in which a frame is approved.
APPROVED: Final = (FrameState.CODE, FrameState.SEALED)


@frozen(slots=True)
class Finding:
    """Why an access is refused: the rule, and the linear pages that are writable and executable now."""

    rule: str
    writable: tuple[int, ...] = ()
    executable: tuple[int, ...] = ()


def is_approved(frame: Frame) -> bool:
    """Whether a frame may be fetched from, as far as approval goes."""
    return frame.lasting in APPROVED


def judge(frame: Frame, mmu: Mmu, access: int, root: int, page: int) -> Finding | None:
    """Judge a store to or fetch from a frame through a linear page of ``root``; None if no rule is against it.

    The access is one that the guest's page tables allow. If it may happen, it is not judged again in this turn.
    """
    if not _is_tracked(frame, mmu, (root, page)):
        return Finding("tracking")
    writable, executable = _reach(frame, mmu)
    if access == WRITE:
        writable.add(page)  # by CR0.WP or not
    if writable and executable:
        return Finding("mapping", tuple(sorted(writable)), tuple(sorted(executable)))
    if access == FETCH and not is_approved(frame):
        return Finding("approval", tuple(sorted(writable)), tuple(sorted(executable)))
    frame.uses.judged.add((root, page, access))
    return None


def _is_tracked(frame: Frame, mmu: Mmu, alias: tuple[int, int]) -> bool:
    """Take an alias into account; False if there is no room, also after those are left out that lead elsewhere now."""
    if alias in frame.uses.used:
        return True
    if len(frame.uses.used) >= MAX_ALIASES:
        _forget_others(frame, mmu)
    if len(frame.uses.used) >= MAX_ALIASES:
        return False
    frame.uses.used[alias] = None
    return True


def _forget_others(frame: Frame, mmu: Mmu) -> None:
    """Forget the aliases that lead elsewhere now, and what was judged of them."""
    for root, page in list(frame.uses.used):
        found = mmu.rights(root, page)
        if found is None or found[0] != frame.hpa:
            del frame.uses.used[root, page]
            frame.uses.judged -= {(root, page, WRITE), (root, page, FETCH)}


def _reach(frame: Frame, mmu: Mmu) -> tuple[set[int], set[int]]:
    """The linear pages in use through which the page tables make the frame writable, and executable."""
    writable, executable = set(), set()
    for root, page in frame.uses.used:
        found = mmu.rights(root, page)
        if found is not None and found[0] == frame.hpa:
            if found[1]:
                writable.add(page)
            if found[2]:
                executable.add(page)
    return writable, executable
