"""The command line: ``vmm guests``, ``run``, ``boot``, ``patches``, ``check``, ``replay`` and the other commands.

Exit statuses: 0 the guest ended as its manifest says and the script holds; 1 it did not; 2 bad input; 3 the guest
died (triple fault, a budget used up, memory that does not exist); 130 Ctrl-C. Bad input gets one line on standard
error, ``vmm: where: what; what to do``.
"""

from __future__ import annotations

import contextlib
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from vmm.errors import EngineError, GuestError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_WRONG: Final = 1
_BAD_INPUT: Final = 2
_INTERRUPTED: Final = 130


class Cli(click.Group):
    """A group of commands that ends with the project's exit statuses and one-line messages."""

    def main(  # type: ignore[override] # always in click's own "standalone" way
        self, args: Sequence[str] | None = None, prog_name: str | None = "vmm", **extra: Any  # noqa: ANN401
    ) -> NoReturn:
        """Run the command line and exit."""
        extra["standalone_mode"] = False
        sys.exit(_guarded(lambda: super(Cli, self).main(args, prog_name, **extra)))


def _guarded(command: Callable[[], Any]) -> int:
    try:
        result = command()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "vmm"
        message = _flat(error.format_message()).rstrip(".")
        return _complain(f"vmm: {message}; see `{path} --help`", _BAD_INPUT)
    except (InputError, EngineError) as error:
        return _complain(f"vmm: {_flat(str(error))}", _BAD_INPUT)
    except GuestError as error:
        return _complain(f"vmm: {error}", _WRONG)
    except (KeyboardInterrupt, click.Abort):
        return _INTERRUPTED
    return result if isinstance(result, int) else 0


def _complain(text: str, status: int) -> int:
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    return status


def _flat(text: str) -> str:
    """One line that cannot drive a terminal, whatever the user's files hold."""
    from vmm.guest.files import one_line  # noqa: PLC0415 - only once something is wrong

    return one_line(" ".join(text.split("\n")))


def _show_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:  # noqa: FBT001
    if wanted:
        try:
            click.echo(f"vmm {version('vmm')}")
        except PackageNotFoundError:
            click.echo("vmm, not installed: run from its source")
        context.exit()


_color = click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Colours; auto means on a terminal, unless NO_COLOR is set.",
)


