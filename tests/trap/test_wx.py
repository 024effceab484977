"""The rules of the W^X policy, one test each: what is refused, what the guest gets for it, and what takes approval."""

from __future__ import annotations

import io
import json

import pytest
import tiny
from tiny import CODE, DATA, END, PAGE, STACK, assemble, map_page
from wx_machine import ACCESS_LENGTH, FIRST, NOP, RET, SPACES, entry_of, run, tables

from vmm.errors import OptionError
from vmm.exits import Cpuid, EptViolation, ExceptionExit, Vmcall
from vmm.guest.loader import load_guest
from vmm.guest.manifest import Policy
from vmm.guest.pagetables import FOUR_LEVEL, PageTables
from vmm.machine import Machine, RunOptions
from vmm.memory.frames import MAX_ALIASES, FrameState
from vmm.outcome import Status, judge
from vmm.recording import record
from vmm.records import FrameEvent, Injection, Modification, RefusedAccess
from vmm.trace.console import Entry
from vmm.trace.names import Names
from vmm.trace.rendering import line_of

TARGET, VIEW, OTHER = 0x20000, 0x4000_0000, 0x21000
FUNCTION = bytes.fromhex("b001c3")  # mov al, 1; ret
#: Code that may be executed and no more.
CODE_ONLY = map_page(CODE, CODE, "rx")
WRITE_PRESENT, FETCH_PRESENT, USER = 3, 0x11, 4

WAYS = {
    "freely": {"check": True, "audit": True},
    "one block": {"check": True, "capacity": 1},
    "stepped": {"check": True, "single_step": True},
}
each_way = pytest.mark.parametrize("way", WAYS)


def build(source, maps=(), *, way="freely", wx="fault", parts=(), policy=None, **rest):
    every = {CODE: source, TARGET: FUNCTION, **dict(parts)}
    options = RunOptions(wx=wx, **WAYS[way])
    return tiny.build(every, maps=(CODE_ONLY, *maps), options=options, policy=policy, **rest)


def faults(made):
    """(vector, error code, CR2) of the exceptions."""
    return [(record.vector, record.error_code, record.address) for record in made.of(ExceptionExit)]


def refused(made):
    (record,) = made.of(RefusedAccess)
    return record


