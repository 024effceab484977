"""Monitors and hidden patches in recorded runs: who looks leaves no mark; who acts does it where a trace can tell."""

import pytest
from recorded import guest, recorded, replayed
from tiny import DATA, END

from vmm.errors import OptionError
from vmm.exits import Vmcall

SOURCE = f"mov ebx, {DATA}; mov [rbx], ebx; mov eax, [rbx]; cpuid; {END}"
#: The immediate of a MOV that is executed twice, with a VMCALL in between.
TWICE = f"mov ecx, 2\nagain: mov al, 1; add dl, al; vmcall; dec ecx; jnz again; mov al, dl; {END}"
IMMEDIATE = 0x10006


def test_a_recording_of_a_run_that_is_looked_at_is_that_of_the_run(tmp_path):
    folder = guest(tmp_path / "guest", SOURCE)

    def look(machine):
        machine.monitor(DATA, 4, "rw", before=lambda _: None, after=lambda _: None)
        machine.hook(0x10000, lambda _: None)

    assert recorded(tmp_path / "looked at", folder, prepare=look) == recorded(tmp_path / "plain", folder)


@pytest.mark.parametrize(
    "act",
    [
        lambda _: True,
        lambda machine: machine.write(DATA + 8, b"\x01"),
        lambda machine: machine.vcpu.context.set_gpr("rax", 1),
        lambda machine: machine.stop(),
        lambda machine: machine.patch_hidden(DATA, b"\x01"),
    ],
)
def test_what_a_recording_could_not_repeat_is_refused(act, tmp_path):
    folder = guest(tmp_path / "guest", SOURCE)
    with pytest.raises(OptionError, match="at no record"):
        recorded(
            tmp_path / "t", folder, prepare=lambda machine: machine.monitor(DATA, 4, "w", before=lambda _: act(machine))
        )


def test_hidden_patches_come_and_go_again(tmp_path):
    folder = guest(tmp_path / "guest", TWICE)

    def prepare(machine):
        patch = machine.patch_hidden(IMMEDIATE, b"\x07")
        machine.on(Vmcall)(lambda _: patch.remove())

    trace = recorded(tmp_path / "t", folder, prepare=prepare)

    assert b'"value":8' in trace.replace(b" ", b"").splitlines()[-1]
    assert replayed(tmp_path / "t") == (trace, None)
