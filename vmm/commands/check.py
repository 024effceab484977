"""``vmm check``: a finished trace held against a script."""

from __future__ import annotations

from vmm.commands.screen import standard_error, standard_output
from vmm.guest.loader import load_guest
from vmm.outcome import Status
from vmm.trace.check import check_trace
from vmm.trace.names import symbols_of
from vmm.trace.painter import Style
from vmm.trace.script import Script


def check(trace: str, script: str, guest: str | None, *, color: str) -> Status:
    """Say whether the trace shows what the script expects; ``guest`` lends its symbols to the script."""
    symbols = {} if guest is None else symbols_of(load_guest(guest))
    verdict = check_trace(trace, Script.load(script, symbols=symbols))
    if verdict.divergence is None:
        screen = standard_output(color=color)
        screen.painter.line("the script holds", Style.GOOD)
        screen.flush()
        return Status.OK
    complaints = standard_error(color=color)
    complaints.write(verdict.divergence.render(color=complaints.color) + "\n")
    complaints.flush()
    return Status.WRONG
