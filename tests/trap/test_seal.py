"""Sealed code never changes: whoever comes, through whichever alias, in whichever way of running."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import tiny
from hypothesis import given, settings
from tiny import CODE, DATA, END, PAGE, STACK, map_page

from vmm.ept import Permission
from vmm.errors import OptionError
from vmm.exits import Cpuid, ExceptionExit
from vmm.guest.manifest import Policy
from vmm.guest.pagetables import FOUR_LEVEL, PageTables
from vmm.machine import RunOptions
from vmm.memory.frames import FrameState
from vmm.records import FrameEvent, RefusedAccess

SEALED, VIEW, BEHIND = 0x20000, 0x4000_0000, 0x21000
MAPS = (map_page(SEALED, SEALED), map_page(VIEW, SEALED, "rw"), map_page(BEHIND, BEHIND, "rw"))
#: Where the VMM keeps GDT and TSS of a guest with page tables of its own.
DESCRIPTORS = 0x200000
FUNCTION = bytes.fromhex("b001c3")

WAYS = {
    "freely": {"check": True, "audit": True},
    "one block": {"check": True, "capacity": 1},
    "stepped": {"check": True, "single_step": True},
}
each_way = pytest.mark.parametrize("way", WAYS)

#: Instructions that write to the page in RBX; RSP points behind its first 64 bytes.
STORES = {
    "mov": "mov dword ptr [rbx], eax",
    "inc": "inc dword ptr [rbx]",
    "lock": "lock add qword ptr [rbx], rcx",
    "xchg": "xchg dword ptr [rbx], eax",
    "cmpxchg": "cmpxchg dword ptr [rbx], ecx",
    "cmpxchg16b": "cmpxchg16b xmmword ptr [rbx]",
    "the same bytes": "mov byte ptr [rbx], 0xb0",
    "stosb": "mov rdi, rbx; rep stosb",
    "movsb": "mov rdi, rbx; lea rsi, [rbx + 1]; movsb",
    "push": "push rax",
    "call": "call rax",
    "enter": "enter 16, 0",
    "movups": "movups xmmword ptr [rbx], xmm0",
    "fxsave": "fxsave [rbx]",
    "fstp": "fldz; fstp tbyte ptr [rbx]",
    "setc": "setc byte ptr [rbx]",
    "over the end": "mov qword ptr [rbx + 0xffc], rax",
    "over the start": "mov edx, 0x20fff; mov qword ptr [rdx], rax",
}


def build(source, *, way="freely", policy=None, wx="off", parts=(), maps=MAPS, **rest):
    every = {CODE: source, SEALED: FUNCTION, **dict(parts)}
    options = RunOptions(wx=wx, **WAYS[way])
    policy = policy or Policy(code="load")
    made = tiny.build(every, maps=(map_page(CODE, CODE, "rx"), *maps), options=options, policy=policy, **rest)
    made.machine.seal(SEALED, PAGE)
    return made


def refusals(made):
    return [(record.rule, record.access) for record in made.of(RefusedAccess)]


class TestStores:
    @each_way
    @pytest.mark.parametrize("reads", ["step", "grant"])
    @pytest.mark.parametrize("writes", ["step", "window"])
    @pytest.mark.parametrize("name", STORES)
    def test_every_kind_of_store_gets_a_general_protection_fault(self, name, writes, reads, way):
        source = f"mov ecx, 4; mov ebx, {VIEW}; mov rsp, {VIEW + 64}; {STORES[name]}"
        made = build(source, way=way, policy=Policy(reads, writes, "load"))
        before = made.machine.read(SEALED, PAGE)
        made.run()
        first = made.of(ExceptionExit)[0]
        assert (first.vector, first.error_code) == (13, 0)
        assert refusals(made)[0] == ("seal", "write")
        assert made.of(RefusedAccess)[0].gpa & -PAGE == SEALED
        assert made.machine.read(SEALED, PAGE) == before
        assert made.modifications == []

    @each_way
    def test_it_runs_and_can_be_read(self, way):
        source = f"mov eax, {SEALED}; call rax; mov ebx, {VIEW}; add al, byte ptr [rbx + 1]\n{END}"
        assert build(source, way=way).run().detail["value"] == 2

    def test_a_seal_comes_before_w_xor_x(self):
        made = build(f"mov ebx, {VIEW}; mov byte ptr [rbx], 1", wx="fault")
        made.run()
        assert refusals(made)[0] == ("seal", "write")
        assert made.of(ExceptionExit)[0].vector == 13

    def test_a_window_is_closed_by_a_seal(self):
        source = f"mov ebx, {VIEW}; mov byte ptr [rbx + 1], 5; cpuid; mov ebx, {VIEW}; mov byte ptr [rbx + 1], 6"
        made = tiny.build({CODE: source, SEALED: FUNCTION}, maps=MAPS, policy=Policy(writes="window", code="load"))
        made.machine.on(Cpuid)(lambda _exit: made.machine.seal(SEALED, PAGE))
        made.run()
        assert [(r.before, r.after) for r in made.frame_events if r.gpa == SEALED] == [
            ("code", "window"),
            ("window", "sealed"),
        ]
        assert [record.new for record in made.modifications] == [b"\x05"]
        assert made.machine.read(SEALED + 1, 1) == b"\x05"

    def test_an_instruction_under_way_is_completed(self):
        """A device seals the page that its value is going to be stored in."""
        made = tiny.build(f"mov edi, {DATA}; mov edx, 0x100; insb; mov byte ptr [{DATA}], 1", maps=MAPS)

        class Sealing:
            exact = True

            def read(self, port: int, size: int) -> int:
                made.machine.seal(DATA, PAGE)
                return 0x5A

            def write(self, port: int, size: int, value: int) -> None:
                raise AssertionError

        made.machine.ports.attach(Sealing(), 0x100)
        made.run()
        assert made.machine.read(DATA, 1) == b"\x5a"
        assert refusals(made)[0] == ("seal", "write")


class TestFromTheStart:
    def test_code_of_the_image_is_sealed(self):
        source = f"mov byte ptr [{DATA}], 1; mov ebx, {VIEW}; mov byte ptr [rbx], 1"
        made = tiny.build({CODE: source, SEALED: FUNCTION, DATA: b"\0"}, maps=MAPS, code=(CODE, SEALED),
                          policy=Policy(code="seal"))  # fmt: skip
        states = {gpa: made.machine.frames.at(gpa).state for gpa in (CODE, SEALED, DATA)}
        assert states == {CODE: FrameState.SEALED, SEALED: FrameState.SEALED, DATA: FrameState.DATA}
        made.run()
        assert refusals(made)[0] == ("seal", "write")
        assert made.machine.read(DATA, 1) == b"\x01"
        assert made.machine.read(SEALED, 3) == FUNCTION

    @each_way
    def test_it_runs(self, way):
        made = build(f"mov eax, {SEALED}; call rax\n{END}", way=way, policy=Policy(code="seal"))
        assert made.run().detail["value"] == 1
        assert not [r for r in made.of(FrameEvent) if r.after == "code"]


class TestDelivery:
    @each_way
    def test_a_stack_in_sealed_code(self, way):
        """What an event would push there is a store: #GP, whose own frame cannot be pushed, and so on."""
        handler = CODE + 0x800
        gate = (handler & 0xFFFF).to_bytes(2, "little") + b"\x08\0\0\x8e" + (handler >> 16).to_bytes(2, "little")
        parts = {DATA: bytes(48) + gate + bytes(8), handler: f"mov al, 7\n{END}"}
        made = build(f"mov rsp, {VIEW + 0x100}; int3", way=way, parts=parts, idt=DATA, code=(CODE, SEALED, handler))
        before = made.machine.read(SEALED, PAGE)
        assert made.run().reason == "triple fault"
        assert refusals(made)[0] == ("seal", "write")
        assert made.of(RefusedAccess)[0].gva == VIEW + 0x100 - 40
        assert made.machine.read(SEALED, PAGE) == before
        assert made.modifications == []


