"""The rules that hold after every transition, one test each, and the auditor that watches over one of them.

Each test that a rule *can* be broken breaks the VMM on purpose, to show that the checks see it.
"""

from __future__ import annotations

import pytest
import tiny
from tiny import CODE, PAGE, STRICT, map_page

from vmm.ept import Permission
from vmm.errors import AuditError, InvariantError, OptionError
from vmm.exits import Cpuid, EptViolation, ExceptionExit, Mtf
from vmm.guest.manifest import Policy
from vmm.machine import RunOptions
from vmm.memory.frames import FrameState
from vmm.records import FrameEvent, Modification

TARGET, VIEW, FRAME = 0x20000, 0x4000_0000, 0x20000
MAPS = (map_page(TARGET, FRAME), map_page(VIEW, FRAME, "rw"))
FUNCTION = bytes.fromhex("b001c3")  # mov al, 1; ret
ROUNDS = 5

#: Patches the function through the view and calls it, a few times; ends with the last result.
PATCHES = f"""
    mov ecx, 1
again:
    mov ebx, {VIEW + 1}
    mov byte ptr [rbx], cl
    mov ebx, {TARGET}
    call rbx
    add r15b, al
    inc ecx
    cmp ecx, {ROUNDS}
    jbe again
    mov al, r15b
    {tiny.END}
"""
RIGHT = sum(range(1, ROUNDS + 1))
POLICIES = [
    Policy(reads, writes, code)
    for reads in ("step", "grant", "adaptive")
    for writes in ("step", "window", "adaptive", "attribute")
    for code in ("load", "fetch")
]


def build(options: RunOptions = STRICT, code: str = PATCHES, **rest):
    return tiny.build({CODE: code, FRAME: FUNCTION}, maps=MAPS, options=options, **rest)


def everywhere(machine):
    """{host page: what all its GPAs together allow}, from the table itself."""
    together: dict[int, int] = {}
    for gpa in range(0, tiny.MEMORY, PAGE):
        entry = machine.ept.entry(gpa)
        together[entry.address] = together.get(entry.address, 0) | entry.permissions
    return together


class TestRule1NeverWritableAndExecutable:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_at_any_moment_that_a_run_reports(self, policy):
        made = build(policy=policy)
        made.machine.alias(0x80000, FRAME, PAGE)

        def look(_record):
            assert not [page for page, allowed in everywhere(made.machine).items() if allowed & 6 == 6]

        made.machine.observe(look)
        assert made.run().detail["value"] == RIGHT

    def test_the_check_sees_it(self):
        made = build()
        made.machine.alias(0x80000, FRAME, PAGE)
        made.machine.ept.protect(0x80000, Permission.R | Permission.W)
        with pytest.raises(InvariantError, match="writable and executable"):
            made.machine.verify()

    def test_the_engines_are_never_given_both(self, monkeypatch):
        """What the fills answer, page by page, on both engines."""
        made = build()
        given = []
        for engine in (made.machine.vcpu.free, made.machine.vcpu.stepping):
            monkeypatch.setattr(engine, "fill", listening(engine.fill, given.append))
        made.run()
        assert len(given) > 10
        assert not [answer for answer in given if answer & 2 and answer & 4]


def listening(fill, hear):
    """A fill callback whose answers are heard."""

    def answer(page, access):
        given = fill(page, access)
        hear(given)
        return given

    return answer


class TestRule2NoWritableFrameWithLiveBlocks:
    def test_the_free_running_engine_is_never_given_one(self, monkeypatch):
        made = build(policy=Policy(writes="adaptive"))
        machine, seen = made.machine, []

        def check(answer):
            if answer & 2:
                seen.append(answer & -PAGE)
                assert not machine.blocks.overlapping(answer & -PAGE, PAGE)

        monkeypatch.setattr(machine.vcpu.free, "fill", listening(machine.vcpu.free.fill, check))
        made.run()
        assert seen

    def test_the_check_sees_it(self):
        made = build()
        made.run()
        made.machine.ept.protect(FRAME, Permission.R | Permission.W)
        with pytest.raises(InvariantError, match="writable with 1 live block"):
            made.machine.verify()


