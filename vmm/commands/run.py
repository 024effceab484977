"""``vmm run``: one guest from its start to its end."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from attrs import evolve, frozen

from vmm.coherence import Coherence
from vmm.commands.diagnostics import Diagnostics
from vmm.commands.given import parse_size, parse_time, read_input
from vmm.commands.interrupt import Interruption
from vmm.commands.outputs import STDOUT, OutputFile, Outputs
from vmm.commands.progress import Progress, of_machine
from vmm.commands.screen import Screen, standard_error, standard_output
from vmm.commands.summary import add_row, introduce, summarize
from vmm.commands.views import show_views
from vmm.devices.uart import BACKLOG
from vmm.errors import GuestError, OptionError
from vmm.guest.kallsyms import find_kallsyms, to_text
from vmm.guest.loader import BootOptions, Guest, load_guest
from vmm.machine import Machine, RunOptions
from vmm.outcome import Outcome, Status, judge
from vmm.printed import hear_text
from vmm.recording import record
from vmm.records import End
from vmm.state_file import MemoryRange, encode, state_of
from vmm.trace.console import ConsoleView
from vmm.trace.names import symbols_of
from vmm.trace.sink import TraceSink
from vmm.translation.cache import DEFAULT_CAPACITY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.script_actions import ScriptRun
    from vmm.trace.matcher import Verdict
    from vmm.trace.script import Script

#: Exit statuses of a process that a signal ended, as shells give them.
SIGNALLED: Final = 128


@frozen(slots=True)
class RunRequest:
    """What the command line asks for; the options are those of ``vmm run --help``."""

    target: str
    trace: str | None = None
    expect: str | None = None
    state: str | None = None
    hashes: tuple[str, ...] = ()
    audit: bool = False
    check: bool = False
    no_traps: bool = False
    blocks: bool = False
    #: Put the return addresses on the stack into the records of modifications.
    callers: bool = False
    #: Show where the views of the EPT differ at the end.
    views: bool = False
    quiet: bool = False
    everything: bool = False
    #: Where to write the symbols that a Linux kernel has in its memory at the end.
    kernel_symbols: str | None = None
    #: Show what the guest prints as it comes, instead of records.
    live: bool = False
    verbose: bool = False
    seconds: float | None = None
    seed: int | None = None
    coherence: str | None = None
    capacity: int = DEFAULT_CAPACITY
    input: str | None = None
    time: str | None = None
    wx: Literal["off", "fault", "stop"] | None = None
    tlb: Literal["loose", "strict"] | None = None
    append: str | None = None
    memory: str | None = None
    modules: tuple[str, ...] = ()
    color: str = "auto"

    def boot_options(self) -> BootOptions:
        """The part of it that a kernel without a manifest is booted with."""
        memory = None if self.memory is None else parse_size(self.memory)
        return BootOptions(self.append, memory, tuple(map(Path, self.modules)))

    def options(self) -> RunOptions:
        """The part of it that the machine is interested in."""
        return RunOptions(
            audit=self.audit,
            check=self.check,
            traps=not self.no_traps,
            block_events=self.blocks,
            callers=self.callers,
            capacity=self.capacity,
            seconds=self.seconds,
            input=read_input(self.input),
            time=parse_time(self.time),
            seed=self.seed,
            coherence=None if self.coherence is None else Coherence(self.coherence),
            wx=self.wx,
            tlb=self.tlb,
        )


#: What ``--expect`` takes for the script that belongs to the guest.
OWN_SCRIPT: Final = "own"


def run(request: RunRequest) -> int:
    """Run a guest; the exit status. Raises ``InputError`` and ``EngineError`` for what cannot be run."""
    guest = load_guest(request.target, request.boot_options())
    if request.expect == OWN_SCRIPT:
        request = evolve(request, expect=str(guest.manifest.own_script))
    read = [Path(module) for module in request.modules]
    if request.input is None or not guest.is_pc:
        return run_guest(guest, request, also_read=read)
    if request.input != STDOUT:
        read.append(Path(request.input))
    return run_guest(guest, evolve(request, input=None), prepare=_typing(request.input), also_read=read)


def _typing(name: str) -> Callable[[Machine], None]:
    """Types the whole of an input at a PC's serial port before the run."""
    data = read_input(name) or b""

    def type_it(machine: Machine) -> None:
        if machine.type_in(data) < len(data):
            raise OptionError(f"more than {BACKLOG:#x} bytes", where="--input", fix="give less")

    return type_it


def run_guest(
    guest: Guest,
    request: RunRequest,
    *,
    prepare: Callable[[Machine], None] = lambda _machine: None,
    also_read: Sequence[Path] = (),
) -> int:
    """Run a guest that is loaded already; ``prepare`` gets the machine before it runs, and is done after all else.

    ``also_read`` are files that outputs may not replace, besides those that the guest and the request name.
    """
    log = Diagnostics(wanted=request.verbose)
    log.tell("guest loaded", guest=guest.name, entry=hex(guest.entry), symbols=len(guest.image.symbols))
    memory = guest.manifest.machine.memory
    ranges = [MemoryRange.parse(text, memory=memory) for text in request.hashes]
    script = None if request.expect is None else _load_script(request.expect, guest)
    options = request.options()
    with Interruption() as interruption, Outputs([*_inputs(guest, request), *also_read]) as outputs:
        trace = outputs.add("--trace", request.trace)
        state = outputs.add("--state", request.state)
        symbols = outputs.add("--symbols", request.kernel_symbols)
        machine = Machine(guest, options)
        log.tell("engines verified and made", unicorn=version("unicorn"), memory=memory)
        watched = _Run(request, machine, trace, state, script, log)
        watched.symbols = symbols
        prepare(machine)
        return watched.go(ranges, interruption)


