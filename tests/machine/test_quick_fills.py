"""Guests run the same whether their fills are answered by machine code or by Python, and stops asked for or not."""

import pytest
import tiny

from vmm.cpu import exit_checks, fill_table
from vmm.exits import Cpuid
from vmm.guest.loader import bundled_guests, load_guest
from vmm.machine import Machine

GUESTS = {guest.name: guest.path for guest in bundled_guests() if not guest.wrong_of}


def run(path):
    """(end, records, registers, RAM, fills that Python did not see)."""
    with Machine(load_guest(path), tiny.STRICT) as machine:
        made = tiny.watch(machine)
        end = made.run()
        memory = machine.read(0, machine.guest.manifest.machine.memory)
        answered = sum(vcpu.free.fills.answered for vcpu in machine.vcpus)
        return (end, made.records, machine.vcpu.context.registers(), memory), answered


@pytest.mark.parametrize("name", GUESTS)
def test_who_answers_leaves_no_mark(name, monkeypatch):
    quickly, _ = run(GUESTS[name])
    monkeypatch.setattr(fill_table, "placed", lambda _code: None)
    monkeypatch.setattr(exit_checks, "can_be_omitted", lambda: False)
    slowly, answered = run(GUESTS[name])
    assert quickly == slowly
    assert answered == 0


def test_what_was_granted_before_is_answered_without_python(tiny_machine):
    source = f"""
        mov rax, cr3; mov ecx, 100
        again: mov cr3, rax; mov dword ptr [{tiny.DATA}], ecx; dec ecx; jnz again; {tiny.END}"""
    made = tiny_machine(source)
    free = made.machine.vcpu.free
    asked, fill = [], free.fill
    free.fill = lambda page, access: asked.append((page, access)) or fill(page, access)
    assert made.run().reason == "port"
    assert len(asked) == len(set(asked)) < 10
    assert free.fills.answered >= 2 * 99


def test_monitors_see_what_was_granted_before_them(tiny_machine):
    """A store that machine code would let through is seen by the monitor that is set meanwhile."""
    source = f"""
        mov edi, {tiny.DATA}; mov dword ptr [rdi], 1; cpuid; mov edi, {tiny.DATA}
        mov dword ptr [rdi], 2; {tiny.END}"""
    made = tiny_machine(source)
    heard = []

    @made.machine.on(Cpuid)
    def _set(_exit) -> None:
        made.machine.monitor(tiny.DATA, 4, "w", after=heard.append)

    assert made.run().reason == "port"
    assert len(heard) == 1