class TestRule3OneDoor:
    """Without the door's invalidation the results are wrong, and the auditor says so: the tests can fail."""

    def test_the_auditor_catches_a_block_that_outlived_its_bytes(self, monkeypatch):
        made = build(RunOptions(audit=True))
        monkeypatch.setattr(made.machine.blocks, "invalidate", lambda *_arguments: [])
        with pytest.raises(
            AuditError, match=r"block \d+ at 0x20000 .* is stale: from byte 1 on .*01c3 but memory holds 02c3"
        ):
            made.run()

    def test_and_one_that_the_engine_did_not_forget(self, monkeypatch):
        made = build(RunOptions(audit=True))
        monkeypatch.setattr(made.machine.vcpu.free, "forget", lambda *_arguments: None)
        with pytest.raises(AuditError, match="does not hold: its translation outlived its invalidation"):
            made.run()

    @pytest.mark.parametrize("broken", ["invalidate", "forget"])
    def test_without_an_auditor_the_results_are_wrong(self, broken, monkeypatch):
        made = build(RunOptions())
        if broken == "invalidate":
            monkeypatch.setattr(made.machine.blocks, "invalidate", lambda *_arguments: [])
        else:
            monkeypatch.setattr(made.machine.vcpu.free, "forget", lambda *_arguments: None)
        assert made.run().detail["value"] == ROUNDS  # the first version ran each time
        assert made.machine.read(FRAME + 1, 1) == bytes([ROUNDS])

    def test_with_it_they_are_right(self):
        assert build(RunOptions()).run().detail["value"] == RIGHT

    def test_a_mapping_that_changes_drops_what_was_there(self):
        made = build(code=f"mov ebx, {TARGET}; call rbx; mov r15, rax; cpuid; mov ebx, {TARGET}; call rbx\n{tiny.END}")
        machine = made.machine
        machine.write(0x81000, bytes.fromhex("b009c3"))
        machine.on(Cpuid)(lambda _exit: machine.alias(FRAME, 0x81000, PAGE))
        assert made.run().detail["value"] == 9


class TestRule4CountersAddUp:
    @pytest.mark.parametrize("capacity", [1, 2, 4, 1 << 16])
    def test_at_any_capacity(self, capacity):
        made = build(RunOptions(audit=True, check=True, capacity=capacity))
        assert made.run().detail["value"] == RIGHT
        counters, blocks = made.machine.blocks.counters, made.machine.blocks
        assert counters.created == len(blocks) + counters.invalidated + counters.evicted
        assert (counters.evicted > 0) == (capacity < 5)

    def test_the_check_sees_it(self):
        made = build()
        made.run()
        made.machine.blocks.counters.created += 1
        with pytest.raises(InvariantError, match="do not add up"):
            made.machine.verify()


class TestRule5BytesAreTheOnesTranslated:
    def test_every_entry_is_audited(self):
        made = build()
        made.run()
        assert made.machine.audited >= 3 * ROUNDS
        for block in made.machine.blocks:
            assert block.code == made.machine.read(block.hpa, block.size)

    def test_the_report_names_the_guests_place(self, monkeypatch):
        made = build(RunOptions(audit=True))
        made.machine.memory.write(FRAME + 1, b"\x05")  # not yet translated: fine
        monkeypatch.setattr(made.machine.door, "commit", lambda *_arguments: [])
        with pytest.raises(AuditError, match="long"):
            made.run()

    def test_successors_are_those_seen(self):
        made = build()
        made.run()
        following = {block.gva: block.successors for block in made.machine.blocks}
        behind_the_call = CODE + len(tiny.assemble(PATCHES.split("add r15b", maxsplit=1)[0]))
        assert following[TARGET] == {behind_the_call}


