"""What a run shows: trace lines, the console view, and scripts that say what it must show.

::

    Machine ──records──▶ TraceSink      JSON Lines, "vmm-trace/1"
                     ├─▶ ConsoleView    for people
                     └─▶ Matcher        holds the run against a Script; ScriptError, Verdict, Divergence

The names below are imported when they are first used: scripts take 40 ms that most runs need not pay.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vmm.trace.actions import Actions
    from vmm.trace.check import check_trace
    from vmm.trace.console import ConsoleView
    from vmm.trace.matcher import Matcher, Verdict
    from vmm.trace.report import Divergence
    from vmm.trace.script import Script
    from vmm.trace.sink import TraceSink
    from vmm.trace.wording import as_script

__all__ = [
    "Actions",
    "ConsoleView",
    "Divergence",
    "Matcher",
    "Script",
    "TraceSink",
    "Verdict",
    "as_script",
    "check_trace",
]

_HOMES: Final = {
    "Actions": "actions",
    "ConsoleView": "console",
    "Divergence": "report",
    "Matcher": "matcher",
    "Script": "script",
    "TraceSink": "sink",
    "Verdict": "matcher",
    "as_script": "wording",
    "check_trace": "check",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name means
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