@click.group("vmm", cls=Cli, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version)
@click.pass_context
def main(context: click.Context) -> None:
    """Run x86 guests under a hypervisor that catches every write to code before it happens."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(_BAD_INPUT)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON list of objects with name, summary and path.")
def guests(*, as_json: bool) -> None:
    """List the guests that come with the VMM."""
    from vmm.commands.guests import list_guests  # noqa: PLC0415 - a command imports what it needs

    list_guests(as_json=as_json)


@main.command()
@click.argument("target")
@click.option("--trace", metavar="FILE", help="Write every exit and modification as a line of JSON; - is stdout.")
@click.option(
    "--expect",
    metavar="FILE",
    help="Hold the run against a script, and do its actions; `own` is the one that comes with the guest.",
)
@click.option("--state", metavar="FILE", help="Write the final state as JSON; - is standard output.")
@click.option(
    "--hash",
    "hashes",
    metavar="GPA:LENGTH",
    multiple=True,
    help="Put the SHA-256 of this memory into the state. May be repeated.",
)
@click.option("--audit", is_flag=True, help="Check the bytes of each block whenever it is entered (slow).")
@click.option("--check", is_flag=True, help="Check the rules of the trap after every transition.")
@click.option("--no-traps", is_flag=True, help="Trap nothing and execute one instruction at a time: an oracle (slow).")
@click.option("--blocks", is_flag=True, help="Record every translated block that is made or dropped.")
@click.option("--wx", type=click.Choice(["off", "fault", "stop"]), help="W^X policy instead of the manifest's.")
@click.option("--tlb", type=click.Choice(["loose", "strict"]), help="TLB policy instead of the manifest's.")
@click.option("--seconds", type=float, metavar="S", help="Time limit instead of the manifest's.")
@click.option("--capacity", type=int, metavar="N", help="How many translated blocks are kept.")
@click.option(
    "--input", metavar="FILE", help="What the guest reads at its input port, or serial port; - is standard input."
)
@click.option("--time", metavar="SECONDS", help="What the guest's clock shows, in seconds since 1970.")
@click.option("--seed", type=click.IntRange(0, (1 << 64) - 1), metavar="N", help="Another interleaving of the vCPUs.")
@click.option(
    "--coherence",
    type=click.Choice(["coherent", "serialised", "explicit"]),
    help="How late changed code may be seen, instead of the manifest's policy; stale execution is reported.",
)
@click.option("--append", metavar="TEXT", help="Put this onto a Multiboot kernel's command line, behind its name.")
@click.option("--memory", metavar="SIZE", help="RAM of a Multiboot kernel, like 64M (which it is by default).")
@click.option("--module", "modules", metavar="FILE", multiple=True, help="Load a Multiboot module. May be repeated.")
@click.option("--views", is_flag=True, help="Show where the views of the EPT differ at the end.")
@click.option("--all", "everything", is_flag=True, help="Show every record: fold no loops, cut nothing off.")
@click.option("-q", "--quiet", is_flag=True, help="Show nothing but what is wrong.")
@click.option("-v", "--verbose", is_flag=True, help="Tell on standard error what the VMM itself does.")
@_color
def run(target: str, **options: Any) -> int:  # noqa: ANN401 - click's values
    """Run TARGET, and show what happened.

    TARGET is a name that `vmm guests` lists, a guest.toml, a folder with one, a Multiboot image, or an ELF64 image.
    --append, --memory and --module are for Multiboot images.

    Exit status: 0 the guest ended as its manifest says and the script holds; 1 it did not; 2 bad input;
    3 the guest died (triple fault, a budget used up, memory that does not exist); 130 Ctrl-C.
    """
    _check_ranges(options)
    from vmm.commands.run import RunRequest, run  # noqa: PLC0415 - a command imports what it needs

    return run(RunRequest(target, **{name: value for name, value in options.items() if value is not None}))


@main.command()
@click.option("--kernel", metavar="FILE", required=True, help="A bzImage, a vmlinux, or a Multiboot image.")
@click.option("--initrd", metavar="FILE", help="The initial RAM disk; the only module of a Multiboot image.")
@click.option("--append", metavar="TEXT", help="The kernel's command line; for Linux console=ttyS0 by default.")
@click.option("--memory", metavar="SIZE", help="RAM, like 256M (which it is by default).")
@click.option(
    "--apic",
    type=click.Choice(("on", "off")),
    default="on",
    show_default=True,
    help="Whether there are a local APIC, an I/O APIC and ACPI, or only a pair of 8259As.",
)
@click.option("--input", metavar="FILE", help="Type the lines of FILE, each at a prompt; the run ends at one more.")
@click.option("--prompt", metavar="TEXT", default="# ", show_default=True, help="What a prompt ends with.")
@click.option("--trace", metavar="FILE", help="Write every exit and modification as a line of JSON; - is stdout.")
@click.option("--expect", metavar="FILE", help="Hold the run against a script, and do its actions.")
@click.option("--state", metavar="FILE", help="Write the final state as JSON; - is standard output.")
@click.option(
    "--hash",
    "hashes",
    metavar="GPA:LENGTH",
    multiple=True,
    help="Put the SHA-256 of this memory into the state. May be repeated.",
)
@click.option("--symbols", metavar="FILE", help="Write the kernel's own symbols, found in its memory, as nm does.")
@click.option("--attribute", is_flag=True, help="Record the instruction of every patch, however many (slower).")
@click.option("--audit", is_flag=True, help="Check the bytes of each block whenever it is entered (slow).")
@click.option("--check", is_flag=True, help="Check the rules of the trap after every transition.")
@click.option("--seconds", type=float, metavar="S", help="Time limit; 600 by default, none at a terminal.")
@click.option("-q", "--quiet", is_flag=True, help="Show nothing but what is wrong.")
@click.option("-v", "--verbose", is_flag=True, help="Tell on standard error what the VMM itself does.")
@_color
def boot(**options: Any) -> int:  # noqa: ANN401 - click's values
    """Boot a Linux or Multiboot kernel on a PC whose code is execute-only, with its serial console here.

    At a terminal it is interactive: Ctrl-A x ends the run. Otherwise, and with --input, the same kernel and input give
    the same run, to the byte.

    Exit status: 0 the guest halted, reset the machine or came to the end of the input, and the script holds; 1 it did
    not; 2 bad input; 3 the guest died (triple fault, time used up, memory that does not exist); 130 Ctrl-C.
    """
    _check_ranges(options)
    from vmm.commands.boot import BootRequest, boot  # noqa: PLC0415 - a command imports what it needs

    return boot(BootRequest(**{name: value for name, value in options.items() if value is not None}))


@main.command()
@click.argument("trace")
@click.option("--expect", metavar="SCRIPT", required=True, help="The script.")
@click.option("--guest", metavar="TARGET", help="The guest whose symbols the script uses.")
@_color
def check(trace: str, *, expect: str, guest: str | None, color: str) -> int:
    """Hold TRACE, which `vmm run --trace` wrote, against a script. The script's actions are not done."""
    from vmm.commands.check import check as check_file  # noqa: PLC0415 - a command imports what it needs

    return check_file(trace, expect, guest, color=color)


@main.command()
@click.argument("trace")
@click.option("--symbols", metavar="FILE", help="What `vmm boot --symbols` has written, or the kernel's System.map.")
@click.option("--slide", metavar="N", help="By how much the kernel was moved, where the trace does not tell.")
@click.option("--list", "every", is_flag=True, help="Show each patch with its instructions before and after.")
@_color
def patches(trace: str, *, symbols: str | None, slide: str | None, every: bool, color: str) -> int:
    """Say what a Linux kernel patched in TRACE, which `vmm boot --trace` wrote: by mechanism, function and mapping."""
    from vmm.commands.patches import PatchesRequest, patches  # noqa: PLC0415 - a command imports what it needs

    return patches(PatchesRequest(trace, symbols=symbols, slide=slide, every=every, color=color))


