"""``vmm boot``: a tiny kernel's console, typed input, files, and what cannot be booted."""

from __future__ import annotations

import json
import signal

import pc_guests
import pytest
import tiny
from pc_guests import MASTER, prologue
from terminals import Session
from test_cli_process import wait_until_it_runs

from vmm.guest.linux import load_linux

#: Prints a prompt, gives back each line in upper case, forever.
SHELL = """
    mov dx, 0x3f8; lea rsi, [rip + prompt]; mov ecx, 3; rep outsb
    read: mov dx, 0x3fd; in al, dx; test al, 1; jz read
    mov dx, 0x3f8; in al, dx; cmp al, 10; je newline
    and al, 0xdf; out dx, al; jmp read
    newline: mov al, 10; out dx, al; lea rsi, [rip + prompt]; mov ecx, 3; rep outsb; jmp read
    prompt: .ascii "$# "
"""


def kernel(folder, source=SHELL):
    source = source.replace('.ascii "$# "', ".byte 0x24, 0x23, 0x20")
    return str(pc_guests.kernel(folder, source))


@pytest.fixture
def boot(vmm):
    return lambda *arguments: vmm("boot", *arguments)


def test_the_console_goes_to_standard_output_and_lines_are_typed_at_prompts(boot, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"hello\nyou\n")
    state, trace = tmp_path / "state.json", tmp_path / "trace.jsonl"
    run = boot("--kernel", kernel(tmp_path), "--input", tmp_path / "in.txt", "--state", state, "--trace", trace)
    assert run.exit_code == 0, run.stderr
    assert run.stdout.startswith("$# HELLO\n$# YOU\n$# \n")
    assert json.loads(state.read_text())["end"]["reason"] == "stopped"
    assert json.loads(trace.read_text().splitlines()[-1])["kind"] == "end"


def test_runs_repeat_to_the_byte(boot, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"hello\n")
    made = []
    for number in range(2):
        trace = tmp_path / f"{number}.jsonl"
        run = boot("--kernel", kernel(tmp_path), "--input", tmp_path / "in.txt", "--trace", trace, "-q")
        assert run.exit_code == 0, run.stderr
        made.append(trace.read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(("arguments", "there"), [([], True), (["--apic", "on"], True), (["--apic", "off"], False)])
def test_a_pc_has_a_local_apic_unless_it_is_to_have_none(boot, tmp_path, arguments, there):
    source = "mov eax, 1; cpuid; mov esi, 0xfee00000; bt edx, 9; jnc none; mov eax, [rsi + 0x30]; none: hlt"
    trace = tmp_path / "trace"
    assert boot("--kernel", kernel(tmp_path, source), *arguments, "--trace", trace, "-q").exit_code == 0
    devices = [line for line in map(json.loads, trace.read_text().splitlines()) if line.get("kind") == "device"]
    access = {"kind": "device", "gpa": 0xFEE00030, "size": 4, "direction": "read", "value": 0x50014}
    assert [access.items() <= line.items() for line in devices] == [True] * there


def test_a_guest_that_halts_or_resets_has_ended_well(boot, tmp_path):
    for source in ("cli; hlt", "mov al, 0xfe; out 0x64, al", "mov al, 7; out 0xf4, al"):
        assert boot("--kernel", kernel(tmp_path, source), "-q").exit_code == 0


def test_a_guest_that_dies_is_a_failure(boot, tmp_path):
    run = boot("--kernel", kernel(tmp_path, "ud2"), "-q")
    assert (run.exit_code, "triple fault" in run.stderr) == (3, True)


def test_the_time_limit_is_kept(boot, tmp_path):
    run = boot("--kernel", kernel(tmp_path), "--seconds", "0.5", "-q")
    assert (run.exit_code, "time limit" in run.stderr) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "12Q"], "'12Q' is no size"),
        (["--memory", "3M"], "0x300000 bytes of memory"),
        (["--memory", "2G"], "multiple of 2 MiB up to 1024M"),
        (["--memory", "16M"], "give it --memory 18M or more"),
        (["--initrd", "missing"], "missing: cannot be read"),
        (["--input", "missing"], "missing: cannot be read"),
        (["--append", "x" * 5000], "a command line of 5000 bytes"),
        (["--apic", "maybe"], "'maybe' is not one of 'on', 'off'"),
        (["--prompt", "", "--input", "/dev/null"], "not a regular file"),
        (["--expect", "missing.script"], "missing.script"),
    ],
)
def test_bad_options_get_one_line(boot, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    run = boot("--kernel", kernel(tmp_path), *arguments)
    assert run.exit_code == 2
    assert words in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "neither a bzImage nor a vmlinux"),
        (b"#!/bin/sh\n" * 100, "neither a bzImage nor a vmlinux"),
        (pc_guests.bz_image(b"\xf4", version=0x206), "no 64-bit entry (boot protocol 2.06)"),
        (pc_guests.bz_image(b"\xf4", flags=0), "no 64-bit entry"),
        (pc_guests.bz_image(b"\xf4")[:1024], "cut off behind its setup"),
        (pc_guests.bz_image(b"\xf4", where=1 << 40), "a preferred address of 0x10000000000"),
        (pc_guests.bz_image(b"\xf4", where=0x1000), "a preferred address of 0x1000"),
        (pc_guests.bz_image(b"\xf4", size=0xF0000000), "the kernel needs memory up to 0xf1000000"),
        (b"\x7fELF" + bytes(200), "kernel"),
    ],
)
def test_bad_kernels_get_one_line(boot, tmp_path, data, words):
    (tmp_path / "kernel").write_bytes(data)
    run = boot("--kernel", tmp_path / "kernel")
    assert run.exit_code == 2
    assert words in run.stderr
    assert run.stderr.count("\n") == 1