@each_way
class TestMapping:
    """The guest's own page tables make a frame writable and executable."""

    def test_a_store_through_a_page_that_is_both(self, way):
        made = build(f"mov byte ptr [{TARGET}], 2", [map_page(TARGET, TARGET, "rwx")], way=way)
        made.run()
        assert faults(made) == [(14, WRITE_PRESENT, TARGET)]
        assert refused(made) == RefusedAccess("mapping", "write", TARGET, TARGET, CODE, (TARGET,), (TARGET,))
        assert made.machine.read(TARGET, 3) == FUNCTION

    def test_a_fetch_from_a_page_that_is_both(self, way):
        made = build(f"mov eax, {TARGET}; call rax", [map_page(TARGET, TARGET, "rwx")], way=way)
        made.run()
        assert faults(made) == [(14, FETCH_PRESENT, TARGET)]
        assert refused(made) == RefusedAccess("mapping", "fetch", TARGET, TARGET, TARGET, (TARGET,), (TARGET,))

    def test_a_store_to_a_page_of_data_that_could_be_executed(self, way):
        made = build(f"mov qword ptr [{OTHER + 8}], rax", [map_page(OTHER, OTHER, "rwx")], way=way)
        made.run()
        assert refused(made).gpa == OTHER + 8

    def test_a_store_through_one_alias_of_what_runs_through_another(self, way):
        maps = [map_page(TARGET, TARGET, "rx"), map_page(VIEW, TARGET, "rw")]
        made = build(f"mov eax, {TARGET}; call rax; mov ecx, {VIEW}; mov byte ptr [rcx + 1], 2", maps, way=way)
        made.run()
        record = refused(made)
        assert (record.gpa, record.gva) == (TARGET + 1, VIEW + 1)
        assert (record.writable, record.executable) == ((VIEW + 1,), (TARGET + 1,))
        assert faults(made) == [(14, WRITE_PRESENT, VIEW + 1)]

    def test_a_read_modify_write_is_a_store(self, way):
        maps = [map_page(TARGET, TARGET, "rx"), map_page(VIEW, TARGET, "rw")]
        made = build(f"mov eax, {TARGET}; call rax; mov ecx, {VIEW}; inc dword ptr [rcx]", maps, way=way)
        made.run()
        assert faults(made) == [(14, WRITE_PRESENT, VIEW)]
        assert made.machine.read(TARGET, 3) == FUNCTION

    def test_a_mapping_that_nobody_uses_is_not_seen(self, way):
        maps = [map_page(TARGET, TARGET, "rx"), map_page(VIEW, TARGET, "rw")]
        code = f"mov ecx, {VIEW}; mov al, byte ptr [rcx]; mov eax, {TARGET}; call rax\n{END}"
        assert build(code, maps, way=way).run().detail["value"] == 1

    def test_user_code_gets_a_user_fault(self, way):
        maps = [map_page(TARGET, TARGET, "rwx"), map_page(CODE, CODE, "rx")]
        for code, wanted in (
            (f"mov byte ptr [{TARGET}], 2", WRITE_PRESENT | USER),
            (f"mov eax, {TARGET}; jmp rax", FETCH_PRESENT | USER),
        ):
            made = build(code, maps, way=way, cpl=3)
            made.run()
            assert faults(made)[0] == (14, wanted, TARGET)

    def test_a_store_that_only_a_clear_wp_allows(self, way):
        maps = [map_page(TARGET, TARGET, "rx")]
        code = f"mov rax, cr0; btr rax, 16; mov cr0, rax; mov byte ptr [{TARGET}], 2"
        made = build(code, maps, way=way)
        made.run()
        record = refused(made)
        assert (record.rule, record.access) == ("mapping", "write")
        assert (record.writable, record.executable) == ((TARGET,), (TARGET,))
        assert made.machine.read(TARGET, 3) == FUNCTION

    def test_a_store_over_two_pages_of_which_one_is_both(self, way):
        maps = [map_page(TARGET, TARGET, "rw"), map_page(OTHER, OTHER, "rwx")]
        made = build(f"mov qword ptr [{OTHER - 4}], rax", maps, way=way, registers={"rax": 0x1122334455667788})
        made.run()
        assert faults(made) == [(14, WRITE_PRESENT, OTHER)]
        assert made.machine.read(OTHER - 4, 8) == bytes(8)

    @pytest.mark.parametrize("before", ["", f"mov eax, {CODE}; mov al, byte ptr [eax];"])
    def test_everything_once_paging_is_off(self, before, way):
        made = build(f"{before} mov eax, cr0; btr eax, 31; mov cr0, eax; nop", way=way, mode="protected", wx="stop")
        assert made.run().reason == "W^X violation"
        record = refused(made)
        assert (record.rule, record.access, record.gva & -PAGE) == ("mapping", "fetch", CODE)

    def test_in_pae_paging(self, way):
        maps = [map_page(TARGET, TARGET, "rx"), map_page(VIEW, TARGET, "rw")]
        code = f"mov eax, {TARGET}; call eax; mov byte ptr [{VIEW}], 2"
        made = build(code, maps, way=way, mode="protected")
        made.run()
        assert (refused(made).writable, refused(made).executable) == ((VIEW,), (TARGET,))


