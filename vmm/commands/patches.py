"""``vmm patches``: what a Linux kernel patched in its own code, from the trace of its boot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attrs import evolve, frozen

from vmm.commands.progress import Progress
from vmm.commands.screen import Screen, standard_output
from vmm.errors import OptionError
from vmm.guest.files import one_line, shown
from vmm.outcome import Status
from vmm.patches.joined import join
from vmm.patches.listing import Listing
from vmm.patches.mechanism import Attributor, Mechanism
from vmm.patches.stores import Stores
from vmm.patches.summary import Summary
from vmm.patches.symbols import KernelSymbols, find_slide, read_kernel_symbols
from vmm.trace.painter import Painter, Style
from vmm.trace.reading import TraceReader

if TYPE_CHECKING:
    from collections.abc import Callable

_LABEL: Final = 10
_WIDEST_SLIDE: Final = 1 << 63


@frozen(slots=True)
class PatchesRequest:
    """What the command line asks for; the options are those of ``vmm patches --help``."""

    trace: str
    symbols: str | None = None
    slide: str | None = None
    every: bool = False
    color: str = "auto"


def patches(request: PatchesRequest) -> Status:
    """Summarise or list the patches of a trace. Raises ``InputError`` for a trace or a file of symbols that is none."""
    screen = standard_output(color=request.color)
    symbols, told = _symbols(request)
    summary = Summary()
    attributor = Attributor(symbols)
    listing = Listing(screen.painter, symbols)
    with TraceReader(request.trace) as reader:
        stores = Stores(reader)
        with Progress(_line_of(stores, reader.name), wanted=True) as progress:
            screen.before = progress.hide
            for patch in join(stores):
                attribution = attributor.of(patch)
                summary.add(patch, attribution)
                if request.every:
                    listing.show(patch, attribution)
    if stores.is_early:
        what = "none: nothing was executed in the upper half of the address space"
        _row("kernel", what, screen.painter, Style.BAD)
    _conclude(request, summary, symbols, told, screen)
    return Status.OK


def _line_of(stores: Stores, name: str) -> Callable[[], str]:
    return lambda: f"{name}: {stores.lines:,} lines so far"


def _symbols(request: PatchesRequest) -> tuple[KernelSymbols | None, str]:
    """The symbols where the kernel was, and in words how that is known."""
    slide = None if request.slide is None else _parse_slide(request.slide)
    if request.symbols is None:
        if slide is not None:
            raise OptionError("nothing to move", where="--slide", fix="give --symbols as well")
        return None, ""
    symbols = read_kernel_symbols(request.symbols)
    if slide is not None:
        return evolve(symbols, slide=slide), f"moved by {slide:#x}, as given"
    with TraceReader(request.trace) as reader:
        line = f"{reader.name}: looking for where the kernel was"
        with Progress(lambda: line, wanted=True):
            found = find_slide(symbols, reader)
    if found is None:
        return symbols, "as they are: the trace does not tell whether the kernel was moved"
    return evolve(symbols, slide=found), f"moved by {found:#x}" if found else "as they are"


def _parse_slide(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = _WIDEST_SLIDE
    if abs(value) >= _WIDEST_SLIDE:
        raise OptionError(f"{shown(text)} is no slide", where="--slide", fix="give a number of bytes, like 0x1ce00000")
    return value


def _conclude(
    request: PatchesRequest, summary: Summary, symbols: KernelSymbols | None, told: str, screen: Screen
) -> None:
    painter, total = screen.painter, summary.total
    if request.every:
        painter.line()
    counts = f"{_counted(total.modifications, 'modification')} in {_counted(total.patches, 'patch')}"
    _row("trace", f"{one_line(request.trace)}: {counts}", painter)
    if symbols is None:
        _row("symbols", "none, so that functions are not known; give --symbols", painter, Style.BAD)
    else:
        _row("symbols", f"{symbols.name}: {len(symbols):,}, {told}", painter)
    if not request.every and total.patches:
        painter.line()
        summary.show(painter, functions=symbols is not None)
        painter.line()
        _remarks(summary, painter)
    screen.flush()


def _remarks(summary: Summary, painter: Painter) -> None:
    windows = summary.mechanisms.get(Mechanism.WINDOW)
    if windows is not None:
        counts = f"{_counted(windows.modifications, 'modification')}, {_counted(windows.size, 'byte')}"
        what = f"{counts}: no instruction is known"
        _row("windows", f"{what}; boot with --attribute to have it", painter, Style.BAD)
    poked = summary.behind_int3
    if poked.patches:
        _row("INT3", f"{_counted(poked.patches, 'patch')} made behind a breakpoint", painter)
    if summary.same.patches:
        _row("the same", f"{_counted(summary.same.patches, 'patch')} of bytes by the same bytes", painter)


def _counted(count: int, word: str) -> str:
    plural = "es" if word.endswith("ch") else "s"
    return f"{count:,} {word}{'' if count == 1 else plural}"


def _row(label: str, text: str, painter: Painter, style: Style = Style.PLAIN) -> None:
    painter.line(f"{label:<{_LABEL}}{text}", style)