class TestRule6OneRecordAWrite:
    def test_with_all_that_it_must_say(self):
        made = build()
        made.run()
        records = made.modifications
        assert len(records) == ROUNDS
        for number, record in enumerate(records, 1):
            assert (record.gpa, record.gva, record.cause) == (FRAME + 1, VIEW + 1, "store")
            assert record.aliases == (TARGET + 1, VIEW + 1)
            assert record.new == bytes([number])
            assert record.instruction == number
        assert [record.old for record in records[1:]] == [record.new for record in records[:-1]]
        # The first round finds nothing translated, and stores what was there already.
        assert [len(record.blocks) for record in records] == [0, 1, 1, 1, 1]

    def test_the_dead_are_in_order_of_creation(self):
        """The later function is called first; one write changes both, with a byte between that stays."""
        made = tiny.build(
            {
                CODE: f"mov ebx, {TARGET + 4}; call rbx; mov ebx, {TARGET}; call rbx; cpuid; xor eax, eax\n{tiny.END}",
                FRAME: FUNCTION + b"\x90" + FUNCTION,
            },
            maps=MAPS,
        )
        made.machine.on(Cpuid)(lambda _exit: made.machine.write(FRAME + 1, b"\x07\xc3\x90\xb0\x08"))
        made.run()
        (record,) = made.modifications
        assert len(record.blocks) == 2
        assert record.blocks == tuple(sorted(record.blocks))

    def test_the_cycle_in_the_order_in_which_it_happens(self):
        made = build()
        made.run()
        cycle = [type(record) for record in made.of(EptViolation, Mtf, Modification)]
        assert cycle == [EptViolation, Mtf, Modification] * ROUNDS


class TestRule7SameStateWithAndWithoutTraps:
    def test_the_ways_of_running_agree(self):
        ways = [RunOptions(), STRICT, RunOptions(single_step=True), RunOptions(capacity=1)]
        states = []
        for options in ways:
            made = build(options)
            made.run()
            states.append(made.state())
        assert states == states[:1] * len(ways)

    def test_two_runs_report_the_same(self):
        runs = [build(), build()]
        for made in runs:
            made.run()
        assert runs[0].records == runs[1].records


class TestStates:
    """The state table of ``vmm.memory.frames``, line by line."""

    def events(self, made):
        return [(e.before, e.after, e.cause) for e in made.of(FrameEvent) if e.gpa == FRAME]

    def test_data_becomes_code_at_its_first_fetch(self):
        made = build(policy=Policy(code="fetch"))
        made.run()
        assert self.events(made) == [("data", "code", "first fetch")]

    def test_stores_in_front_of_that_are_nobodys_business(self):
        made = build(policy=Policy(code="fetch"))
        made.run()
        assert len(made.modifications) == ROUNDS - 1

    def test_a_window_opens_at_a_store_and_closes_at_a_fetch(self):
        made = build(policy=Policy(writes="window", code="load"))
        assert made.run().detail["value"] == RIGHT
        states = [(before, after) for before, after, _ in self.events(made)]
        assert states == [("code", "window"), ("window", "code")] * ROUNDS
        assert {record.cause for record in made.modifications} == {"window"}
        assert [(record.old, record.new) for record in made.modifications] == [
            (bytes([i]), bytes([i + 1])) for i in range(1, ROUNDS)
        ]

    def test_a_hot_frame_becomes_a_window(self):
        hot = PATCHES.replace(f"cmp ecx, {ROUNDS}", "cmp ecx, 40")
        made = build(policy=Policy(writes="adaptive", code="load"), code=hot)
        assert made.run().detail["value"] == sum(range(41)) & 0xFF
        assert ("code", "window", "hot frame") in self.events(made)
        assert {record.cause for record in made.modifications} == {"store", "window"}

    @pytest.mark.parametrize("writes", ["window", "adaptive"])
    def test_what_a_window_saw_last_is_journaled_at_the_end(self, writes):
        code = f"""
            mov ecx, 40; mov ebx, {VIEW + 1}
        again:
            mov byte ptr [rbx], cl; inc byte ptr [rbx]; loop again
            xor eax, eax
            {tiny.END}
        """
        made = build(policy=Policy(writes=writes, code="load"), code=code)
        made.run()
        shadow = bytearray(FUNCTION)
        for record in made.modifications:
            at = record.gpa - FRAME
            assert shadow[at : at + len(record.old)] == record.old
            shadow[at : at + len(record.new)] = record.new
        assert shadow == made.machine.read(FRAME, len(shadow))

    def test_a_host_write_into_a_window_is_part_of_the_diff(self):
        made = build(policy=Policy(writes="window", code="load"))
        machine = made.machine
        wrote = []

        def write(record):
            if isinstance(record, FrameEvent) and record.after == "window" and not wrote:
                wrote.append(record)
                machine.write(FRAME + 64, b"\x99")

        machine.observe(write, acts=True)
        assert made.run().detail["value"] == RIGHT
        assert [record.gpa - FRAME for record in made.modifications if record.new == b"\x99"] == [64]

    def test_sealing_a_window_journals_it(self):
        made = build(
            policy=Policy(writes="window", code="load"),
            code=f"mov ebx, {VIEW + 1}; mov byte ptr [rbx], 7; cpuid; xor eax, eax\n{tiny.END}",
        )
        made.machine.on(Cpuid)(lambda _exit: made.machine.seal(FRAME, PAGE))
        made.run()
        assert [(record.old, record.new, record.cause) for record in made.modifications] == [
            (b"\x01", b"\x07", "window")
        ]
        assert made.machine.frames.at(FRAME).state is FrameState.SEALED

    def test_the_store_of_a_block_that_runs_into_the_frame_opens_no_window(self):
        """The block is fetched as a whole, the frame with it: a window would be closed in front of every store."""
        store = tiny.assemble(f"mov ebx, {TARGET + PAGE + 0x100}; mov byte ptr [rbx], 1")
        ahead = b"\x90" * 8 + b"\xc3"
        made = tiny.build(
            {
                CODE: f"mov eax, {TARGET + PAGE - len(store)}; call rax; xor eax, eax\n{tiny.END}",
                FRAME + PAGE - len(store): store,
                0x30000: ahead,
            },
            maps=[map_page(TARGET, FRAME), map_page(TARGET + PAGE, 0x30000)],
            policy=Policy(writes="window", code="load"),
        )
        assert made.run().reason == "port"
        assert made.machine.reporter.total < 10
        assert [record.cause for record in made.modifications] == ["store"]