@each_way
class TestApproval:
    """Nothing is fetched from a frame that was written and not approved since."""

    def test_what_is_loaded_as_code_is_approved_also_where_code_is_what_is_fetched(self, way):
        for code in ("load", "fetch"):
            maps = [map_page(TARGET, TARGET, "rx")]
            made = build(f"mov eax, {TARGET}; call rax\n{END}", maps, way=way, policy=Policy(code=code))
            assert made.run().detail["value"] == 1

    def test_what_is_loaded_as_data_is_not(self, way):
        made = build(f"mov eax, {TARGET}; call rax", [map_page(TARGET, TARGET, "rx")], way=way, code=[CODE])
        made.run()
        assert refused(made) == RefusedAccess("approval", "fetch", TARGET, TARGET, TARGET, (), (TARGET,))
        assert faults(made) == [(14, FETCH_PRESENT, TARGET)]

    def test_a_fetch_error_code_says_so_only_where_there_is_nx(self, way):
        # EFER.NXE clear: the page is both, and bit 4 of the error code is reserved (SDM vol. 3, 4.7).
        code = f"mov ecx, 0xc0000080; rdmsr; btr eax, 11; wrmsr; mov eax, {OTHER}; jmp rax"
        made = build(code, [map_page(OTHER, OTHER, "rx")], way=way)
        made.run()
        assert faults(made)[0] == (14, 1, OTHER)

    def test_written_by_the_host(self, way):
        made = build(f"cpuid; mov eax, {TARGET}; call rax", [map_page(TARGET, TARGET, "rx")], way=way)
        made.machine.on(Cpuid)(lambda _exit: made.machine.write(TARGET + 1, b"\x02"))
        made.run()
        assert refused(made).rule == "approval"
        assert [record.cause for record in made.modifications] == ["host"]

    def test_written_by_the_host_and_approved(self, way):
        made = build(f"cpuid; mov eax, {TARGET}; call rax\n{END}", [map_page(TARGET, TARGET, "rx")], way=way)

        @made.machine.on(Cpuid)
        def patch(_exit):
            made.machine.write(TARGET + 1, b"\x02")
            made.machine.approve(TARGET, PAGE)

        assert made.run().detail["value"] == 2

    def test_written_by_event_delivery(self, way):
        """The stack is moved into a page of code that is not mapped executable; an INT3 pushes there."""
        handler = CODE + 0x800
        gate = (handler & 0xFFFF).to_bytes(2, "little") + b"\x08\0\0\x8e" + (handler >> 16).to_bytes(2, "little")
        code = f"mov esp, {TARGET + PAGE}; int3"
        parts = {DATA: bytes(48) + gate + bytes(8), handler: f"mov al, 7\n{END}"}
        maps = [map_page(TARGET, TARGET, "rw")]
        made = build(code, maps, way=way, parts=parts, idt=DATA, code=[CODE, TARGET, handler])
        assert made.run().detail["value"] == 7
        assert made.of(RefusedAccess) == []
        assert made.machine.frames.at(TARGET).state is FrameState.DATA  # a window, until the run had ended
        assert [record.cause for record in made.modifications] == ["event delivery"]

    def test_a_store_that_the_page_tables_allow_makes_a_window(self, way):
        made = build(f"mov byte ptr [{TARGET + 1}], 2\n{END}", [map_page(TARGET, TARGET, "rw")], way=way)
        made.run()
        assert [(r.before, r.after) for r in made.frame_events if r.gpa == TARGET] == [
            ("code", "window"),
            ("window", "data"),
        ]
        (record,) = made.modifications
        assert (record.cause, record.old, record.new) == ("window", b"\x01", b"\x02")

    def test_a_block_that_runs_over_into_a_page_is_not_yet_a_fetch_from_it(self, way):
        """The engine translates the next page's code before the run is ended by the instruction in front of it."""
        start = OTHER - 4
        parts = {start: assemble(f"mov al, 5\n{END}", start), OTHER: b"\x90\xc3"}
        maps = [map_page(TARGET, TARGET, "rx", pages=2)]
        made = build(f"mov ecx, {start}; jmp rcx", maps, way=way, parts=parts, code=[CODE, start])
        assert made.run().detail["value"] == 5
        assert made.of(RefusedAccess) == []


class TestTurns:
    """A frame goes round: written, approved, executed, written again."""

    def test_a_jit_that_flips_its_page_is_let_through(self):
        write = [("map", 0, 0, 0, "w"), ("store", 0, NOP)]
        execute = [("approve", 0), ("map", 0, 0, 0, "x"), ("call", 0)]
        done, made = run([*write, *execute, *write, *execute], RunOptions(check=True))
        assert set(done) == {"done"}
        assert [r.cause for r in made.of(FrameEvent) if r.gpa == FIRST] == ["store", "approve"] * 2
        assert [r.cause for r in made.of(Modification)] == ["window"]  # the second time nothing changed

    def test_an_alias_in_another_address_space_counts(self):
        sequence = [
            *(("map", 1, 2, 0, "w"), ("switch", 1), ("store", 2, NOP), ("switch", 0)),
            *(("map", 0, 1, 0, "x"), ("approve", 0), ("call", 1)),
        ]
        done, made = run(sequence, RunOptions(check=True))
        assert done[-1] == "mapping"
        assert refused(made).writable == (0x102000,)

    def test_taking_the_approval_away_takes_translations_away(self):
        done, _ = run([("map", 0, 1, 0, "x"), ("call", 1), ("write", 0), ("call", 1)], RunOptions(check=True))
        assert done == ["done", "done", "done", "approval"]

    def test_a_page_table_in_a_page_of_code(self):
        """A walk that sets a flag writes to the frame, which is not approved any more."""
        made, table = with_tables_in_code()
        made.run()
        assert [record.cause for record in made.modifications] == ["page walk"]
        states = [(r.after, r.cause) for r in made.frame_events if r.gpa == table]
        assert ("window", "page walk") in states


