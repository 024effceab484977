"""Debian's kernel under the trap: an unmodified one boots to a shell, repeats to the byte, and its patches add up.

Run with ``pytest -m linux``; the packages are fetched with apt.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import debian
import pytest
from boots import Boot, boot

from vmm.exits import ExitReason
from vmm.guest.kallsyms import find_kallsyms
from vmm.machine import RunOptions
from vmm.memory.frames import FrameState

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from pages import ROOT, Reader, blocks_of, provide_commands

pytestmark = pytest.mark.linux


def answers(made: Boot) -> None:
    console = made.console
    assert "\nLinux 6." in console
    assert "\n1\r\n" in console
    assert "53d025127ae99ab79e8502aae2d9bea6" in console, "seq 1 1000 | md5sum"
    assert "b6d81b360a5672d80c27430f39153e2c" in console, "a mebibyte of zeros"
    assert "\nslept\r\n" in console
    assert made.end.reason == "halt"


def test_a_shell_answers_and_the_machine_halts(booted):
    answers(booted)


def test_the_journal_accounts_for_every_byte_of_code(booted):
    assert booted.shadow.surprises == []
    assert booted.shadow.differences() == []
    assert len(booted.shadow.pages) > 1000


def test_no_frame_is_ever_writable_and_executable(booted):
    booted.machine.verify()
    states = {frame.state for frame in booted.machine.frames}
    assert states <= {FrameState.DATA, FrameState.CODE}


def test_the_symbols_found_in_memory_are_those_that_the_kernel_shows(booted):
    symbols = find_kallsyms(booted.machine.memory.mapping)
    assert len(symbols) > 50_000
    (address,) = [symbol.address for symbol in symbols if symbol.name == "start_kernel"]
    assert f"\n{address:016x} T start_kernel\r\n" in booted.console


def test_time_came_from_the_timer(booted):
    assert booted.machine.reporter.counts[ExitReason.EXTERNAL_INTERRUPT] > 100
    assert booted.machine.pc.now() > 1_000_000_000


def test_two_boots_are_the_same_to_the_byte(booted, files):
    again = boot(*files)
    assert again.digest() == booted.digest()


def test_a_vmlinux_boots_as_well_and_no_transition_breaks_a_rule(files, tmp_path):
    kernel, initrd = files
    unpacked = tmp_path / "vmlinux"
    unpacked.write_bytes(debian.vmlinux(kernel.read_bytes()))
    made = boot(unpacked, initrd, RunOptions(check=True))
    answers(made)
    assert made.shadow.surprises == made.shadow.differences() == []


def test_the_page_does_what_it_says(files, tmp_path):
    kernel, initrd = files
    provide_commands(tmp_path / "bin")
    folder = tmp_path / "guest"
    folder.mkdir()
    shutil.copy(kernel, folder / "vmlinuz")
    shutil.copy(initrd, folder / "initrd.cpio")
    reader = Reader(folder, tmp_path / "bin")
    for block in blocks_of(ROOT / "docs" / "linux.md"):
        reader.follow(block)
