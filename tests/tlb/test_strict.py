"""Strict staleness end to end: what a guest reads by stale mappings, and what is reported of it."""

from __future__ import annotations

import pytest
import tiny
from attrs import evolve
from tiny import CODE, STACK
from tlb_machine import (
    DATA,
    GLOBAL,
    OTHER_PLACE,
    PAGE_UNDER_TEST,
    PAGING,
    PLACE,
    PRESENT,
    USER,
    WAYS,
    WRITABLE,
    build,
    entry,
    run,
    stale,
)

from vmm.ept import Permission
from vmm.errors import OptionError
from vmm.exits import EptViolation, Vmcall
from vmm.guest.manifest import CpuSpec
from vmm.machine import RunOptions

PAGE, ENTRY = PAGE_UNDER_TEST, entry(PAGE_UNDER_TEST)
READ = f"mov ebx, [{PAGE:#x}]\n"
READ_AGAIN = f"mov ecx, [{PAGE:#x}]\n"
ELSEWHERE = f"mov dword ptr [{ENTRY:#x}], {OTHER_PLACE | PRESENT | WRITABLE:#x}\n"
OLD, NEW = 0x11111111, 0x22222222
each_way = pytest.mark.parametrize("way", WAYS)

#: Instructions, and whether a mapping that is not global, and one that is, are gone after them.
INVALIDATES = {
    "nop": (False, False),
    f"invlpg [{PAGE:#x}]": (True, True),
    f"invlpg [{PAGE + 0xFFF:#x}]": (True, True),
    f"invlpg [{PAGE + 0x1000:#x}]": (False, False),
    "mov eax, cr3; mov cr3, eax": (True, False),
    "mov eax, cr0; mov cr0, eax": (False, False),
    "mov eax, cr0; btc eax, 16; mov cr0, eax": (False, False),
    "mov eax, cr4; btc eax, 7; mov cr4, eax": (True, True),
    "mov eax, cr0; btc eax, 31; mov cr0, eax; bts eax, 31; mov cr0, eax": (True, True),
    "mov eax, 0; cpuid": (False, False),
    "wbinvd": (False, False),
}
PGE = "mov eax, cr4; or eax, 0x80; mov cr4, eax\n"


