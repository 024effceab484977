"""``vmm boot``: a Linux kernel from its entry to its end, its serial console on the terminal or fed from a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from attrs import frozen

from vmm.commands.run import RunRequest, run_guest
from vmm.commands.terminal import Terminal, is_interactive
from vmm.commands.typist import Typist
from vmm.errors import InputError, OptionError
from vmm.guest.files import read_file, shown
from vmm.guest.linux import DEFAULT_MEMORY, load_linux

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.machine import Machine

#: Seconds that a kernel may run whose console is not a terminal.
DEFAULT_SECONDS: Final = 600.0
_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_INPUT_LIMIT: Final = 1 << 20


@frozen(slots=True)
class BootRequest:
    """What the command line asks for; the options are those of ``vmm boot --help``."""

    kernel: str
    initrd: str | None = None
    append: str = "console=ttyS0"
    memory: str | None = None
    apic: str = "on"
    input: str | None = None
    prompt: str = "# "
    trace: str | None = None
    expect: str | None = None
    state: str | None = None
    symbols: str | None = None
    hashes: tuple[str, ...] = ()
    audit: bool = False
    check: bool = False
    quiet: bool = False
    verbose: bool = False
    seconds: float | None = None
    color: str = "auto"


def boot(request: BootRequest) -> int:
    """Boot a kernel; the exit status. Raises ``InputError`` and ``EngineError`` for what cannot be run."""
    interactive = request.input is None and not request.quiet and is_interactive()
    guest = load_linux(
        Path(request.kernel),
        initrd=None if request.initrd is None else Path(request.initrd),
        command_line=request.append,
        memory=DEFAULT_MEMORY if request.memory is None else parse_size(request.memory),
        seconds=float("inf") if interactive else DEFAULT_SECONDS,
        apic=request.apic == "on",
    )
    run_request = RunRequest(
        request.kernel,
        trace=request.trace,
        expect=request.expect,
        state=request.state,
        kernel_symbols=request.symbols,
        hashes=request.hashes,
        audit=request.audit,
        check=request.check,
        live=True,
        quiet=request.quiet,
        verbose=request.verbose,
        seconds=request.seconds,
        color=request.color,
    )
    read = [Path(path) for path in (request.initrd, request.input) if path is not None]
    if interactive:
        with Terminal(sys.stdin) as terminal:
            return run_guest(guest, run_request, prepare=terminal.connect, also_read=read)
    return run_guest(guest, run_request, prepare=_typist(request), also_read=read)


def parse_size(text: str) -> int:
    """A size of memory: a number of bytes, or one of K, M or G; raises ``OptionError``."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in _UNITS else (text, "")
    if not (number.isascii() and number.isdigit() and len(number) < 16):
        raise OptionError(f"{shown(text)} is no size", where="--memory", fix="write it like 256M or 1G")
    return int(number) * _UNITS.get(unit, 1)


def _typist(request: BootRequest) -> Callable[[Machine], None]:
    if request.input is None:
        return lambda _machine: None
    fix = "give a text file whose lines are to be typed"
    data = read_file(Path(request.input), _INPUT_LIMIT, error=InputError, fix=fix)
    if not request.prompt:
        raise OptionError("an empty prompt", where="--prompt", fix="give what stands before what is typed, like '# '")
    return Typist(data.splitlines(), request.prompt.encode()).connect