class TestPageWalks:
    """The accessed or dirty flag of an entry in a sealed frame cannot be set."""

    def build(self, access, *, wx="off"):
        base = 0x60000
        tables = PageTables(base, FOUR_LEVEL)
        for page, rights in ((CODE, "rx"), (DATA, "rw"), (STACK - PAGE, "rw"), (DESCRIPTORS, "rw")):
            tables.map(map_page(page, page, rights))
        data, entry = bytearray(tables.to_bytes()), 3 * PAGE + (DATA >> 12) * 8
        data[entry] &= ~(0x20 if access == "read" else 0x40)
        what = f"mov al, byte ptr [{DATA}]" if access == "read" else f"mov byte ptr [{DATA}], al"
        made = tiny.build({CODE: what, base: bytes(data)}, paging=False, code=(CODE,), registers={"cr3": base},
                          options=RunOptions(check=True, wx=wx))  # fmt: skip
        made.machine.seal(base + 3 * PAGE, PAGE)
        return made, base + entry

    @pytest.mark.parametrize("wx", ["off", "fault"])
    @pytest.mark.parametrize("access", ["read", "write"])
    def test_by_an_access_of_the_guest(self, access, wx):
        made, entry = self.build(access, wx=wx)
        before = made.machine.read(entry & -PAGE, PAGE)
        made.run()
        first = made.of(ExceptionExit)[0]
        assert (first.vector, first.error_code) == (13, 0)
        record = made.of(RefusedAccess)[0]
        assert (record.rule, record.access, record.gpa, record.gva) == ("seal", "write", entry, None)
        assert made.machine.read(entry & -PAGE, PAGE) == before

    def test_by_event_delivery(self):
        made, entry = self.build("write")
        made.machine.vcpu.context.rsp = DATA + PAGE
        made.machine.interrupt(0x30)
        made.machine.vcpu.context.rflags |= 0x200
        made.machine.vcpu.context.idtr = (STACK - PAGE, 0xFFF)
        handler = (CODE & 0xFFFF).to_bytes(2, "little") + b"\x08\0\0\x8e" + (CODE >> 16).to_bytes(2, "little")
        made.machine.write(STACK - PAGE + 0x300, handler)
        before = made.machine.read(entry & -PAGE, PAGE)
        assert made.run().reason == "triple fault"
        assert ("seal", "write") in refusals(made)
        assert made.machine.read(entry & -PAGE, PAGE) == before


