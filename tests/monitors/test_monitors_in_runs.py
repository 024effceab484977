"""Monitors where several vCPUs run, and where a manifest hides something."""

import pytest
from tiny import CODE, DATA, END, PAGE, build

from vmm.errors import ManifestError
from vmm.guest.loader import load_guest
from vmm.guest.manifest import CpuSpec, Schedule
from vmm.machine import Machine, RunOptions

TWO = {
    CODE: f"mov ebx, {DATA}; mov ecx, 30\nagain: lock inc dword ptr [rbx]; loop again\n"
    f"wait: cmp dword ptr [rbx], 60; jne wait; mov al, [rbx]; {END}",
    CODE + 0x100: f"mov ebx, {DATA}; mov ecx, 30\nagain: lock inc dword ptr [rbx]; loop again; hlt",
}


@pytest.mark.parametrize("options", [RunOptions(check=True, audit=True), RunOptions(single_step=True)])
def test_all_vcpus_are_seen_in_the_order_of_what_they_do(options):
    tiny = build(
        TWO,
        options=options,
        others=[CpuSpec(CODE + 0x100, registers={"rsp": DATA + PAGE})],
        schedule=Schedule(seed=5, quantum=7),
    )
    told = []
    tiny.machine.monitor(DATA, 4, "w", after=told.append)

    assert tiny.run().detail["value"] == 60

    assert [int.from_bytes(seen.new, "little") for seen in told] == list(range(1, 61))
    assert [sum(seen.vcpu == number for seen in told) for number in (0, 1)] == [30, 30]


def test_an_unknown_symbol_of_a_hidden_patch_is_named(tmp_path):
    manifest = load_guest("hidden-hook").manifest
    text = manifest.path.read_text().replace('jump = "detour"', 'jump = "detuor"')
    text = text.replace('"image.elf"', f'"{manifest.image.file}"')
    (tmp_path / "guest.toml").write_text(text)
    with pytest.raises(ManifestError, match=r"\[hidden\]\[0\]\.jump: the image has no symbol 'detuor'"):
        Machine.from_manifest(tmp_path)