def with_tables_in_code():
    """A guest whose page tables count as code, and where the last one is: its entry of DATA is not accessed yet."""
    base = 0x60000
    tables = PageTables(base, FOUR_LEVEL)
    for page, access in ((CODE, "rx"), (DATA, "rw"), (STACK - PAGE, "rw")):
        tables.map(map_page(page, page, access))
    data, last = bytearray(tables.to_bytes()), 3 * PAGE
    data[last + (DATA >> 12) * 8] &= ~0x20
    parts = {CODE: f"mov al, [{DATA}]; mov al, 1\n{END}", base: bytes(data)}
    options = RunOptions(check=True, wx="fault")
    return tiny.build(parts, paging=False, registers={"cr3": base}, options=options), base + last


class TestDelivery:
    """Event delivery stores like the guest."""

    def push_to(self, access, wx):
        handler = CODE + 0x800
        gate = (handler & 0xFFFF).to_bytes(2, "little") + b"\x08\0\0\x8e" + (handler >> 16).to_bytes(2, "little")
        parts = {DATA: bytes(48) + gate + bytes(8), handler: f"mov al, 7\n{END}"}
        maps = [map_page(OTHER, OTHER, access)]
        return build(f"mov esp, {OTHER + PAGE}; int3", maps, wx=wx, parts=parts, idt=DATA, code=[CODE, handler])

    def test_a_stack_that_is_executable_is_refused(self):
        made = self.push_to("rwx", "fault")
        assert made.run().reason == "triple fault"  # no handler for the #PF that comes of the push
        assert {(r.rule, r.access) for r in made.of(RefusedAccess)} == {("mapping", "write")}
        assert made.machine.register("cr2") == refused_first(made).gva
        assert made.machine.read(OTHER, PAGE) == bytes(PAGE)
        assert made.of(Injection) == []

    def test_and_may_end_the_run(self):
        made = self.push_to("rwx", "stop")
        end = made.run()
        assert (end.reason, end.detail["rule"], end.detail["access"]) == ("W^X violation", "mapping", "write")
        assert len(made.of(RefusedAccess)) == 1

    def test_one_that_is_not_is_let_through(self):
        assert self.push_to("rw", "fault").run().detail["value"] == 7


def refused_first(made):
    return made.of(RefusedAccess)[0]


class TestStop:
    @each_way
    def test_the_run_ends(self, way):
        made = build(f"mov byte ptr [{TARGET}], 2\n{END}", [map_page(TARGET, TARGET, "rwx")], way=way, wx="stop")
        end = made.run()
        assert end.reason == "W^X violation"
        assert end.detail == {"rule": "mapping", "access": "write", "gpa": TARGET, "gva": TARGET}
        assert faults(made) == []
        assert made.machine.read(TARGET, 3) == FUNCTION
        outcome = judge(made.machine.guest.manifest, end)
        assert outcome.status is Status.WRONG
        assert "a write at 0x20000 that the W^X policy refuses (rule mapping)" in outcome.complaint

    @each_way
    def test_before_a_hlt_that_may_not_be_fetched(self, way):
        made = build(f"mov eax, {OTHER}; jmp rax", [map_page(OTHER, OTHER, "rx")], way=way, wx="stop", parts={})
        made.machine.memory.write(OTHER, b"\xf4")
        assert made.run().reason == "W^X violation"
        assert made.records[-1].rip == OTHER
        assert not [record for record in made.exits if type(record).__name__ == "Hlt"]


class TestTracking:
    def aliases(self, count):
        """A page that is written through so many pages, one after the other."""
        maps = [map_page(VIEW + i * PAGE, OTHER, "rw") for i in range(count)]
        code = f"""
            mov rbx, {VIEW}
            mov ecx, {count}
            again: mov byte ptr [rbx], cl
            add rbx, {PAGE}
            dec ecx
            jnz again
            mov al, 9
            {END}
        """
        return build(code, maps)

    def test_as_many_as_are_tracked(self):
        assert self.aliases(MAX_ALIASES).run().detail["value"] == 9

    def test_one_more(self):
        made = self.aliases(MAX_ALIASES + 1)
        made.run()
        assert (refused(made).rule, refused(made).gva) == ("tracking", VIEW + MAX_ALIASES * PAGE)

    def test_aliases_that_lead_elsewhere_make_room(self):
        """Many more than are tracked, one at a time; what is remembered of them is bounded."""
        space = tables()
        first, count, entry = 0x100000, 200, FIRST | 3
        code = f"""
            mov esi, {first}
            mov edi, {entry_of(0, first, space)}
            mov ecx, {count}
            again:
            mov rax, {1 << 63 | entry}
            mov qword ptr [rdi], rax
            invlpg [rsi]
            mov byte ptr [rsi], cl
            mov qword ptr [rdi], 0
            invlpg [rsi]
            add rdi, 8
            add rsi, {PAGE}
            dec ecx
            jnz again
            mov al, 9
            {END}
        """
        made = tiny.build(
            {CODE: code, **space},
            paging=False,
            code=(CODE,),
            registers={"cr3": SPACES[0]},
            options=RunOptions(check=True, wx="fault"),
        )
        assert made.run().detail["value"] == 9
        frame = made.machine.frames.at(FIRST)
        assert made.machine.read(FIRST, 1) == b"\x01"
        assert len(frame.uses.used) <= MAX_ALIASES
        assert len(frame.uses.judged) <= 2 * MAX_ALIASES