@main.group()
def ept() -> None:
    """Explain EPT entries, exit qualifications and walks, field by field."""


_profile = click.option(
    "--profile",
    metavar="NAME",
    help="The processor, instead of the guest's or the default one: default, accessed-dirty, mode-based-execute, "
    "page-modification-log, sub-page-write, advanced, minimal, or IA32_VMX_EPT_VPID_CAP.",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="A JSON object (docs/formats.md).")


@ept.command()
@click.option("--qualification", metavar="N", help="The exit qualification of an EPT violation.")
@click.option("--entry", metavar="N", help="An EPT entry, 64 bits.")
@click.option("--level", type=click.IntRange(1, 4), help="Which entry: 4 PML4E, 3 PDPTE, 2 PDE, 1 PTE.")
@_profile
@_as_json
def explain(
    qualification: str | None, entry: str | None, level: int | None, profile: str | None, *, as_json: bool
) -> None:
    """Put an exit qualification or an EPT entry into words."""
    from vmm.commands.ept import explain as explain_it  # noqa: PLC0415 - a command imports what it needs

    explain_it(qualification, entry, level, profile or "default", as_json=as_json)


@ept.command()
@click.argument("target")
@click.argument("gpa")
@click.option(
    "--access", type=click.Choice(["read", "write", "fetch"]), default="read", show_default=True, help="For what."
)
@_profile
@_as_json
def walk(target: str, gpa: str, access: str, profile: str | None, *, as_json: bool) -> None:
    """Show each EPT entry that translates GPA in TARGET as it starts, and the rule that decides."""
    from vmm.commands.ept import walk as walk_it  # noqa: PLC0415 - a command imports what it needs

    walk_it(target, gpa, access, profile, as_json=as_json)
@main.command()
@click.argument("trace")
@click.option("--guest", metavar="TARGET", help="The guest, if it is not where it was when the trace was made.")
@click.option(
    "--module",
    "modules",
    metavar="FILE",
    multiple=True,
    help="The same for what was loaded besides its image, an initrd. Once for each, in order.",
)
@click.option("--trace", "new_trace", metavar="FILE", help="Write the trace of the replay; - is standard output.")
@click.option("--state", metavar="FILE", help="Write the final state as JSON; - is standard output.")
@click.option("--seconds", type=float, metavar="S", help="Time limit instead of the manifest's.")
@_color
def replay(trace: str, *, new_trace: str | None, **options: Any) -> int:  # noqa: ANN401 - click's values
    """Run again what TRACE, which `vmm run --trace` or `vmm boot --trace` wrote, is the trace of, and compare.

    The guest is given the inputs that are recorded in the trace, and nothing else from outside.

    Exit status: 0 the new trace is byte-identical; 1 it is not; 2 TRACE is no trace, not whole, of another
    image, or of a run that was cut off; 130 Ctrl-C.
    """
    _check_ranges(options)
    from vmm.commands.replay import ReplayRequest, replay  # noqa: PLC0415 - a command imports what it needs

    return replay(ReplayRequest(trace, trace=new_trace, **options))


@main.command()
@click.argument("traces", metavar="TRACE TRACE...", nargs=-1)
@_color
def agree(traces: tuple[str, ...], *, color: str) -> int:
    """Compare the traces of nodes that should have had the same run, and name those that went another way.

    Exit status: 0 all agree; 1 they do not; 2 one of them is no trace, or not whole.
    """
    if len(traces) < 2:
        raise click.UsageError("it takes two traces or more to agree")
    from vmm.commands.agree import agree  # noqa: PLC0415 - a command imports what it needs

    return agree(traces, color=color)


@main.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--json", "as_json", is_flag=True, help="Write the findings as one JSON document.")
@_color
def audit(images: tuple[str, ...], *, as_json: bool, color: str) -> int:
    """Say whether code in each IMAGE could change itself, without running it.

    IMAGE is an ELF executable or shared object of any machine, or the name of a bundled guest.

    Exit status: 0 no findings but notes; 1 findings; 2 bad input.
    """
    from vmm.commands.audit import audit as audit_images  # noqa: PLC0415 - a command imports what it needs

    return audit_images(images, as_json=as_json, color=color)


def _check_ranges(options: dict[str, Any]) -> None:
    seconds, capacity = options["seconds"], options.get("capacity")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise click.BadOptionUsage("seconds", f"--seconds {seconds:g} is no time limit; give a positive number")
    if capacity is not None and capacity < 1:
        raise click.BadOptionUsage("capacity", f"--capacity {capacity} keeps no block; give 1 or more")
