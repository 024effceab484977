"""What reaches a machine from outside: all of a run that does not follow from the image and the manifest.

There are two sorts. The guest *reads* a device whose answer comes from the host (``PortRead``); everything else is
something that the host *does* to the machine: an action of a script, a call of ``Machine``'s methods, the decision of
a handler. Both pass through ``Inputs``, which tells a listener (the trace sink) of each before it takes effect.
``vmm.replay`` has a machine take the same inputs from a trace again.

The rooms inside: ``kind`` is what all inputs have, ``processor``, ``memory`` and ``views`` are the kinds, by what they
are done to, ``moment`` is when, ``trace_lines`` reads them from a trace, ``gate`` is the place that all of them pass.

A new kind of input is one class in a room of kinds: its fields are those of its trace line, ``apply`` does it again.
"""

from vmm.inputs.gate import Inputs, Listener, PortSource
from vmm.inputs.kind import Input
from vmm.inputs.memory import (
    Alias,
    Approve,
    DrainLog,
    Hide,
    Invept,
    Invvpid,
    JournalWindows,
    Protect,
    ProtectSubPages,
    Reveal,
    Seal,
    Write,
)
from vmm.inputs.moment import Moment, Place
from vmm.inputs.processor import (
    Answer,
    Decision,
    Inject,
    Interrupt,
    MonitorTrap,
    PortRead,
    Serial,
    SetRegisters,
    Stop,
)
from vmm.inputs.trace_lines import KINDS, parse
from vmm.inputs.views import AddView, EptpList, Remap, Restrict, SwitchView, VeArea

__all__ = [
    "KINDS",
    "AddView",
    "Alias",
    "Answer",
    "Approve",
    "Decision",
    "DrainLog",
    "EptpList",
    "Hide",
    "Inject",
    "Input",
    "Inputs",
    "Interrupt",
    "Invept",
    "Invvpid",
    "JournalWindows",
    "Listener",
    "Moment",
    "MonitorTrap",
    "Place",
    "PortRead",
    "PortSource",
    "Protect",
    "ProtectSubPages",
    "Remap",
    "Restrict",
    "Reveal",
    "Seal",
    "Serial",
    "SetRegisters",
    "Stop",
    "SwitchView",
    "VeArea",
    "Write",
    "parse",
]
