"""``vmm run`` and ``vmm boot`` with Multiboot images: options, input, files, and what is refused."""

import json

import pytest
from multiboot_images import MAGIC, STACK, code, elf32, flat, header

#: Prints its command line, then gives back in upper case what comes over the serial port, up to a full stop.
ECHO = f"""
    mov esp, {STACK}; mov esi, [ebx + 16]
    next: lodsb; test al, al; jz read; mov dx, 0x3f8; out dx, al; jmp next
    read: mov dx, 0x3fd; in al, dx; test al, 1; jz read
    mov dx, 0x3f8; in al, dx; cmp al, 0x2e; je done; and al, 0xdf; out dx, al; jmp read
    done: mov al, 0; out 0xf4, al
"""


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "echo.flat"
    path.write_bytes(flat(code(ECHO)))
    return path


@pytest.fixture
def typed(tmp_path):
    path = tmp_path / "typed"
    path.write_bytes(b"hello.")
    return path


def test_an_image_runs_with_a_command_line_and_input(vmm, image, typed):
    result = vmm("run", image, "--append", "a b", "--input", typed, "--audit", "--check")
    assert result.exit_code == 0, result.stderr
    assert "| echo.flat a bHELLO\n" in result.stdout
    assert "end       0x0 written to port 0xf4\n" in result.stdout


def test_runs_repeat_to_the_byte(vmm, image, typed, tmp_path):
    traces = [tmp_path / "one", tmp_path / "two"]
    for trace in traces:
        assert vmm("run", "-q", image, "--input", typed, "--trace", trace).exit_code == 0
    assert traces[0].read_bytes() == traces[1].read_bytes()


@pytest.mark.parametrize("command", ["run", "boot"])
def test_a_recorded_run_comes_again(vmm, image, typed, tmp_path, command):
    """Under the policy of the command that it was recorded with, with its modules, and whatever they are called now."""
    trace, module = tmp_path / "trace", tmp_path / "module"
    module.write_bytes(b"data")
    files = (image, "--module", module) if command == "run" else ("--kernel", image, "--initrd", module)
    options = ("--append", "x", "--memory", "4M", "--input", typed, "--seconds", "60")
    prompt = ("--prompt", "x") if command == "boot" else ()
    assert vmm(command, "-q", *files, *options, *prompt, "--trace", trace).exit_code == 0
    typed.unlink()
    result = vmm("replay", trace)
    assert "byte-identical" in result.output, result.stderr
    moved = image.rename(tmp_path / "kernel"), module.rename(tmp_path / "other")
    assert vmm("replay", trace).exit_code == 2
    result = vmm("replay", trace, "--guest", moved[0], "--module", moved[1])
    assert "byte-identical" in result.output, result.stderr
    moved[1].write_bytes(b"DATA")
    result = vmm("replay", trace, "--guest", moved[0], "--module", moved[1])
    assert (result.exit_code, "recorded with the file other SHA-256" in result.stderr) == (2, True)


def test_a_state_and_a_script_are_as_for_any_guest(vmm, image, typed, tmp_path):
    script, state = tmp_path / "echo.script", tmp_path / "state"
    lines = ("exit IO_INSTRUCTION port=0x3f8 value=0x48", 'console contains "HELLO"', "end port value=0")
    script.write_text("\n".join(["vmm-script/1", *lines, ""]))
    result = vmm("run", "-q", image, "--input", typed, "--expect", script, "--state", state)
    assert result.exit_code == 0, result.stderr
    assert json.loads(state.read_text())["end"] == {"reason": "port", "port": 0xF4, "value": 0}


def test_memory_and_modules_are_given(vmm, tmp_path):
    """The image ends with the number of its modules, and of the mebibytes above the first."""
    path = tmp_path / "count.elf"
    path.write_bytes(elf32("mov eax, [ebx + 8]; shr eax, 10; add eax, [ebx + 20]; out 0xf4, al"))
    (tmp_path / "module").write_bytes(b"data")
    modules = ["--module", tmp_path / "module"] * 3
    assert "0x3f written to" in vmm("run", path).stdout
    assert f"{19 + 3:#x} written to" in vmm("run", path, "--memory", "20M", *modules).stdout


def test_boot_takes_an_image_too(vmm, image, typed, tmp_path):
    (tmp_path / "lines").write_bytes(b"one.\n")
    run = vmm("boot", "--kernel", image, "--append", "$", "--prompt", "$", "--input", tmp_path / "lines")
    assert run.exit_code == 0, run.stderr
    assert run.stdout.startswith("echo.flat $ONE\n")
    path = tmp_path / "modules.elf"
    path.write_bytes(elf32("mov eax, [ebx + 20]; out 0xf4, al"))
    run = vmm("boot", "--kernel", path, "--initrd", typed)
    assert "0x1 written to port 0xf4" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["IMAGE", "--memory", "12Q"], "--memory: '12Q' is no size; write it like 256M or 1G"),
        (["IMAGE", "--memory", "3M"], "memory: 0x300000 bytes of memory; give a multiple of 2 MiB up to 1024M"),
        (["IMAGE", "--module", "missing"], "missing: cannot be read (No such file or directory)"),
        (["IMAGE", "--append", "x" * 5000], "bytes of boot information"),
        (["IMAGE", "--input", "missing"], "missing: cannot be read"),
        (["IMAGE", "--input", "LONG"], "--input: more than 0x100000 bytes; give less"),
        (["IMAGE", "--time", "5"], "--time: echo.flat has no port to read it from"),
        (["IMAGE", "--wx", "stop"], "wx: without page tables everything is writable and executable"),
        (["IMAGE", "--module", "MODULE", "--trace", "MODULE"], "is read by this run"),
        (["IMAGE", "--input", "MODULE", "--trace", "MODULE"], "is read by this run"),
        (["IMAGE", "--state", "IMAGE"], "is read by this run"),
        (["alias-patch", "--append", "x"], "--append: alias-patch is no Multiboot image; leave it out: only Multiboot"),
        (["alias-patch", "--memory", "4M", "--module", "x"], "--memory and --module: alias-patch is no Multiboot"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_refused_in_one_line(vmm, image, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "module").write_bytes(b"data")
    (tmp_path / "long").write_bytes(bytes(0x100001))
    names = {"IMAGE": str(image), "MODULE": "module", "LONG": "long"}
    result = vmm("run", *(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "module").read_bytes() == b"data"


NONE = "neither a Multiboot image, nor an ELF64 image, nor a guest.toml"
FIX = "give a guest.toml, a Multiboot image or an ELF64 image, or describe the image in a guest.toml"


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", f"unknown: {NONE}; {FIX}"),
        (b"#!/bin/sh\n", f"unknown: {NONE}; {FIX}"),
        (MAGIC.to_bytes(4, "little"), f"unknown: {NONE}; {FIX}"),
        (b"\x7fELF\x01" + bytes(100), f"unknown: an ELF file, but {NONE}; {FIX}"),
        (header(0, checksum=5), f"unknown: its Multiboot header at 0x0 has the checksum 0x5, not 0xe4524ffe; {FIX}"),
        (header(0x10007, (0,) * 5), "unknown: Multiboot header at 0x0: it wants a video mode, and there is no video;"),
        (header(3), "unknown: neither ELF nor, as its Multiboot header has no flag 16, with addresses to load it at;"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_of_no_known_kind_is_told_which_ones_there_are(vmm, tmp_path, data, line):
    (tmp_path / "unknown").write_bytes(data)
    result = vmm("run", tmp_path / "unknown")
    assert result.exit_code == 2
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