def _load_script(path: str, guest: Guest) -> Script:
    from vmm.trace.script import Script  # noqa: PLC0415 - 40 ms that only a run with a script need pay

    return Script.load(path, symbols=symbols_of(guest))


def _inputs(guest: Guest, request: RunRequest) -> list[Path]:
    """The files that the run reads, which none of its outputs may replace."""
    manifest = guest.manifest
    given = [manifest.path, manifest.image.file, manifest.image.symbols, request.expect]
    if manifest.input is not None:
        given.append(manifest.input.file)
    if request.input != STDOUT:
        given.append(request.input)
    return [Path(path) for path in given if path is not None]


class _Run:
    """A machine with everything that watches it."""

    def __init__(
        self,
        request: RunRequest,
        machine: Machine,
        trace: OutputFile | None,
        state: OutputFile | None,
        script: Script | None,
        log: Diagnostics,
    ) -> None:
        self.request = request
        self.machine = machine
        self.trace = trace
        self.state = state
        self.screen = self._screen()
        self.log = log
        self.view: ConsoleView | None = None
        self.sink: TraceSink | None = None
        self.script: ScriptRun | None = None
        self.symbols: OutputFile | None = None
        if trace is not None:
            self.sink = record(machine, trace, target=request.target)
        if not (request.quiet or request.live):
            self.view = ConsoleView(machine, self.screen.painter, everything=request.everything)
            machine.observe(self.view.record)
        if script is not None:
            from vmm.script_actions import ScriptRun  # noqa: PLC0415 - as above

            self.script = ScriptRun(machine, script)
            hear_text(machine, [self.script.matcher.console])
        if request.live and not request.quiet:
            hear_text(machine, [self._show_live])

    def go(self, ranges: list[MemoryRange], interruption: Interruption) -> int:
        """Run, then write and say what is to be written and said; the exit status."""
        request, machine = self.request, self.machine
        if self.view is not None:
            introduce(machine, self.screen.painter)
        # Nothing to show progress for where every record goes to the same terminal.
        wanted = not (request.quiet or request.live) and not (request.everything and sys.stdout.isatty())
        with Progress(of_machine(machine), wanted=wanted) as progress:
            self.screen.before = progress.hide
            interruption.break_in = machine.break_in
            end = run_to_end(machine)
        interruption.settle()
        self.log.tell("run ended", reason=end.reason, exits=machine.reporter.total)
        self._write_files(end, ranges)
        stale = machine.stale if self.script is None else 0  # a script has the say
        translations = machine.stale_translations if self.script is None else 0
        outcome = judge(machine.guest.manifest, end, stale=stale, translations=translations)
        if outcome.status is Status.INTERRUPTED:
            self.script = None  # a script says nothing about half a run
        status = self._conclude(outcome)
        return SIGNALLED + interruption.received if status == Status.INTERRUPTED else status

    def _screen(self) -> Screen:
        """Where the view goes: to standard error if a file goes to standard output."""
        taken = STDOUT in (self.request.trace, self.request.state)
        return (standard_error if taken else standard_output)(color=self.request.color)

    def _show_live(self, text: str) -> None:
        """What the guest prints, for a terminal as it is, for files with ends of lines as files have them."""
        self.screen.write(text if sys.stdout.isatty() else text.replace("\r", ""))
        self.screen.flush()

    def _write_files(self, end: End, ranges: list[MemoryRange]) -> None:
        if self.sink is not None:
            self.sink.flush()
        if self.state is not None:
            self.state.write(encode(state_of(self.machine, end, ranges)))
        if self.symbols is not None:
            self.symbols.write(to_text(find_kallsyms(self.machine.memory.mapping)).encode())

    def _conclude(self, outcome: Outcome) -> int:
        verdict = None if self.script is None else self.script.finish()
        if self.view is not None:
            self.view.finish()
            self._summarize(outcome, verdict)
        elif self.request.live and not self.request.quiet:
            self.screen.write("\r\n" if sys.stdout.isatty() else "\n")
            self._summarize(outcome, verdict)
        if self.request.views:
            show_views(self.machine, self.screen.painter)
            self.screen.flush()
        self._complain(outcome, verdict)
        if outcome.status is Status.OK and verdict is not None and not verdict.ok:
            return Status.WRONG
        return outcome.status

    def _summarize(self, outcome: Outcome, verdict: Verdict | None) -> None:
        painter = self.screen.painter
        summarize(self.machine, outcome, painter, printed=self.view is not None)
        if verdict is not None:
            words = "holds" if verdict.ok else "does not hold"
            add_row("script", f"{words} ({self.request.expect})", painter, good=verdict.ok)
        if self.trace is not None and self.sink is not None:
            add_row("trace", f"{self.sink.records:,} records in {self.request.trace}", painter)
        if self.state is not None:
            add_row("state", f"in {self.request.state}", painter)
        self.screen.flush()

    def _complain(self, outcome: Outcome, verdict: Verdict | None) -> None:
        screen = standard_error(color=self.request.color)
        if verdict is not None and verdict.divergence is not None:
            screen.write(f"\n{verdict.divergence.render(color=screen.color)}\n")
        if outcome.complaint is not None:
            screen.write(f"vmm: {self.machine.guest.name}: {outcome.complaint}\n")
        screen.flush()


def run_to_end(machine: Machine) -> End:
    """Run; where the VMM has to give up, that is an end of its own, with the reason "error"."""
    try:
        return machine.run()
    except GuestError as error:
        what = "; ".join([str(error), *getattr(error, "__notes__", ())])
        detail = {"error": type(error).__name__, "what": what}
        end = End("error", machine.vcpus[machine.reporter.vcpu or 0].context.rip, detail)
        machine.reporter.emit(end)
        return end