class TestSealed:
    @pytest.mark.parametrize("policy", [Policy(writes=w, code="load") for w in ("step", "window", "adaptive")])
    @pytest.mark.parametrize("address", [TARGET, VIEW])
    def test_a_store_is_refused_through_every_alias(self, policy, address):
        made = build(code=f"mov ebx, {address}; mov byte ptr [rbx], 9; hlt", policy=policy)
        made.machine.seal(FRAME, PAGE)
        made.machine.on(ExceptionExit)(lambda _exit: made.machine.stop() or True)
        assert made.run().reason == "stopped"
        (refused,) = made.of(ExceptionExit)
        assert (refused.vector, refused.error_code, refused.rip) == (13, 0, CODE + 5)
        assert made.machine.read(FRAME, 3) == FUNCTION
        assert made.modifications == []

    def test_it_still_runs_and_can_be_read(self):
        made = build(code=f"mov ebx, {TARGET}; call rbx; mov cl, [rbx + 1]; add al, cl\n{tiny.END}")
        made.machine.seal(FRAME, PAGE)
        assert made.run().detail["value"] == 2
        assert made.machine.frames.at(FRAME).state is FrameState.SEALED

    def test_a_straddling_store_into_it_changes_neither_frame(self):
        made = tiny.build(
            {CODE: f"mov ebx, {TARGET + PAGE - 2}; mov dword ptr [rbx], -1; hlt", FRAME: b"\x90" * PAGE * 2},
            maps=[map_page(TARGET, FRAME, pages=2)],
        )
        made.machine.seal(FRAME + PAGE, PAGE)
        made.machine.on(ExceptionExit)(lambda _exit: made.machine.stop() or True)
        made.run()
        assert made.machine.read(FRAME, 2 * PAGE) == b"\x90" * PAGE * 2
        assert str(made.machine.ept.entry(FRAME).permissions) == "--x"

    @pytest.mark.parametrize("offset", [0, 1, PAGE - 1])
    def test_the_host_is_refused_too(self, offset):
        made = build()
        made.machine.seal(FRAME, PAGE)
        with pytest.raises(OptionError, match="is sealed"):
            made.machine.write(FRAME + offset, b"\0")
        with pytest.raises(OptionError, match="is sealed"):
            made.machine.protect(FRAME, PAGE, Permission.R | Permission.W)

    def test_a_write_that_ends_in_sealed_code_writes_nothing_at_all(self):
        made = build()
        made.machine.seal(FRAME, PAGE)
        with pytest.raises(OptionError, match="is sealed"):
            made.machine.write(FRAME - 1, b"\x55\x55")
        assert made.machine.read(FRAME - 1, 1) == b"\0"