class TestHost:
    def test_without_a_policy_there_is_nothing_to_approve(self):
        with pytest.raises(OptionError, match="no W\\^X policy"):
            tiny.build(END).machine.approve(CODE, PAGE)

    def test_approval_needs_memory(self):
        with pytest.raises(OptionError, match="no memory"):
            build(END).machine.approve(tiny.MEMORY, PAGE)

    def test_what_is_approved_already_stays_as_it_is(self):
        made = build(END)
        made.machine.approve(CODE, PAGE)
        assert made.frame_events == []

    def test_only_approved_frames_can_be_made_executable(self):
        from vmm.ept import Permission

        machine = build(END).machine
        with pytest.raises(OptionError, match="not approved; approve it first"):
            machine.protect(OTHER, PAGE, Permission.X)
        machine.approve(OTHER, PAGE)
        machine.protect(OTHER, PAGE, Permission.R | Permission.X)

    def test_a_word_that_is_no_policy(self):
        with pytest.raises(OptionError, match="choose one of off, fault, stop"):
            build(END, wx="yes")

    @pytest.mark.parametrize("mode", ["protected", "real"])
    def test_a_guest_without_page_tables_has_no_policy(self, mode):
        with pytest.raises(OptionError, match="without page tables"):
            tiny.build(END, mode=mode, paging=False, options=RunOptions(wx="stop"))

    def test_an_option_wins_over_the_manifest_and_is_what_a_trace_says(self):
        guest, trace = load_guest("alias-patch"), io.BytesIO()
        machine = Machine(guest, RunOptions(wx="stop"))
        sink = record(machine, trace)
        assert machine.run().reason == "W^X violation"
        sink.flush()
        assert json.loads(trace.getvalue().partition(b"\n")[0])["policy"]["wx"] == "stop"
        assert Machine(guest).run().reason == "port"

    def test_a_handler_may_approve_at_a_call(self):
        made = build(f"mov byte ptr [{VIEW + 1}], 3; vmcall\n{END}", [map_page(VIEW, TARGET, "rw")])
        made.machine.on(Vmcall)(lambda _call: made.machine.approve(TARGET, 1))
        made.run()
        assert made.machine.frames.at(TARGET).state is FrameState.CODE


class TestWords:
    """What the console view says."""

    NAMES = Names(load_guest("alias-patch"))

    def say(self, *fields):
        return line_of(Entry(1, RefusedAccess(*fields), 1), self.NAMES).what

    def test_mapping(self):
        what = self.say("mapping", "write", 0x5010, 0x7F0010, 0x10000, (0x7F0010,), (0x401010, 0x402010))
        assert what == (
            "frame 0x5000 is executable at 0x401010, 0x402010 and writable at 0x7f0010; "
            "the store at 0x7f0010 is refused"
        )

    def test_many(self):
        what = self.say("mapping", "fetch", 0x5000, 0x1000, 0x1000, tuple(range(0x2000, 0x8000, 0x1000)), (0x1000,))
        assert "writable at 0x2000, 0x3000, 0x4000, 0x5000 and 2 more; the fetch at 0x1000 is refused" in what

    def test_approval(self):
        what = self.say("approval", "fetch", 0x5000, 0x5000, 0x5000)
        assert what == "frame 0x5000 is written and not approved; the fetch at 0x5000 is refused"

    def test_seal(self):
        assert self.say("seal", "write", 0x5008, None, 0x10000) == "frame 0x5000 is sealed; the store is refused"

    def test_the_violation_comes_before_the_refusal_and_that_before_the_fault(self):
        made = build(f"mov byte ptr [{TARGET}], 2", [map_page(TARGET, TARGET, "rwx")])
        made.run()
        kinds = [type(r) for r in made.of(EptViolation, RefusedAccess, ExceptionExit)]
        assert kinds == [EptViolation, RefusedAccess, ExceptionExit]


assert ACCESS_LENGTH == len(assemble("mov byte ptr [rsi], cl")) == len(assemble("xchg byte ptr [rsi], cl"))
assert assemble("ret") == bytes([RET])