def test_an_output_does_not_replace_the_initrd(boot, tmp_path):
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"data")
    run = boot("--kernel", kernel(tmp_path), "--initrd", initrd, "--state", initrd)
    assert run.exit_code == 2
    assert initrd.read_bytes() == b"data"


def test_the_kernel_finds_what_the_boot_protocol_promises(tmp_path):
    (tmp_path / "initrd").write_bytes(b"ramdisk" * 1000)
    guest = load_linux(
        pc_guests.kernel(tmp_path, "hlt"), initrd=tmp_path / "initrd", command_line="quiet", memory=64 << 20
    )
    memory = dict(guest.boot.writes)
    (zero,) = [data for gpa, data in memory.items() if gpa == guest.boot.cpus[0].gprs["rsi"]]
    word = lambda at: int.from_bytes(zero[at : at + 4], "little")  # noqa: E731
    assert zero[0x202:0x206] == b"HdrS"
    assert memory[word(0x228)] == b"quiet\0"
    assert (word(0x21C), memory[word(0x218)]) == (7000, b"ramdisk" * 1000)
    assert word(0x218) + 7000 <= 64 << 20
    assert (zero[0x210], zero[0x211] & 1, zero[0x1E8]) == (0xFF, 1, 3)
    assert guest.entry == pc_guests.ENTRY


@pytest.mark.parametrize(
    "source",
    ["spin: jmp spin", "spin: mov dx, 0x3fd; in al, dx; jmp spin", "spin: mov eax, [rip + 0x100]; sti; hlt; jmp spin"],
    ids=["no exits", "many exits", "asleep"],
)
def test_a_signal_ends_a_boot_at_a_boundary_and_leaves_whole_files(process, tmp_path, source):
    timer = pc_guests.timer(1000) if "hlt" in source else ""
    source = f"{prologue(MASTER)} {timer} {source}; handler: mov al, 0x20; out 0x20, al; iretq"
    out = tmp_path / "out"
    out.mkdir()
    child = process("boot", "--kernel", kernel(tmp_path, source), "-q", "--trace", out / "trace")
    wait_until_it_runs(child, out)
    child.send_signal(signal.SIGINT)
    _, complaint = child.communicate(timeout=20)
    assert (child.returncode, b"interrupted" in complaint) == (130, True)
    assert json.loads((out / "trace").read_text().splitlines()[-1])["reason"] == "interrupted"


