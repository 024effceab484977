"""``vmm replay``: a recorded run again, compared with its trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.commands.interrupt import Interruption
from vmm.commands.outputs import STDOUT, OutputFile, Outputs
from vmm.commands.run import SIGNALLED, run_to_end
from vmm.commands.screen import Screen, standard_error, standard_output
from vmm.errors import InputError
from vmm.guest.files import one_line
from vmm.outcome import Status
from vmm.replay import Replay, check_guest, guest_of, header_of, machine_for
from vmm.state_file import encode, state_of
from vmm.trace.painter import Style
from vmm.trace.whole import WholeTrace

if TYPE_CHECKING:
    from vmm.guest.loader import Guest
    from vmm.machine import Machine
    from vmm.trace.comparison import Difference
    from vmm.trace.header import Header

_ROLES: Final = ("recorded", "replayed")
_CUT: Final = {
    "interrupted": "it was interrupted",
    "time": "its time limit ended it",
    "error": "the VMM gave up",
}


@frozen(slots=True)
class ReplayRequest:
    """What the command line asks for; the options are those of ``vmm replay --help``."""

    recording: str
    guest: str | None = None
    modules: tuple[str, ...] = ()
    trace: str | None = None
    state: str | None = None
    seconds: float | None = None
    color: str = "auto"


def replay(request: ReplayRequest) -> int:
    """Replay a trace; the exit status. Raises ``InputError`` for one that cannot be replayed to its end."""
    recording = WholeTrace.read(request.recording)
    header = header_of(recording)
    guest = guest_of(header, request.guest, request.modules)
    check_guest(recording, header, guest)
    with Interruption() as interruption, Outputs(_inputs(guest, recording)) as outputs:
        trace = outputs.add("--trace", request.trace)
        state = outputs.add("--state", request.state)
        with machine_for(header, guest, seconds=request.seconds) as machine:
            return _Replay(request, recording, machine).go(header, trace, state, interruption)


class _Replay:
    """One replay on its machine."""

    def __init__(self, request: ReplayRequest, recording: WholeTrace, machine: Machine) -> None:
        self.request = request
        self.recording = recording
        self.machine = machine
        self.name = one_line(recording.path)

    def go(
        self, header: Header, trace: OutputFile | None, state: OutputFile | None, interruption: Interruption
    ) -> int:
        """Run, write the files, say how it compares."""
        with Replay(self.recording, header, self.machine, trace) as replay:
            replay.begin()
            interruption.break_in = self.machine.break_in
            end = run_to_end(self.machine)
            interruption.settle()
            difference = replay.finish()
        if state is not None:
            state.write(encode(state_of(self.machine, end)))
        if end.reason == "interrupted":
            return SIGNALLED + interruption.received
        if difference is not None:
            self._show(difference)
            return Status.WRONG
        if self.recording.cut is not None:
            raise self._no_end()
        self._agree()
        return Status.OK

    def _agree(self) -> None:
        found = self.recording
        screen = self._screen()
        what = f"{found.records:,} records, {found.inputs:,} inputs, state {found.state}"
        screen.painter.line(f"{self.name}: the replay is byte-identical: {what}", Style.GOOD)
        screen.flush()

    def _show(self, difference: Difference) -> None:
        screen = standard_error(color=self.request.color)
        screen.painter.line(f"{self.name}: the replay parts from the recording {difference.place}", Style.STRONG)
        screen.painter.line()
        difference.show(screen.painter, *_ROLES)
        screen.flush()

    def _no_end(self) -> InputError:
        why = _CUT[self.recording.end["reason"]]
        what = f"no replay can reach its end, because {why}; its first {self.recording.cut:,} records are the same"
        return InputError(what, where=self.name, fix="record a run that ends by itself")

    def _screen(self) -> Screen:
        """Where the verdict goes: to standard error if a file goes to standard output."""
        taken = STDOUT in (self.request.trace, self.request.state)
        return (standard_error if taken else standard_output)(color=self.request.color)


def _inputs(guest: Guest, recording: WholeTrace) -> list[Path]:
    manifest = guest.manifest
    given = [recording.path, manifest.path, manifest.image.file, manifest.image.symbols]
    modules = () if guest.protocol is None else guest.protocol.modules
    return [*modules, *(path for path in given if path is not None)]
