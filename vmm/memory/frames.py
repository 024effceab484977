"""Frames of guest memory: their state, and the addresses that reach them.

A *frame* is a 4 KiB host page of guest memory; several GPAs may map to one, and several linear addresses (GVAs)
to each GPA. The state decides what the EPT allows:

===========  ===================  ============  =========================================================
state        loads, stores        fetch         leaves it on
===========  ===================  ============  =========================================================
data         RW-                  no            first fetch: code
code         --- or R-- (policy)  X             store: stepping, or window (policy); read: stepping, or R--
stepping     RW- or R--           latched copy  the end of the one instruction: what it was before
window       RW-                  no            next fetch: code
sealed       --- or R--           X             never; a store is refused
===========  ===================  ============  =========================================================

A frame that is *guarded* is R-- as data and window: the sub-page permission table judges each store.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final

from attrs import define, field

from vmm.memory.ram import PAGE

#: How many linear pages of one frame are remembered; a guest that maps a frame more often loses the oldest.
MAX_ALIASES = 64
#: Bytes of the smallest large page that aliases are remembered of as a whole.
REGION: Final = 1 << 21


class FrameState(enum.Enum):
    """What a frame is to the trap (see the table above)."""

    DATA = "data"
    CODE = "code"
    STEPPING = "stepping"
    WINDOW = "window"
    SEALED = "sealed"


#: (CR3, GVA page) pairs, in the order in which they were seen.
Aliases = dict[tuple[int, int], None]
#: Of a frame that was reached by none; there are many, so that each costs as little as can be.
_NO_ALIASES: Final[Aliases] = {}


@define(slots=True, eq=False)
class Uses:
    """Under a W^X policy: the aliases by which a frame was written or fetched so far, and what was judged.

    ``judged`` are the uses of a permission, as (CR3, GVA page, access), that the policy has seen since the frame came
    into its state.
    """

    used: Aliases = field(factory=dict)
    judged: set[tuple[int, int, int]] = field(factory=set)


@define(slots=True, eq=False)
class Frame:
    """One frame. ``gpas`` are the pages that the EPT maps to it, ``linear`` the (CR3, GVA page) pairs seen.

    Where there are several EPT views, ``gpas`` hold in all of them but where one has such a page lead to another frame;
    ``elsewhere`` are the (view, GPA) pairs that lead to this one.
    """

    hpa: int
    state: FrameState = FrameState.DATA
    #: While the state is "stepping": the state to go back to.
    resting: FrameState = FrameState.DATA
    #: While the state is "stepping": bits 2:0 of its EPT entries.
    opened: int = 0
    gpas: list[int] = field(factory=list)
    elsewhere: tuple[tuple[int, int], ...] = ()
    linear: Aliases = field(default=_NO_ALIASES)
    #: Contents when the window was opened, or last journaled.
    before: bytes = b""
    #: Whether code reads were granted (policy), so that the frame is R-X instead of --X.
    readable: bool = False
    #: Whether the host has given a GPA of it other permissions than its state does; engines may have cached them.
    overridden: bool = False
    #: Whether stores to it are judged by the sub-page permission table, so that it is R-- where it would be RW-.
    guarded: bool = False
    #: Of a guarded frame: the sub-pages that may be written, as 32 bits.
    writable: int = 0
    #: Writes trapped since the frame became code, and reads trapped so far, for the adaptive policy.
    traps: int = 0
    reads: int = 0
    _uses: Uses | None = None

    @property
    def lasting(self) -> FrameState:
        """The state that it is in but for the one instruction that is being stepped."""
        return self.resting if self.state is FrameState.STEPPING else self.state

    def learn(self, root: int, page: int) -> None:
        """Remember that a linear page of the address space ``root`` reached this frame."""
        if self.linear is _NO_ALIASES:
            self.linear = {}
        _remember(self.linear, (root, page))

    @property
    def uses(self) -> Uses:
        """What a W^X policy has seen of it."""
        if self._uses is None:
            self._uses = Uses()
        return self._uses

    def judge_again(self) -> None:
        """Have a W^X policy judge each use of a permission anew."""
        if self._uses is not None:
            self._uses.judged.clear()


def _remember(aliases: Aliases, key: tuple[int, int]) -> None:
    """Add one; the oldest goes if they are too many."""
    if key not in aliases:
        if len(aliases) >= MAX_ALIASES:
            del aliases[next(iter(aliases))]
        aliases[key] = None


class Frames:
    """All frames that anything was asked about, by host address.

    ``ram`` is the size of RAM in bytes, ``system_gpa`` the first GPA of the system area, which follows it.
    """

    def __init__(self, ram: int, system_gpa: int) -> None:
        self._ram = ram
        self._system_gpa = system_gpa
        self._frames: dict[int, Frame] = {}
        self._regions: dict[int, Aliases] = {}

    def at(self, hpa: int) -> Frame:
        """The frame that holds an HPA."""
        page = hpa & -PAGE
        frame = self._frames.get(page)
        if frame is None:
            frame = self._frames[page] = Frame(page, gpas=[self._first_gpa(page)])
        return frame

    def learn_region(self, root: int, linear: int, gpa: int) -> None:
        """Remember that a large page of the address space ``root`` maps 2 MiB, from ``linear`` to ``gpa``."""
        _remember(self._regions.setdefault(gpa, {}), (root, linear))

    def in_regions(self, root: int, gpa: int) -> list[int]:
        """The linear pages that reach a GPA page through a large page of an address space, as far as is known."""
        known = self._regions.get(gpa & -REGION, ())
        return [linear | gpa & REGION - PAGE for where, linear in known if where == root]

    def reached_by(self, frame: Frame) -> list[tuple[int, int]]:
        """The (CR3, GVA page) pairs of all address spaces that are known to have reached a frame."""
        found = list(frame.linear)
        for gpa in (*frame.gpas, *(gpa for _, gpa in frame.elsewhere)):
            regions = self._regions.get(gpa & -REGION, ())
            found += [(root, linear | gpa & REGION - PAGE) for root, linear in regions]
        return found

    def __iter__(self) -> Iterator[Frame]:
        return iter(self._frames.values())

    def is_system(self, hpa: int) -> bool:
        """Whether an HPA lies in the system area."""
        return hpa >= self._ram

    def _first_gpa(self, hpa: int) -> int:
        """The GPA that leads to an HPA from the start."""
        return hpa if hpa < self._ram else hpa - self._ram + self._system_gpa
