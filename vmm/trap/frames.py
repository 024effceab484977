"""Moving frames between their states, and the rules that hold after every move."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from vmm.ept import Permission
from vmm.ept.views import Views
from vmm.errors import InvariantError
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import Frame, FrameState
from vmm.records import FrameEvent
from vmm.reporter import Reporter
from vmm.translation import BlockCache

if TYPE_CHECKING:
    from vmm.trap.door import HiddenCode

RW: Final = Permission.R | Permission.W
#: Of memory without traps, which nothing executes freely.
RWX: Final = Permission.R | Permission.W | Permission.X
RX: Final = Permission.R | Permission.X


class FrameControl:
    """Keeps the EPT in step with the state of each frame.

    ``home`` gives the place that code in a twin of memory was copied from. ``flush`` makes every engine forget its
    cached address translations, ``window_closed`` journals what was written through a window. With ``check`` the rules
    are verified after every transition: no host page writable and executable through whichever GPAs and views, no
    writable frame with live blocks but the one being stepped over, counters that add up. Raises ``InvariantError`` if
    one is broken.
    """

    def __init__(
        self,
        memory: GuestMemory,
        views: Views,
        blocks: BlockCache,
        *,
        home: Callable[[int], int],
        flush: Callable[[], None],
        window_closed: Callable[[Frame], None],
        reporter: Reporter,
        check: bool,
    ) -> None:
        #: What is executed of frames with hidden patches; None where there is none.
        self.hidden: HiddenCode | None = None
        self._memory = memory
        self._ept = views.all[0].ept
        self._views = views
        self._blocks = blocks
        self._home = home
        self._flush = flush
        self._window_closed = window_closed
        self._reporter = reporter
        self._check = check
        #: Under strict staleness told of each GPA whose entry was changed and invalidated.
        self.invalidate: Callable[[int], None] | None = None

    def permissions(self, frame: Frame) -> Permission:
        """What the EPT allows in the frame's state."""
        if frame.state is FrameState.STEPPING:
            return Permission(frame.opened)
        if frame.state is FrameState.DATA or frame.state is FrameState.WINDOW:
            return Permission.R if frame.guarded else RW
        executable_only = self._ept.profile.capabilities.execute_only and not frame.readable
        return Permission.X if executable_only else RX

    def host_of(self, gpa: int) -> int | None:
        """The host page that a GPA leads to, even if the EPT allows nothing there; None without memory."""
        return self._ept.host_page(gpa)

    def shares_block(self, frame: Frame, hpa: int) -> bool:
        """Whether a live block that holds the byte at ``hpa`` has bytes in the frame."""
        spans = (span for block in self._blocks.overlapping(hpa, 1) for span in block.spans)
        return any(self._home(start) & -PAGE == frame.hpa for start, _ in spans)

    def move(self, frame: Frame, state: FrameState, cause: str) -> None:
        """Go to a lasting state: data, code, window or sealed. Cached translations of the old one are flushed.

        What was written through a window is journaled when it closes, whatever closes it.
        """
        before, frame.state = frame.state, state
        frame.judge_again()
        if state in (FrameState.DATA, FrameState.WINDOW):
            self._blocks.invalidate(frame.hpa, PAGE, cause)
        if self.hidden is not None:
            self.hidden.moved(frame, cause)
        self._protect(frame, self.permissions(frame))
        self._flush()
        self._report(frame, before.value, state.value, cause)
        if before is FrameState.WINDOW:
            self._window_closed(frame)
        self._verify(frame)

    def open_window(self, frame: Frame, cause: str) -> None:
        """Let a code frame be written freely until it is fetched from; what changes will be journaled then."""
        frame.before = self._memory.read(frame.hpa, PAGE)
        frame.traps = 0
        self.move(frame, FrameState.WINDOW, cause)

    def grant_reads(self, frame: Frame, cause: str) -> None:
        """Make a code frame R-X for good (policy)."""
        frame.readable = True
        self._protect(frame, self.permissions(frame))
        self._report(frame, frame.state.value, f"{frame.state.value} r-x", cause)
        self._verify(frame)

    def open(self, frame: Frame, permissions: Permission) -> None:
        """Flip a frame for the length of one instruction: readable, or readable and writable, never X."""
        if frame.state is not FrameState.STEPPING:
            frame.resting, frame.state = frame.state, FrameState.STEPPING
        frame.opened = int(permissions)
        self._protect(frame, permissions)
        self._verify(frame)

    def close(self, frame: Frame) -> None:
        """Flip it back, unless the host has moved it meanwhile."""
        if frame.state is FrameState.STEPPING:
            frame.state = frame.resting
            self._protect(frame, self.permissions(frame))
            if frame.overridden:
                frame.overridden = False
                self._flush()
            self._verify(frame)

    def protect(
        self,
        frame: Frame,
        permissions: Permission,
        gpa: int,
        *,
        user_execute: bool | None = None,
    ) -> None:
        """Change what the EPT allows for one GPA of a frame, at the host's wish.

        A frame that is to be writable is data from then on, one that is to be executable is code. Anything less
        restricts its state, until that changes. With a change of state what was cached is invalidated, otherwise that
        is for the caller.
        """
        if frame.guarded:
            self._guard(frame, guarded=False)
        if permissions & Permission.W and frame.state not in (FrameState.DATA, FrameState.WINDOW):
            self.move(frame, FrameState.DATA, "host")
        elif (permissions & Permission.X or user_execute) and not self._is_code(frame):
            self.move(frame, FrameState.CODE, "host")
        self._views.protect(frame, permissions, [gpa], user_execute=user_execute)
        frame.overridden = True
        user = "" if user_execute is None else "u" if user_execute else "-"
        self._report(frame, frame.state.value, f"{permissions}{user}", "host")
        self._verify(frame)

    def protect_sub_pages(self, frame: Frame, writable: int) -> None:
        """Make a frame data of which only some sub-pages may be written: those of the 32 bits of ``writable``."""
        if frame.state not in (FrameState.DATA, FrameState.WINDOW):
            self.move(frame, FrameState.DATA, "host")
        self._protect(frame, Permission.R)
        frame.writable = writable
        self._guard(frame, guarded=True)
        self._report(frame, frame.state.value, f"sub-pages {writable:#x}", "host")

    def _guard(self, frame: Frame, *, guarded: bool) -> None:
        frame.guarded = guarded
        self._views.guard_sub_pages(frame)

    @staticmethod
    def _is_code(frame: Frame) -> bool:
        return frame.state in (FrameState.CODE, FrameState.SEALED)

    def _report(self, frame: Frame, before: str, after: str, cause: str) -> None:
        if self._reporter.observed:
            self._reporter.emit(FrameEvent(frame.gpas[0], before, after, cause))

    def _protect(self, frame: Frame, permissions: Permission) -> None:
        self._views.protect(frame, permissions)
        if self.invalidate is not None:
            for gpa in {*frame.gpas, *(gpa for _, gpa in frame.elsewhere)}:
                self.invalidate(gpa)

    def _verify(self, frame: Frame) -> None:
        if self._check:
            verify_frame(self._views, self._blocks, frame)


def verify_frame(views: Views, blocks: BlockCache, frame: Frame) -> None:
    """Check the rules for one frame, through every GPA in every view; raises ``InvariantError``."""
    union = Permission.NONE
    for view, gpa in views.places(frame):
        entry = view.ept.entry(gpa)
        union |= entry.permissions
        if entry.user_execute and view.ept.profile.mode_based_execute:
            union |= Permission.X
    if union & Permission.W and union & Permission.X:
        raise InvariantError(f"frame {frame.hpa:#x} is writable and executable ({union}) in state {frame.state}")
    live = blocks.overlapping(frame.hpa, PAGE)
    if live and union & Permission.W and frame.state is not FrameState.STEPPING:
        raise InvariantError(f"frame {frame.hpa:#x} is writable with {len(live)} live blocks")
    counters = blocks.counters
    if counters.created != len(blocks) + counters.invalidated + counters.evicted:
        raise InvariantError(f"block counters do not add up: {counters} with {len(blocks)} live")
