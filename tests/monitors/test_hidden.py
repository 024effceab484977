"""Hidden patches: executed, never read; the guest's own changes take their course beside them."""

import pytest
from tiny import CODE, DATA, END, PAGE, STRICT, assemble, build, map_page

from vmm.coherence import Coherence
from vmm.errors import OptionError
from vmm.guest.manifest import Policy
from vmm.machine import RunOptions

OTHER = CODE + PAGE
EVERY_WAY = pytest.mark.parametrize(
    "options",
    [STRICT, RunOptions(single_step=True, check=True), RunOptions(traps=False)],
    ids=["free", "single", "no traps"],
)
MAPS = [map_page(OTHER, OTHER)]


def machine_with(text: str, other: str = "mov al, 1; ret", **rest):
    """A tiny guest with a function at ``OTHER``, whose address RBX holds."""
    return build({CODE: f"mov ebx, {OTHER}; {text}; {END}", OTHER: other}, maps=MAPS, **rest)


@EVERY_WAY
@pytest.mark.parametrize("reads", ["step", "grant"])
def test_it_is_executed_and_not_read(options, reads):
    text = "call rbx; mov ah, [rbx + 1]; call rbx; add al, ah"
    tiny = machine_with(text, options=options, policy=Policy(reads=reads))
    tiny.machine.patch_hidden(OTHER, assemble("mov al, 40"))

    assert tiny.run().detail["value"] == 41
    assert tiny.machine.read(OTHER, 2) == assemble("mov al, 1")


@EVERY_WAY
@pytest.mark.parametrize("writes", ["step", "window", "adaptive"])
def test_what_the_guest_writes_beside_it_is_executed_and_over_it_is_not(options, writes):
    other = "mov al, 1; add al, 2; ret"
    text = "call rbx; mov byte ptr [rbx + 1], 9; mov byte ptr [rbx + 3], 5; call rbx; mov cl, [rbx + 1]; add al, cl"
    tiny = machine_with(text, other, options=options, policy=Policy(code="load", writes=writes))
    tiny.machine.patch_hidden(OTHER, assemble("mov al, 40"))

    assert tiny.run().detail["value"] == 40 + 5 + 9


@EVERY_WAY
def test_it_takes_effect_and_ends_in_the_middle_of_a_run(options):
    tiny = machine_with(
        "call rbx; mov cl, al; call rbx; add cl, al; mov [0x40000], cl; call rbx; add al, cl", options=options
    )
    patches = []
    call = CODE + 5

    def patch(seen):
        if seen.rip == call + 4:
            patches.append(tiny.machine.patch_hidden(OTHER, assemble("mov al, 40")))

    tiny.machine.monitor(call + 4, 1, "x", before=patch)
    tiny.machine.monitor(DATA, 1, "w", after=lambda _: patches[0].remove())

    assert tiny.run().detail["value"] == 1 + 40 + 1
    assert not patches[0].active


def test_the_latest_of_two_counts_and_removing_it_shows_the_other():
    tiny = machine_with("call rbx; mov cl, al; mov [0x40000], cl; call rbx; add al, cl")
    tiny.machine.patch_hidden(OTHER, assemble("mov al, 40"))
    second = tiny.machine.patch_hidden(OTHER + 1, b"\x64")
    tiny.machine.monitor(DATA, 1, "w", before=lambda _: second.remove())

    assert tiny.run().detail["value"] == 100 + 40


@EVERY_WAY
def test_it_may_lie_over_two_pages_and_on_data(options):
    code = assemble("mov eax, 0x01020304; ret", OTHER + PAGE - 3)
    tiny = build(
        {CODE: f"mov ebx, {OTHER + PAGE - 3}; call rbx; {END}", OTHER: bytes(2 * PAGE)},
        code={CODE},
        maps=[map_page(OTHER, OTHER, pages=2)],
        options=options,
    )
    tiny.machine.patch_hidden(OTHER + PAGE - 3, code)

    assert tiny.run().detail["value"] == 4


@EVERY_WAY
def test_a_data_frame_written_first_is_executed_as_written_but_for_the_patch(options):
    text = "mov dword ptr [rbx], 0x0204_01b0; mov byte ptr [rbx + 4], 0xc3; call rbx".replace("_", "")
    tiny = build(
        {CODE: f"mov ebx, {OTHER}; {text}; {END}", OTHER: bytes(16)}, code={CODE}, maps=MAPS, options=options
    )
    tiny.machine.patch_hidden(OTHER + 1, b"\x07")  # mov al, 1 -> 7

    assert tiny.run().detail["value"] == 7 + 2


def test_blocks_that_are_executed_from_it_die_on_record():
    tiny = machine_with("call rbx; mov byte ptr [rbx + 3], 5; call rbx", "mov al, 1; add al, 2; ret")
    tiny.machine.patch_hidden(OTHER, assemble("mov al, 40"))

    tiny.run()

    assert [(record.old, record.new, len(record.blocks)) for record in tiny.modifications] == [(b"\x02", b"\x05", 1)]


def test_hooks_and_monitors_work_on_it():
    tiny = machine_with("call rbx; mov cl, [rbx]")
    tiny.machine.patch_hidden(OTHER, assemble("mov al, 40"))
    executed, read = [], []
    tiny.machine.hook(OTHER, lambda seen: executed.append(seen.old))
    tiny.machine.monitor(OTHER, 2, "r", after=lambda seen: read.append(seen.old))

    tiny.run()

    assert (executed, read) == ([assemble("mov al, 40")], [b"\xb0"])


def test_where_it_is_refused_nothing_changes():
    tiny = machine_with("call rbx", options=RunOptions())
    with pytest.raises(OptionError, match="no bytes"):
        tiny.machine.patch_hidden(OTHER, b"")
    with pytest.raises(OptionError, match="64 frames"):
        tiny.machine.patch_hidden(0, bytes(65 * PAGE))
    tiny.machine.seal(OTHER, 1)
    with pytest.raises(OptionError, match="sealed"):
        tiny.machine.patch_hidden(OTHER, b"\x90")
    weak = machine_with("call rbx", options=RunOptions(coherence=Coherence.EXPLICIT))
    with pytest.raises(OptionError, match="fetch side"):
        weak.machine.patch_hidden(OTHER, b"\x90")
    assert tiny.run().detail["value"] == 1


def test_room_is_given_back():
    machine = machine_with("call rbx", options=RunOptions()).machine
    for _ in range(3):
        machine.patch_hidden(0, bytes(64 * PAGE)).remove()
    assert machine.memory.spare_pages == 64
