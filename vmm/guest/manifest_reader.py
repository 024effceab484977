"""Reading a ``guest.toml``: every key checked, each error one line that says where and what to do."""

from __future__ import annotations

import sys
import tomllib
from typing import TYPE_CHECKING, Any, Final

from vmm.devices.workpiece import PORTS
from vmm.errors import ManifestError
from vmm.guest.ept import MANIFEST_KEYS as _EPT_KEYS
from vmm.guest.ept import ept_of, maps_of
from vmm.guest.fields import PAGE, U16_MAX, U32_MAX, U64_MAX, Table, is_canonical
from vmm.guest.files import one_line, read_file
from vmm.guest.hidden import hidden_of
from vmm.guest.inputs import clock_of, input_of
from vmm.guest.views import KEYS as _VIEWS_KEYS
from vmm.guest.views import views_of

if TYPE_CHECKING:
    from pathlib import Path
from vmm.guest.manifest import (
    ACCESSES,
    FORMATS,
    MANIFEST_LIMIT,
    MANIFEST_NAME,
    MEMORY_LIMIT,
    MODES,
    MXCSR_VALID,
    QUANTUM_LIMIT,
    REGISTERS,
    RESERVED_LONG,
    RESERVED_PROTECTED,
    RFLAGS_VALID,
    SCHEMA,
    VCPUS_LIMIT,
    Console,
    CpuSpec,
    End,
    Image,
    Ipi,
    Limits,
    MachineSpec,
    Manifest,
    Mapping,
    Paging,
    Policy,
    Schedule,
    WorkpieceSpec,
    has_page_tables,
)

_MAPS_LIMIT: Final = 1024
_MAPPED_LIMIT: Final = 4 << 30
_NAME_LENGTH: Final = 100
_POLICY_KEYS: Final = ("reads", "writes", "code", "coherence", "wx", "tlb")
_FLAWS_LIMIT: Final = 1024
_KEYS: Final = (
    *("schema", "name", "summary", "wrong_of"),
    *("image", "machine", "cpu", "vcpu", "schedule", "paging", "policy", "ept", "views", "end", "limits"),
    *("console", "input", "clock", "ipi", "workpiece", "hidden"),
)


def read_manifest(path: Path) -> Manifest:
    """The manifest in the file ``path``; raises ManifestError. The image's file is not looked at."""
    data = read_file(path, MANIFEST_LIMIT, error=ManifestError, fix=f"give the path of a {MANIFEST_NAME}")
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        what = f"not UTF-8 at byte {problem.start}"
        raise ManifestError(what, where=one_line(path), fix="save the file as UTF-8 text") from None
    return parse_manifest(text, path)