class TestHost:
    def test_a_write(self):
        made = build(END)
        with pytest.raises(OptionError, match="0x20000 is sealed"):
            made.machine.write(SEALED - 2, b"\0\0\0\0")
        assert made.machine.read(SEALED - 2, 5) == b"\0\0" + FUNCTION

    def test_a_gpa_that_leads_there_stays(self):
        made = build(END)
        with pytest.raises(OptionError, match="alias: GPA 0x20000 is sealed; sealed code stays where it is"):
            made.machine.alias(SEALED - PAGE, DATA, 2 * PAGE)
        assert made.machine.control.host_of(SEALED - PAGE) == SEALED - PAGE  # all or nothing
        assert made.machine.read(SEALED, 3) == FUNCTION

    def test_one_more_gpa_may_lead_there(self):
        made = build(END)
        made.machine.alias(0x80000, SEALED, PAGE)
        assert made.machine.ept.entry(0x80000).permissions == Permission.X
        with pytest.raises(OptionError, match="0x80000 is sealed"):
            made.machine.write(0x80000, b"\0")

    def test_approval_changes_nothing(self):
        made = build(END, wx="stop")
        made.machine.approve(SEALED, PAGE)
        assert made.machine.frames.at(SEALED).state is FrameState.SEALED


gpas = st.sampled_from([SEALED - PAGE, SEALED, BEHIND, 0x80000, 0x81000, 0x40_0000])
accesses = st.sampled_from([Permission(bits) for bits in range(8) if bits & 3 != Permission.W])
operations = st.one_of(
    st.tuples(st.just("write"), gpas, st.integers(-8, 8), st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("alias"), gpas, gpas, st.sampled_from([PAGE, 2 * PAGE])),
    st.tuples(st.just("protect"), gpas, st.sampled_from([PAGE, 2 * PAGE]), accesses),
    st.tuples(st.just("approve"), gpas, st.just(PAGE)),
    st.tuples(st.just("seal"), gpas, st.just(PAGE)),
)


@given(st.lists(operations, max_size=12), st.sampled_from(["off", "fault"]))
@settings(max_examples=60, deadline=None)
def test_no_sequence_of_host_operations_changes_a_sealed_byte_or_moves_it(sequence, wx):
    made = build(END, wx=wx)
    machine = made.machine
    sealed = {SEALED: (SEALED, machine.read(SEALED, PAGE))}
    for kind, gpa, *rest in sequence:
        try:
            if kind == "write":
                machine.write(gpa + rest[0], rest[1])
            else:
                getattr(machine, kind)(gpa, *rest)
        except OptionError:
            pass
        else:
            if kind == "seal":
                sealed[gpa] = machine.control.host_of(gpa), machine.read(gpa, PAGE)
        for where, (host, content) in sealed.items():
            assert machine.control.host_of(where) == host
            assert machine.memory.read(host, PAGE) == content
            assert not machine.ept.entry(where).permissions & Permission.W
        machine.verify()
    machine.close()