@pytest.mark.parametrize("way", ["audited", "stepped"])
@pytest.mark.parametrize("is_global", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("instruction", INVALIDATES)
def test_a_mapping_lasts_until_the_architecture_drops_it(instruction, is_global, way):
    gone = INVALIDATES[instruction][is_global]
    flags = WRITABLE | GLOBAL * is_global
    keep = "push ebx; " + instruction + "; pop ebx\n"
    made = run(PGE + READ + ELSEWHERE + keep + READ_AGAIN, options=WAYS[way], flags=flags)
    assert made.machine.register("rbx") == OLD
    assert made.machine.register("rcx") == (NEW if gone else OLD)
    assert [(record.access, record.missing) for record in stale(made)] == ([] if gone else [("read", "INVLPG")])


@each_way
def test_the_record_says_what_changed_when_and_by_whom(way):
    made = run(READ + "in al, 0x40\n" + ELSEWHERE + READ_AGAIN, options=WAYS[way])
    (record,) = stale(made)
    assert (record.gva, record.gpa, record.entry, record.place) == (PAGE, PLACE, "PTE", ENTRY)
    assert record.old & ~0x60 == PLACE | PRESENT | WRITABLE
    assert record.new == OTHER_PLACE | PRESENT | WRITABLE
    assert made.machine.read(record.writer, 2) == bytes.fromhex("c705")  # mov dword ptr
    assert record.time == 1
    assert made.machine.stale_translations == 1


CHANGES = {
    # What the entry becomes, and which accesses are then owed to the stale mapping.
    "not present": (0, ["read", "write"]),
    "read-only": (PLACE | PRESENT, ["write"]),
    "elsewhere": (OTHER_PLACE | PRESENT | WRITABLE, ["read", "write"]),
    "global": (PLACE | PRESENT | WRITABLE | GLOBAL, []),
    "user": (PLACE | PRESENT | WRITABLE | USER, []),
    "flags clear": (PLACE | PRESENT | WRITABLE, []),
}


@each_way
@pytest.mark.parametrize("change", CHANGES)
def test_only_what_the_tables_would_refuse_or_lead_elsewhere_is_owed_to_staleness(change, way):
    new, owed = CHANGES[change]
    dirty = f"mov dword ptr [{PAGE:#x}], {OLD:#x}\n"
    uses = READ_AGAIN + f"mov dword ptr [{PAGE + 4:#x}], 7\n"
    change_it = f"mov dword ptr [{ENTRY:#x}], {new:#x}\n"
    made = run(dirty + change_it + uses + uses, options=WAYS[way])
    assert [record.access for record in stale(made)] == owed
    assert made.machine.register("rcx") == OLD
    assert made.machine.read(PLACE + 4, 1) == b"\x07"


@each_way
def test_a_read_modify_write_is_one_use(way):
    increment = f"inc dword ptr [{PAGE:#x}]\n"
    made = run(increment + f"mov dword ptr [{ENTRY:#x}], 0\n" + increment, options=WAYS[way])
    assert [record.access for record in stale(made)] == ["write"]
    assert made.machine.read(PLACE, 4) == (OLD + 2).to_bytes(4, "little")


@each_way
def test_code_is_fetched_by_stale_mappings_too(way):
    # mov eax, 5; ret
    fill = f"mov dword ptr [{PAGE:#x}], 0x5b8; mov dword ptr [{PAGE + 4:#x}], 0xc300\n"
    call = f"call {PAGE:#x}\n"
    made = run(fill + call + ELSEWHERE + call + "mov edx, eax", options=WAYS[way])
    assert [record.access for record in stale(made)] == ["fetch"]
    assert made.machine.register("rdx") == 5


@each_way
def test_a_clear_dirty_flag_is_set_by_a_walk(way):
    made = run(READ + ELSEWHERE + f"mov dword ptr [{PAGE:#x}], 9", options=WAYS[way])
    assert stale(made) == []
    assert made.machine.read(OTHER_PLACE, 1) == b"\x09"


@each_way
def test_what_a_mapping_refuses_is_walked_for_again(way):
    grant = f"mov dword ptr [{ENTRY:#x}], {PLACE | PRESENT | WRITABLE:#x}\n"
    made = run(READ + grant + f"mov dword ptr [{PAGE:#x}], 9", options=WAYS[way], flags=0)
    assert stale(made) == []
    assert made.machine.read(PLACE, 1) == b"\x09"


@each_way
def test_a_write_by_the_host_is_a_change_too(way):
    made = build(READ + "vmcall\n" + READ_AGAIN, options=WAYS[way])
    made.machine.on(Vmcall)(lambda _: made.machine.write(ENTRY, bytes(4)))
    made.run()
    (record,) = stale(made)
    assert (record.writer, record.missing, record.new) == (None, "INVLPG", 0)


# The EPT: changes by the host

each_trapped_way = pytest.mark.parametrize("way", ["audited", "stepped"])


def at_vmcall(act, *, way, uses=READ_AGAIN, before=READ):
    made = build(before + "vmcall\n" + uses, options=WAYS[way])
    made.machine.on(Vmcall)(lambda _: act(made.machine))
    made.run()
    return made


def restrict(machine, access="---"):
    machine.protect(PLACE, 0x1000, Permission.parse(access), invalidate=False)


@each_trapped_way
def test_a_change_of_the_ept_without_invept_is_not_noticed_and_reported(way):
    made = at_vmcall(restrict, way=way)
    (record,) = stale(made)
    assert (record.entry, record.place, record.missing, record.writer) == ("EPT PTE", PLACE, "INVEPT", None)
    assert (record.old & 7, record.new & 7) == (0b011, 0)
    assert record.time == 1
    assert [found.gpa for found in made.violations if found.gpa & -0x1000 == PLACE] == []


INVALIDATIONS = {
    # What the host does after it, and whether the mapping is gone.
    "nothing": (lambda _: None, False),
    "all-context INVEPT": (lambda m: m.invept(), True),
    "single-context INVEPT": (lambda m: m.invept(m.ept.eptp), True),
    "INVEPT of another EPT": (lambda m: m.invept(0x7777000 | 0x1E), False),
    "INVVPID": (lambda m: m.invvpid(1, vpid=1), False),
    "INVVPID of all": (lambda m: m.invvpid(2), False),
    "INVVPID of the address": (lambda m: m.invvpid(0, vpid=1, linear=PAGE), False),
    "protect again": (lambda m: m.protect(PLACE, 0x1000, Permission.NONE), True),
}


@each_trapped_way
@pytest.mark.parametrize("invalidation", INVALIDATIONS)
def test_what_invalidates_a_guest_physical_mapping(invalidation, way):
    act, gone = INVALIDATIONS[invalidation]

    def change(machine):
        restrict(machine)
        act(machine)

    made = at_vmcall(change, way=way)
    assert [record.missing for record in stale(made)] == ([] if gone else ["INVEPT"])
    assert any(found.gpa == PLACE for found in made.violations) == gone


@each_trapped_way
def test_invlpg_does_not_drop_what_is_cached_of_the_ept(way):
    made = at_vmcall(restrict, way=way, uses=f"invlpg [{PAGE:#x}]\n" + READ_AGAIN)
    assert [record.missing for record in stale(made)] == ["INVEPT"]


@each_trapped_way
def test_a_permission_that_nobody_needs_is_not_reported(way):
    made = at_vmcall(lambda machine: restrict(machine, "r--"), way=way)
    assert stale(made) == []
    store = f"mov dword ptr [{PAGE:#x}], 9\n"
    made = at_vmcall(lambda machine: restrict(machine, "r--"), way=way, before=store, uses=READ_AGAIN + store)
    assert [record.access for record in stale(made)] == ["write"]


@each_trapped_way
def test_an_ept_violation_drops_the_mapping_of_its_page_only(way):
    """Both pages lose W; the second of them was never written, so that its write is a violation."""
    second, other = PAGE + 0x5000, PAGE + 0x5000
    dirty = f"mov dword ptr [{PAGE:#x}], 1\n"
    seen = []

    def change(machine):
        machine.protect(PLACE, 0x1000, Permission.NONE, invalidate=False)
        machine.protect(other, 0x1000, Permission.NONE, invalidate=False)

    made = build(dirty + "vmcall\n" + f"mov eax, [{second:#x}]\n" + READ_AGAIN, options=WAYS[way])
    made.machine.on(Vmcall)(lambda _: change(made.machine))
    made.machine.on(EptViolation)(lambda found: seen.append(found.gpa))
    made.run()
    assert second in seen
    assert PLACE not in seen
    assert [record.gpa for record in stale(made)] == [PLACE]


@each_trapped_way
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_the_entry_that_changed_is_named_at_every_level(level, way):
    def change(machine):
        raw = machine.ept.read_entry(DATA, level)
        machine.ept.write_entry(DATA, level, raw & ~0b010)


    made = build(f"mov dword ptr [{DATA:#x}], 1\nvmcall\nmov dword ptr [{DATA:#x}], 2\n", options=WAYS[way])
    made.machine.on(Vmcall)(lambda _: change(made.machine))
    made.machine.observe(lambda record: made.machine.stop() if record.kind == "stale_translation" else None, acts=True)
    made.run()
    record = stale(made)[-1]
    assert record.entry == f"EPT {('PTE', 'PDE', 'PDPTE', 'PML4E')[level - 1]}"
    assert record.old ^ record.new == 0b010


@pytest.mark.parametrize("way", ["audited", "stepped"])
def test_the_trap_hides_no_mistake_of_the_guest(way):
    """The frame becomes code, is patched and read as data meanwhile: flips of permissions drop nothing of a guest."""
    function = f"mov dword ptr [{PLACE:#x}], 0x5b8; mov dword ptr [{PLACE + 4:#x}], 0xc300\n"
    call = f"call {PAGE:#x}\n"
    patch = f"mov byte ptr [{PLACE + 1:#x}], 7\n"
    made = run(function + call + ELSEWHERE + patch + call + "mov edx, eax", options=WAYS[way])
    assert [(record.access, record.missing) for record in stale(made)] == [("fetch", "INVLPG")]
    assert made.machine.register("rdx") == 7
    assert [change.cause for change in made.modifications] == ["store"]


@pytest.mark.parametrize("single_step", [False, True], ids=["free", "stepped"])
@pytest.mark.parametrize("shootdown", [False, True])
def test_every_vcpu_has_mappings_of_its_own(shootdown, single_step):
    """vCPU 1 has read the page; vCPU 0 maps it elsewhere and invalidates on its own processor only."""
    flags, other = DATA + 0x800, CODE + 0x800
    first = (
        _loop("first", flags, 1) + ELSEWHERE + f"invlpg [{PAGE:#x}]\nmov dword ptr [{flags:#x}], 2\n"
        + _loop("second", flags, 3)
    )
    second = PAGING + READ + f"mov dword ptr [{flags:#x}], 1\n" + _loop("third", flags, 2)
    second += (f"invlpg [{PAGE:#x}]\n" if shootdown else "") + READ_AGAIN + f"mov dword ptr [{flags:#x}], 3\nhlt\n"
    made = build(
        first,
        options=RunOptions(tlb="strict", single_step=single_step, seed=5),
        extra={other: second},
        others=[CpuSpec(other, 0, 0, {"rsp": STACK - 0x800})],
    )
    made.run()
    found = [(record.vcpu, record.writer_vcpu, record.missing) for record in stale(made)]
    assert found == ([] if shootdown else [(1, 0, "INVLPG")])


def _loop(label, where, value):
    return f"{label}: cmp dword ptr [{where:#x}], {value}\njne {label}\n"


# The interface


def test_without_the_mode_nothing_is_reported_and_nothing_kept():
    made = run(READ + ELSEWHERE + READ_AGAIN, options=tiny.STRICT)
    assert stale(made) == []
    assert made.machine.tlb is None


@pytest.mark.parametrize(
    "arguments",
    [(4,), (2, 1), (1,), (0, 1), (1, 2), (1, 0), (1, 1, 5)],
    ids=str,
)
def test_invvpid_has_operands_that_fit_its_type(arguments):
    kind, *rest = arguments
    given = dict(zip(("vpid", "linear"), rest, strict=False))
    with pytest.raises(OptionError):
        build("nop").machine.invvpid(kind, **given)


@pytest.mark.parametrize("tlb", ["lax", ""])
def test_a_policy_that_there_is_not(tlb):
    with pytest.raises(OptionError, match="tlb"):
        build("nop", options=evolve(RunOptions(), tlb=tlb))