#: Sleeps until a character comes, and gives it back in upper case.
SLEEPER = f"""
    {prologue(MASTER + 4)}
    mov dx, 0x3f9; mov al, 1; out dx, al; mov dx, 0x3fc; mov al, 8; out dx, al
    mov dx, 0x3f8; mov al, 0x3e; out dx, al
    again: sti; hlt; jmp again
    handler: mov dx, 0x3f8; in al, dx; and al, 0xdf; out dx, al; mov al, 0x20; out 0x20, al; iretq
"""


@pytest.mark.parametrize("source", [SHELL, SLEEPER], ids=["busy", "asleep"])
def test_a_terminal_is_the_console(tmp_path, source):
    with Session("--kernel", kernel(tmp_path, source)) as session:
        session.expect(b"# " if source is SHELL else b">")
        session.type(b"abc")
        session.expect(b"ABC")
        session.type(b"\x03\x01\x01")  # Ctrl-C is the guest's, and so is a doubled Ctrl-A
        session.expect(b"ABC\x03\x01")
        session.type(b"\x01x")
        session.expect(b"exits")
        assert session.wait() == 0
        assert session.modes == session.before


#: Calls a function that stores to another one, which is executed each time: forty times.
PATCHER = """
    mov esp, 0x120000; mov r12d, 40
    again: call patch; call target; dec r12d; jnz again
    mov al, 0; out 0xf4, al
    patch: lea rbx, [rip + target]; mov byte ptr [rbx + 1], r12b; ret
    .space 4096
    target: mov al, 1; ret
"""


@pytest.mark.parametrize("attribute", [True, False])
def test_a_trace_has_the_callers_and_with_attribute_those_of_every_patch(boot, vmm, tmp_path, attribute):
    (tmp_path / "in.txt").write_bytes(b"")
    trace = tmp_path / "trace.jsonl"
    options = ["--attribute"] if attribute else []
    run = boot("--kernel", kernel(tmp_path, PATCHER), "--input", tmp_path / "in.txt", "--trace", trace, *options)
    assert run.exit_code in (0, 1), run.stderr
    header, *records = map(json.loads, trace.read_text().splitlines())
    assert header["options"]["callers"] is True
    assert header["policy"]["writes"] == ("attribute" if attribute else "adaptive")
    made = [record for record in records if record["kind"] == "modification"]
    windows = [record for record in made if record["cause"] == "window"]
    assert bool(windows) is not attribute
    assert all("callers" not in record for record in windows)
    (callers,) = {tuple(record["callers"]) for record in made if record["cause"] == "store"}
    assert callers == (pc_guests.ENTRY + len(tiny.assemble("mov esp, 0x120000; mov r12d, 40; call 0x10100")),)
    summary = vmm("patches", trace)
    assert summary.exit_code == 0
    assert f"{len(made)} modifications in " in summary.stdout
    assert vmm("replay", trace).exit_code == 0


def test_without_a_trace_nothing_is_searched_for(boot, tmp_path):
    """The same run, to the byte, but for what is put on record."""
    (tmp_path / "in.txt").write_bytes(b"")
    states = []
    for number, options in enumerate((["--trace", tmp_path / "trace.jsonl"], [])):
        state = tmp_path / f"{number}.json"
        boot("--kernel", kernel(tmp_path, PATCHER), "--input", tmp_path / "in.txt", "--state", state, *options)
        states.append(state.read_bytes())
    assert states[0] == states[1]