def parse_manifest(text: str, path: Path) -> Manifest:
    """The manifest in ``text``, its file names relative to the folder of ``path``; raises ManifestError."""
    origin = one_line(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise ManifestError(one_line(problem), where=origin, fix="correct the TOML syntax there") from None
    except ValueError:
        # int() refuses more decimal digits than sys.get_int_max_str_digits() as a plain ValueError.
        digits = sys.get_int_max_str_digits()
        what = f"holds a date that does not exist or a number of more than {digits} digits"
        raise ManifestError(what, where=origin, fix="remove it") from None
    except RecursionError:
        raise ManifestError("nested too deeply", where=origin, fix="use plain tables") from None
    # The schema first: another version has other keys.
    Table(values, "", origin, values).choice("schema", (SCHEMA,))
    return _manifest(Table(values, "", origin, _KEYS), path)


def _manifest(top: Table, path: Path) -> Manifest:
    machine = _machine(top.table("machine", ("memory", "mode")))
    image = _image(top.table("image", ("format", "file", "load", "symbols")), machine, path.parent)
    cpu = _cpu(top.table("cpu", _CPU_KEYS, _CPU_HINTS), machine, image)
    end = _end(top.table("end", ("port", "value", "halt")))
    paging = _paging(top, machine, cpu)
    others = _others(top, machine, cpu)
    console = _console(top.table("console", ("port",)), end)
    ept = top.table("ept", _EPT_KEYS)
    profile = ept_of(ept)
    ipi = _ipi(top.table("ipi", ("port",)), end, console)
    workpiece = _workpiece(top, (end.port, console.port)) if "workpiece" in top else None
    taken = _taken(end, console, ipi, workpiece)
    policy = _policy(top.table("policy", _POLICY_KEYS), machine, image, paging)
    return Manifest(
        path=path,
        name=top.string("name", longest=_NAME_LENGTH),
        summary=top.string("summary", longest=200, default=""),
        image=image,
        machine=machine,
        cpu=cpu,
        paging=paging,
        policy=policy,
        ept=profile,
        ept_maps=maps_of(ept, profile, machine.memory),
        views=views_of(top.table("views", _VIEWS_KEYS), machine.memory, 1 + len(others), profile),
        console=console,
        input=input_of(top, path.parent, taken),
        clock=clock_of(top, taken),
        end=end,
        limits=_limits(top.table("limits", ("exits", "seconds"))),
        others=others,
        schedule=_schedule(top.table("schedule", ("seed", "quantum"))),
        ipi=ipi,
        workpiece=workpiece,
        wrong_of=_wrong_of(top),
        hidden=hidden_of(top, mode=machine.mode, coherence=policy.coherence),
    )


def _taken(end: End, console: Console, ipi: Ipi, workpiece: WorkpieceSpec | None) -> dict[int, str]:
    """The ports that these devices have, and the key of each."""
    named = {"[console].port": console.port, "[end].port": end.port, "[ipi].port": ipi.port}
    taken = {port: name for name, port in named.items() if port is not None}
    if workpiece is not None:
        taken |= dict.fromkeys(range(workpiece.port, workpiece.port + PORTS), "[workpiece]'s")
    return taken


def _wrong_of(top: Table) -> str:
    name = top.string("wrong_of", longest=_NAME_LENGTH, default="")
    if "/" in name or "\\" in name or name in (".", ".."):
        raise top.error("wrong_of", f"{name!a} is no folder's name", "give the name of the right guest's folder")
    return name


def _machine(table: Table) -> MachineSpec:
    return MachineSpec(
        memory=table.integer("memory", PAGE, MEMORY_LIMIT, multiple=PAGE),
        mode=table.choice("mode", MODES),
    )


def _image(table: Table, machine: MachineSpec, folder: Path) -> Image:
    form = table.choice("format", FORMATS)
    file = folder / table.string("file", longest=1000)
    if form == "flat":
        symbols = folder / table.string("symbols", longest=1000) if "symbols" in table else None
        return Image(form, file, table.integer("load", 0, machine.memory - 1), symbols)
    for key in ("load", "symbols"):
        if key in table:
            raise table.error(key, "only flat images have it, ELF images carry their own", "remove it")
    return Image(form, file)


def _workpiece(top: Table, taken: tuple[int | None, ...]) -> WorkpieceSpec:
    table = top.table("workpiece", ("port", "vector", "lead", "flaws"))
    spec = WorkpieceSpec(
        port=table.integer("port", 0, U16_MAX + 1 - PORTS),
        vector=table.integer("vector", 32, 0xFF),
        lead=table.integer("lead", 0, U16_MAX, default=1),
        flaws=table.pairs("flaws", U16_MAX, _FLAWS_LIMIT),
    )
    if any(port is not None and spec.port <= port < spec.port + PORTS for port in taken):
        raise table.error("port", f"{spec.port:#x} and the {PORTS - 1} after it overlap another device", "move it")
    return spec


_CPU_KEYS: Final = ("entry", "cpl", "iopl", "registers", "idt", "rsp0")
_CPU_HINTS: Final = {
    "cr3": "give it as registers = { cr3 = … }",
    "rip": "give it as entry",
    "rsp": "give it as registers = { rsp = … }",
    "rflags": "give it as registers = { rflags = … }",
}


def _others(top: Table, machine: MachineSpec, first: CpuSpec) -> tuple[CpuSpec, ...]:
    """The vCPUs besides the first one. They share its address space and, if a ring 1 or 2 is used, its ring."""
    tables = top.tables("vcpu", "[vcpu]", _CPU_KEYS, VCPUS_LIMIT - 1)
    cpus = []
    for table in tables:
        cpu = _cpu(table, machine, None)
        if "cr3" in cpu.registers and cpu.registers["cr3"] != first.registers.get("cr3"):
            raise table.error("registers", "its cr3 is not that of [cpu]", "start in the same address space")
        if cpu.cpl != first.cpl and {1, 2} & {cpu.cpl, first.cpl}:
            raise table.error("cpl", f"{cpu.cpl} does not go with cpl = {first.cpl} of [cpu]", "give the same cpl")
        cpus.append(cpu)
    return tuple(cpus)


def _schedule(table: Table) -> Schedule:
    default = Schedule()
    return Schedule(
        seed=table.integer("seed", 0, U64_MAX, default=default.seed),
        quantum=table.integer("quantum", 1, QUANTUM_LIMIT, default=default.quantum),
    )


def _ipi(table: Table, end: End, console: Console) -> Ipi:
    port = table.maybe_integer("port", 0, U16_MAX)
    if port is not None and port in (end.port, console.port):
        raise table.error("port", f"{port:#x} is the port of another device", "give it another number")
    return Ipi(port)


def _cpu(table: Table, machine: MachineSpec, image: Image | None) -> CpuSpec:
    cpu = CpuSpec(
        entry=_entry(table, machine, image),
        cpl=table.integer("cpl", 0, 0 if machine.mode == "real" else 3, default=0),
        iopl=table.maybe_integer("iopl", 0, 3),
        registers=_registers(table.table("registers", REGISTERS, {"rip": "give it as [cpu].entry"}), machine),
        idt=table.maybe_integer("idt", 0, _last_linear(machine)),
        rsp0=table.integer("rsp0", 0, _last_linear(machine), default=0),
    )
    if machine.mode == "real" and cpu.rsp0:
        raise table.error("rsp0", "real mode has no TSS", "remove it")
    if machine.mode == "long":
        for key, value in (("entry", cpu.entry), ("idt", cpu.idt), ("rsp0", cpu.rsp0)):
            if isinstance(value, int) and not is_canonical(value):
                raise table.error(key, f"{value:#x} is not canonical", "make bits 63 to 47 all equal")
    return cpu


def _entry(table: Table, machine: MachineSpec, image: Image | None) -> int | str | None:
    if "entry" not in table and image is not None and image.format == "elf64":
        return None
    if table.is_string("entry"):
        return table.string("entry", longest=256)
    # A real-mode entry must be within reach of CS:IP.
    return table.integer("entry", 0, 0xF_FFFF if machine.mode == "real" else _last_linear(machine))


def _registers(table: Table, machine: MachineSpec) -> dict[str, int]:
    return {name: _register(table, name, machine) for name in REGISTERS if name in table}


def _register(table: Table, name: str, machine: MachineSpec) -> int:
    long = machine.mode == "long"
    if name in ("rflags", "mxcsr"):
        value = table.integer(name, 0, U64_MAX)
        reserved = value & ~(RFLAGS_VALID if name == "rflags" else MXCSR_VALID)
        if reserved:
            raise table.error(name, f"bits {reserved:#x} cannot be set at start", "clear them")
        return value
    if name == "fcw":
        return table.integer(name, 0, U16_MAX)
    if name.startswith("xmm"):
        return table.integer(name, 0, (1 << 128) - 1)
    if name == "cr3":
        return _cr3(table, machine)
    value = table.integer(name, 0, U64_MAX if long else U32_MAX)
    if not long and name[1:].isdecimal():
        raise table.error(name, "exists in 64-bit code only", 'remove it, or set mode = "long"')
    if name.endswith("_base"):
        _check_base(table, name, value, machine)
    return value


def _check_base(table: Table, name: str, value: int, machine: MachineSpec) -> None:
    if machine.mode == "long" and not is_canonical(value):
        raise table.error(name, f"{value:#x} is not canonical", "make bits 63 to 47 all equal")
    if machine.mode == "real" and (value % 16 or value > 0xF_FFF0):
        raise table.error(name, f"{value:#x} is no real-mode base", "give a multiple of 16 up to 0xffff0")


def _cr3(table: Table, machine: MachineSpec) -> int:
    if machine.mode != "long":
        fix = "start without it and let the guest turn paging on"
        raise table.error("cr3", "only a long-mode guest starts with page tables of its own", fix)
    value = table.integer("cr3", 0, machine.memory - 1)
    if value & 0xFE7:  # all but PWT and PCD of the low bits are reserved (SDM vol. 3, table 4-12)
        raise table.error("cr3", f"{value:#x} has reserved bits set", "give a page-aligned address in RAM")
    return value


def _paging(top: Table, machine: MachineSpec, cpu: CpuSpec) -> Paging | None:
    long = machine.mode == "long"
    if "paging" not in top:
        return Paging("rwx") if long and "cr3" not in cpu.registers else None
    table = top.table("paging", ("identity", "map"))
    if machine.mode == "real":
        raise top.error("[paging]", "real mode has no paging", "remove it")
    if "cr3" in cpu.registers:
        what = "registers.cr3 says that the guest has its own page tables"
        raise top.error("[paging]", what, "remove one of the two")
    identity = table.choice("identity", ACCESSES) if "identity" in table else None
    entries = table.tables("map", "[paging.map]", ("gva", "gpa", "length", "access", "user"), _MAPS_LIMIT)
    mapped = 0 if identity is None else machine.memory
    maps = []
    for entry in entries:
        maps.append(_mapping(entry, machine))
        mapped += maps[-1].length
        if mapped > _MAPPED_LIMIT:
            what = f"more than {_MAPPED_LIMIT:#x} bytes are mapped altogether"
            raise entry.error("length", what, "map less memory")
    return Paging(identity, tuple(maps))


def _mapping(table: Table, machine: MachineSpec) -> Mapping:
    gva = table.integer("gva", 0, _last_linear(machine), multiple=PAGE)
    gpa = table.integer("gpa", 0, machine.memory - PAGE, multiple=PAGE)
    length = table.integer("length", PAGE, machine.memory, multiple=PAGE)
    if gpa + length > machine.memory:
        what = f"{gpa:#x}+{length:#x} lies out of RAM, which ends at {machine.memory:#x}"
        raise table.error("length", what, "map less, or raise [machine].memory")
    _check_linear(table, machine, gva, gva + length - 1)
    return Mapping(
        gva=gva,
        gpa=gpa,
        length=length,
        access=table.choice("access", ACCESSES),
        user=table.boolean("user", default=True),
    )


def _check_linear(table: Table, machine: MachineSpec, first: int, last: int) -> None:
    long = machine.mode == "long"
    if last > _last_linear(machine):
        raise table.error("length", "the mapping wraps around the end of the address space", "map less")
    if long and not (is_canonical(first) and is_canonical(last)):
        raise table.error("gva", f"{first:#x} to {last:#x} is not all canonical", "map outside of the hole")
    start, size = RESERVED_LONG if long else RESERVED_PROTECTED
    if first < start + size and last >= start:
        what = f"{start:#x} to {start + size - 1:#x} is where the VMM keeps GDT and TSS"
        raise table.error("gva", what, "map somewhere else")


def _last_linear(machine: MachineSpec) -> int:
    return U64_MAX if machine.mode == "long" else U32_MAX


def policy_from(values: dict[str, Any], manifest: Manifest, origin: str) -> Policy:
    """The policy that the values of a ``[policy]`` table make for the guest of a manifest.

    Raises ``ManifestError`` that names ``origin``.
    """
    table = Table(values, "[policy]", origin, _POLICY_KEYS)
    return _policy(table, manifest.machine, manifest.image, manifest.paging)


def _policy(table: Table, machine: MachineSpec, image: Image, paging: Paging | None) -> Policy:
    policy = Policy(
        reads=table.choice("reads", ("step", "grant", "adaptive"), default="step"),
        writes=table.choice("writes", ("step", "window", "adaptive", "attribute"), default="step"),
        code=table.choice("code", ("load", "fetch", "seal"), default="load" if image.format == "elf64" else "fetch"),
        coherence=table.choice("coherence", ("coherent", "serialised", "explicit"), default="coherent"),
        wx=table.choice("wx", ("off", "fault", "stop"), default="off"),
        tlb=table.choice("tlb", ("loose", "strict"), default="loose"),
    )
    if policy.wx != "off" and not has_page_tables(machine, paging):
        what = "without page tables everything is writable and executable"
        raise table.error("wx", what, "give the guest [paging], or remove wx")
    if policy.wx != "off" and policy.coherence != "coherent":
        what = "frames that must be approved have no stale code"
        raise table.error("wx", what, 'remove wx, or set coherence = "coherent"')
    if policy.tlb == "strict" and policy.coherence != "coherent":
        what = "stale translations and stale code are looked for one at a time"
        raise table.error("tlb", what, 'set tlb = "loose", or coherence = "coherent"')
    return policy


def _end(table: Table) -> End:
    halt = table.boolean("halt", default=False)
    port = table.maybe_integer("port", 0, U16_MAX)
    value = table.maybe_integer("value", 0, 0xFF)
    if value is not None and halt and port is None:
        raise table.error("value", "has no port to be written to", "give port, or remove value")
    return End(0xF4 if port is None and not halt else port, value, halt)


def _console(table: Table, end: End) -> Console:
    console = Console(table.integer("port", 0, U16_MAX, default=Console().port))
    if console.port == end.port:
        raise table.error("port", f"{console.port:#x} is [end].port too", "give one of them another number")
    return console


def _limits(table: Table) -> Limits:
    return Limits(
        exits=table.integer("exits", 1, (1 << 63) - 1, default=Limits().exits),
        seconds=table.seconds("seconds", 1e6, default=Limits().seconds),
    )
