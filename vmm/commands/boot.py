"""``vmm boot``: a kernel from its entry to its end, its serial console on the terminal or fed from a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from attrs import evolve, frozen

from vmm.commands.given import parse_size
from vmm.commands.run import RunRequest, run_guest
from vmm.commands.terminal import Terminal, is_interactive
from vmm.commands.typist import Typist
from vmm.errors import ImageError, InputError, OptionError
from vmm.guest.files import read_file, read_head
from vmm.guest.linux import ADAPTIVE, DEFAULT_MEMORY, is_bz_image, load_linux
from vmm.guest.multiboot import load_multiboot
from vmm.guest.multiboot_image import SEARCHED, find_header

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.guest.loader import Guest
    from vmm.machine import Machine

#: The command line that Linux gets unless told otherwise.
LINUX_CONSOLE: Final = "console=ttyS0"
#: Seconds that a kernel may run whose console is not a terminal.
DEFAULT_SECONDS: Final = 600.0
_INPUT_LIMIT: Final = 1 << 20


@frozen(slots=True)
class BootRequest:
    """What the command line asks for; the options are those of ``vmm boot --help``."""

    kernel: str
    initrd: str | None = None
    append: str | None = None
    memory: str | None = None
    apic: str = "on"
    input: str | None = None
    prompt: str = "# "
    trace: str | None = None
    expect: str | None = None
    state: str | None = None
    symbols: str | None = None
    attribute: bool = False
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
    guest = _load(request, seconds=float("inf") if interactive else DEFAULT_SECONDS)
    run_request = RunRequest(
        request.kernel,
        trace=request.trace,
        expect=request.expect,
        state=request.state,
        callers=request.trace is not None,
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


def _load(request: BootRequest, *, seconds: float) -> Guest:
    """The kernel as Linux, or as Multiboot says if that is the only header that it has."""
    kernel, initrd = Path(request.kernel), None if request.initrd is None else Path(request.initrd)
    memory = DEFAULT_MEMORY if request.memory is None else parse_size(request.memory)
    policy = evolve(ADAPTIVE, writes="attribute") if request.attribute else ADAPTIVE
    head = read_head(kernel, SEARCHED, error=ImageError, fix="give the path of a kernel")
    if is_bz_image(head) or find_header(head) is None:
        append = LINUX_CONSOLE if request.append is None else request.append
        return load_linux(
            kernel,
            initrd=initrd,
            command_line=append,
            memory=memory,
            policy=policy,
            seconds=seconds,
            apic=request.apic == "on",
        )
    modules = () if initrd is None else (initrd,)
    append = request.append or ""
    return load_multiboot(
        kernel,
        modules=modules,
        command_line=append,
        memory=memory,
        policy=policy,
        seconds=seconds,
        apic=request.apic == "on",
    )


def _typist(request: BootRequest) -> Callable[[Machine], None]:
    if request.input is None:
        return lambda _machine: None
    fix = "give a text file whose lines are to be typed"
    data = read_file(Path(request.input), _INPUT_LIMIT, error=InputError, fix=fix)
    if not request.prompt:
        raise OptionError("an empty prompt", where="--prompt", fix="give what stands before what is typed, like '# '")
    return Typist(data.splitlines(), request.prompt.encode()).connect
