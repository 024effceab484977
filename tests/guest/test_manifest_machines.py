"""The rules of guest.toml about several vCPUs, devices and coherence, one row each."""

from pathlib import Path

import pytest

from vmm.errors import ManifestError
from vmm.guest import parse_manifest
from vmm.guest.manifest import Schedule, WorkpieceSpec

GOOD = """
schema = "vmm-guest/1"
name = "t"
{top}
[image]
format = "flat"
file = "image.bin"
load = 0x10000
[machine]
memory = 0x400000
mode = "long"
[cpu]
entry = 0x10000
"""
VCPU = "[[vcpu]]\nentry = 0x10000\n"
WORKPIECE = "[workpiece]\nport = 0x300\nvector = 0x40\nflaws = [[20, 57], [45, 100]]\n"


def parse(text="", top=""):
    return parse_manifest(GOOD.format(top=top) + text, Path("here/there/guest.toml"))


def test_vcpus_are_numbered_in_their_order():
    manifest = parse(VCPU + "[[vcpu]]\nentry = 0x20000\ncpl = 3\n")
    assert [cpu.entry for cpu in manifest.cpus] == [0x10000, 0x10000, 0x20000]
    assert manifest.cpus[2].cpl == 3


def test_the_schedule_has_defaults():
    assert parse().schedule == Schedule(seed=0, quantum=64)
    assert parse("[schedule]\nseed = 7\nquantum = 1\n").schedule == Schedule(seed=7, quantum=1)


def test_a_workpiece():
    assert parse().workpiece is None
    assert parse(WORKPIECE).workpiece == WorkpieceSpec(0x300, 0x40, 1, ((20, 57), (45, 100)))


def test_the_script_of_a_wrong_version_is_that_of_the_right_one():
    assert parse().own_script == Path("here/there/expect.script")
    assert parse(top='wrong_of = "right"').own_script == Path("here/right/expect.script")


@pytest.mark.parametrize("model", ["coherent", "serialised", "explicit"])
def test_coherence_models(model):
    assert parse(f'[policy]\ncoherence = "{model}"\n').policy.coherence == model


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[vcpu]]\ncpl = 3\n", "[vcpu][0].entry: missing"),
        (VCPU * 16, "16 entries are too many"),
        ("[[vcpu]]\nentry = 0x10000\ncpl = 1\n", "1 does not go with cpl = 0"),
        ("[[vcpu]]\nentry = 0x10000\nregisters = { cr3 = 0x3000 }\n", "its cr3 is not that of [cpu]"),
        ("[[vcpu]]\nentry = 0x10000\nname = 1\n", "unknown key"),
        ("[vcpu]\nentry = 0x10000\n", "is not an array of tables"),
        ("[schedule]\nquantum = 0\n", "out of range"),
        ("[schedule]\nseed = -1\n", "out of range"),
        ("[ipi]\nport = 0xf4\n", "the port of another device"),
        ("[ipi]\nport = 0xe9\n", "the port of another device"),
        ("[ipi]\nport = 0x10000\n", "out of range"),
        ('[policy]\ncoherence = "weak"\n', "not one of its values"),
        ("[workpiece]\nvector = 0x40\nflaws = []\n", "[workpiece].port: missing"),
        (WORKPIECE.replace("0x40", "0x1f"), "out of range"),
        (WORKPIECE.replace("0x300", "0xf0"), "overlap another device"),
        (WORKPIECE.replace("0x300", "0xfff9"), "out of range"),
        (WORKPIECE.replace("[20, 57]", "[20]"), "is not an array of pairs"),
        (WORKPIECE.replace("57", "65536"), "is not an array of pairs"),
        (WORKPIECE.replace("57", "true"), "is not an array of pairs"),
        (WORKPIECE.replace("[[20, 57], [45, 100]]", "20"), "is not an array of pairs"),
    ],
)
def test_what_is_refused(text, complaint):
    with pytest.raises(ManifestError) as caught:
        parse(text)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a\\\\b"])
def test_a_wrong_version_names_a_folder_beside_it(name):
    with pytest.raises(ManifestError, match="is no folder's name"):
        parse(top=f'wrong_of = "{name}"')
