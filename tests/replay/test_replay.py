"""A trace is a recording: the run that it is of comes again from it, byte for byte, without whoever acted on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from recorded import CLOCK, INPUT, LEFT, guest, recorded, replayed, vmm

from vmm.coherence import Coherence
from vmm.cpu.events import Event, EventType, Vector
from vmm.ept import Capabilities, EptProfile, Permission
from vmm.exits import Cpuid, EptViolation, ExceptionExit, Hlt, Vmcall
from vmm.guest.loader import bundled_guests, load_guest
from vmm.machine import RunOptions
from vmm.records import FrameEvent, Modification
from vmm.replay import header_of, machine_for
from vmm.script_actions import ScriptRun
from vmm.trace.names import symbols_of
from vmm.trace.script import Script
from vmm.trace.whole import WholeTrace

GUESTS = {each.name: each.path for each in bundled_guests()}
ACTIONS = Path(__file__).parents[1] / "guests" / "action_scripts"
WAYS = {
    "plain": RunOptions(),
    "blocks": RunOptions(block_events=True),
    "four blocks": RunOptions(capacity=4, block_events=True),
    "single step": RunOptions(single_step=True),
    "no traps": RunOptions(traps=False, coherence=Coherence.COHERENT),
}


def assert_comes_again(path, trace):
    new, difference = replayed(path)
    assert difference is None
    assert new == trace
    path.write_bytes(new)
    assert replayed(path) == (trace, None)


def inputs(trace):
    """The inputs of a trace, as (name, seq)."""
    objects = [json.loads(line) for line in trace.splitlines()]
    return [(each["input"], each["seq"]) for each in objects if each.get("kind") == "input"]



def refuses(policy):
    """Whether there are accesses that a guest is not let through with; that needs traps."""
    return policy.wx != "off" or policy.code == "seal"


RUNS = [
    (name, way)
    for name, path in GUESTS.items()
    for way, options in WAYS.items()
    if options.traps or not refuses(load_guest(path).manifest.policy)
]


@pytest.mark.parametrize(("name", "way"), RUNS)
def test_every_bundled_guest_comes_again(name, way, tmp_path):
    assert_comes_again(tmp_path / "t", recorded(tmp_path / "t", GUESTS[name], WAYS[way]))


def test_return_addresses_come_again(tmp_path):
    trace = recorded(tmp_path / "t", GUESTS["call-site"], RunOptions(callers=True))
    assert b'"callers": [' in trace
    assert_comes_again(tmp_path / "t", trace)


@pytest.mark.parametrize("script", sorted(ACTIONS.glob("[!a]*.script")), ids=lambda path: path.stem)
def test_what_a_script_did_is_done_again_without_it(script, tmp_path):
    def act(machine):
        ScriptRun(machine, Script.load(script, symbols=symbols_of(machine.guest)))

    trace = recorded(tmp_path / "t", script.name.split(".")[0], RunOptions(block_events=True), act)
    assert inputs(trace)
    assert_comes_again(tmp_path / "t", trace)


@pytest.mark.parametrize("script", sorted(ACTIONS.glob("ask.*.script")), ids=lambda path: path.stem)
def test_answers_are_given_again(script, tmp_path):
    """The guest of ask.asm, in a file; with a gate for #BP where the script is about one."""
    source = (ACTIONS / "ask.asm").read_text(encoding="ascii")
    handler = tiny.CODE + 0x800
    used = len(tiny.assemble(source))
    padded = source + "\n.byte " + ", ".join(["0xcc"] * (0x800 - used)) + "\nmov al, 0xbb\nout 0xf4, al"
    folder = guest(tmp_path / "ask", padded, gates={3: handler} if script.stem == "ask.breakpoint" else None)

    def act(machine):
        ScriptRun(machine, Script.load(script, symbols={}))

    trace = recorded(tmp_path / "t", folder, prepare=act)
    assert inputs(trace)
    assert_comes_again(tmp_path / "t", trace)


HANDLER = tiny.CODE + 0x100
#: Asks the host in every way that a handler may answer.
ASKING = """
    mov eax, 21
    vmcall
    mov ebx, eax
    in al, 0x60
    add bl, al
    ud2
    sti
    hlt
    mov al, bl
    out 0xf4, al
"""
#: Stores to code, once in one access and once in two, and has an exit at which the host can do something.
PATCHING = """
    xor eax, eax
    cpuid
    mov esi, 0x12000
    mov byte ptr [rsi], 3
    add byte ptr [rsi], 4
    mov al, byte ptr [rsi]
    out 0xf4, al
"""


def with_handlers(folder, source):
    """The handler of each vector counts in BL and returns."""
    used = len(tiny.assemble(source))
    source += ".byte " + ", ".join(["0xcc"] * (0x100 - used)) + "\nadd bl, 1\niretq"
    return guest(folder, source, gates=dict.fromkeys((0x30, 0x31), HANDLER))


class Keyboard:
    """A host's device: its answers come from nowhere that a replay could look."""

    def __init__(self, machine=None):
        self.exact = machine is not None
        self.machine = machine
        self.answers = iter((7, 9, 11))

    def read(self, port, size):
        if self.machine is not None:
            self.machine.interrupt(0x31)
        return next(self.answers)

    def write(self, port, size, value):
        pass


def skip_undefined(machine):
    @machine.on(ExceptionExit)
    def skip(exception):
        machine.vcpu.context.rip += 2
        return True


class TestHostProgram:
    """What handlers, acting observers and devices of a host program do is recorded as well."""

    def test_registers_decisions_interrupts_and_devices(self, tmp_path):
        def act(machine):
            cpu = machine.vcpu.context
            machine.ports.attach(Keyboard(), 0x60)
            skip_undefined(machine)

            @machine.on(Vmcall)
            def double(call):
                cpu.set_gpr("rax", 2 * call.rax)
                cpu.write_xmm(3, 1 << 100)

            @machine.on(Hlt)
            def wake(halt):
                machine.interrupt(0x30)

        trace = recorded(tmp_path / "t", with_handlers(tmp_path / "g", ASKING), prepare=act)
        assert [name for name, _ in inputs(trace)] == ["registers", "port", "registers", "decision", "interrupt"]
        assert trace.endswith(b'"value": 50}\n')  # 2 * 21 + 7, and 1 in the handler
        assert_comes_again(tmp_path / "t", trace)

    def test_an_exact_device_that_interrupts(self, tmp_path):
        def act(machine):
            machine.ports.attach(Keyboard(machine), 0x60)
            skip_undefined(machine)

        trace = recorded(tmp_path / "t", with_handlers(tmp_path / "g", ASKING), prepare=act)
        assert json.loads(trace.splitlines()[0])["exact_ports"] == [0x60]
        assert ("interrupt", inputs(trace)[0][1]) in inputs(trace)
        assert_comes_again(tmp_path / "t", trace)

    def test_an_event_in_place_of_an_access(self, tmp_path):
        def act(machine):
            @machine.on(EptViolation)
            def refuse(violation):
                if violation.qualification & 2:
                    return Event(Vector.GP, EventType.HARDWARE_EXCEPTION, error_code=0)
                return None

        trace = recorded(tmp_path / "t", with_handlers(tmp_path / "g", PATCHING), prepare=act)
        assert b'"triple fault"' in trace
        assert [name for name, _ in inputs(trace)] == ["decision"]
        assert_comes_again(tmp_path / "t", trace)

    def test_an_access_that_is_tried_again(self, tmp_path):
        def act(machine):
            @machine.on(EptViolation)
            def grant(violation):
                machine.protect(violation.gpa, 1, Permission.R | Permission.W)
                return True

        trace = recorded(tmp_path / "t", with_handlers(tmp_path / "g", PATCHING), prepare=act)
        assert [name for name, _ in inputs(trace)] == ["protect", "decision"]
        assert_comes_again(tmp_path / "t", trace)

    @pytest.mark.parametrize("option", [None, EptProfile(), EptProfile(accessed_dirty=True)])
    def test_with_its_ept(self, tmp_path, option):
        """The manifest's profile, or the option's in its place."""
        folder = guest(tmp_path / "g", "mov byte ptr [0x12000], 1\nout 0xf4, al")
        manifest = folder / "guest.toml"
        manifest.write_text(manifest.read_text() + "[ept]\nprofile = 'advanced'\nmode_based_execute = true\n")
        trace = recorded(tmp_path / "t", folder, RunOptions(ept=option))
        header = header_of(WholeTrace.read(tmp_path / "t"))
        expected = option or EptProfile(capabilities=Capabilities(advanced_information=True), mode_based_execute=True)
        with machine_for(header, load_guest(folder)) as machine:
            assert machine.ept.profile == expected
        assert_comes_again(tmp_path / "t", trace)

    def test_views_of_the_ept(self, tmp_path):
        """A store is refused in a view that a handler leaves for another; the guest switches back by VMFUNC."""

        def act(machine):
            views = machine.views
            for _ in range(2):
                views.add()
            views.restrict(1, 0x12000, 0x1000, Permission.R, convertible=True)
            views.remap(2, 0x12000, 0x13000, 0x1000)
            views.set_eptp_list([views.ept(number).eptp for number in range(3)])
            views.set_ve_area(0x14000)
            views.switch(1)

            @machine.on(EptViolation)
            def leave(violation):
                if violation.view != 1:
                    return None
                views.switch(2)
                return True

        source = "mov byte ptr [0x12000], 7\nxor eax, eax\nxor ecx, ecx\n.byte 0x0f, 0x01, 0xd4\nout 0xf4, al"
        options = RunOptions(ept=EptProfile(vm_functions=True))
        trace = recorded(tmp_path / "t", guest(tmp_path / "g", source), options, act)
        before = ["add-view", "add-view", "restrict", "remap", "eptp-list", "ve-area", "switch-view"]
        assert [name for name, _ in inputs(trace)] == [*before, "switch-view", "decision"]
        assert_comes_again(tmp_path / "t", trace)

    def test_before_the_run(self, tmp_path):
        def act(machine):
            machine.write(0x12000, b"\x01\x02")
            machine.alias(0x200000, 0x12000, 0x1000)
            machine.protect(0x11000, 0x1000, Permission.R)
            machine.inject(Event(0x30, EventType.EXTERNAL_INTERRUPT))

        trace = recorded(tmp_path / "t", with_handlers(tmp_path / "g", PATCHING), prepare=act)
        assert [name for name, _ in inputs(trace)] == ["write", "alias", "protect", "inject"]
        assert inputs(trace)[0] == ("write", 0)
        assert_comes_again(tmp_path / "t", trace)

    def test_what_it_did_to_the_ept(self, tmp_path):
        """A log that was drained, sub-pages, modes of execution: what they make of the run comes again, too."""
        folder = guest(tmp_path / "g", "mov byte ptr [0x12080], 1; mov byte ptr [0x12000], 1; vmcall\nout 0xf4, al")
        profile = EptProfile(
            accessed_dirty=True, mode_based_execute=True, page_modification_log=True, sub_page_write=True
        )

        def act(machine):
            machine.protect_sub_pages(0x12000, 1 << 1)
            machine.protect(0x10000, 0x1000, Permission.R, user_execute=True)
            machine.on(Vmcall)(lambda _: machine.drain_log(clean=True) and None)

        trace = recorded(tmp_path / "t", folder, RunOptions(ept=profile), prepare=act)
        assert [name for name, _ in inputs(trace)] == ["sub-pages", "protect", "drain"]
        assert trace.count(b'"kind": "log"') > 1
        assert_comes_again(tmp_path / "t", trace)

    def test_actions_within_actions_keep_their_places(self, tmp_path):
        """An observer acts at the first of two records of another one's action; that one acts once more after both."""

        def act(machine):
            def inner(record):
                if isinstance(record, FrameEvent) and record.after == "data":
                    machine.write(0x12010, b"\x06")

            def outer(record):
                if isinstance(record, Cpuid):
                    machine.protect(0x12000, 0x1000, Permission.R | Permission.W)  # two records: data, then rw-
                    machine.write(0x11010, b"\x07")

            machine.observe(inner, acts=True)
            machine.observe(outer, acts=True)

        trace = recorded(tmp_path / "t", with_handlers(tmp_path / "g", PATCHING), prepare=act)
        objects = [json.loads(line) for line in trace.splitlines()]
        places = [(each["input"], each.get("depth", 0)) for each in objects if each.get("kind") == "input"]
        assert places == [("protect", 0), ("write", 1), ("write", 0)]
        assert_comes_again(tmp_path / "t", trace)

    def test_a_seal_and_a_stop(self, tmp_path):
        def act(machine):
            machine.seal(0x12000, 0x1000)

            @machine.on(ExceptionExit)
            def look(exception):
                machine.vcpu.context.set_gpr("rbx", exception.vector)
                machine.stop()

        trace = recorded(tmp_path / "t", with_handlers(tmp_path / "g", PATCHING), prepare=act)
        assert [name for name, _ in inputs(trace)] == ["seal", "stop", "registers"]
        assert_comes_again(tmp_path / "t", trace)

    def test_windows_that_were_journaled(self, tmp_path):
        source = "mov byte ptr [0x12000], 1; vmcall; mov byte ptr [0x12001], 2; vmcall\nout 0xf4, al"
        folder = guest(tmp_path / "g", source)
        manifest = folder / "guest.toml"
        manifest.write_text(manifest.read_text().replace("[policy]", '[policy]\nwrites = "window"'))

        def act(machine):
            machine.on(Vmcall)(lambda _: machine.journal_windows())

        trace = recorded(tmp_path / "t", folder, prepare=act)
        assert [name for name, _ in inputs(trace)] == ["journal", "journal"]
        assert trace.count(b'"cause": "window"') == 2
        assert trace.count(b'"to": "window"') == 1
        assert_comes_again(tmp_path / "t", trace)

    def test_registers_that_nobody_can_set_again_are_refused(self, tmp_path):
        def act(machine):
            @machine.on(Vmcall)
            def change(call):
                machine.vcpu.context.cr4 |= 1 << 2  # TSD

        recorded(tmp_path / "t", with_handlers(tmp_path / "g", ASKING), prepare=act)
        result = vmm("replay", tmp_path / "t")
        assert result.exit_code == 2
        assert "an input that no run could have: 'cr4'" in result.stderr


#: Reads all of its input into RBX, 8 bits at a time, and how much is left at the start into RCX.
READER = f"""
    mov edx, {LEFT}
    in eax, dx
    mov ecx, eax
    xor ebx, ebx
again:
    in al, {LEFT}
    test al, al
    jz over
    in al, {INPUT}
    imul ebx, ebx, 31
    movzx eax, al
    add ebx, eax
    jmp again
over:
    in al, {INPUT}
    mov ah, al
    mov al, bl
    out 0xf4, al
"""
TELLER = f"""
    mov edx, {CLOCK}
    in eax, dx
    mov ebx, eax
    inc edx
    in eax, dx
    mov ecx, eax
    inc edx
    in eax, dx
    mov esi, eax
    out 0xf4, al
"""


def digest(data):
    value = 0
    for byte in data:
        value = (31 * value + byte) & 0xFFFF_FFFF
    return value


class TestDevices:
    def state(self, tmp_path, *arguments, given=None):
        trace, state = tmp_path / "t", tmp_path / "s"
        assert vmm("run", "-q", *arguments, "--trace", trace, "--state", state, given=given).exit_code == 0
        return json.loads(state.read_text())["registers"]

    def test_input_is_read_once_to_its_end(self, tmp_path):
        (tmp_path / "input").write_bytes(b"one\0two\xff")
        folder = guest(tmp_path / "g", READER)
        registers = self.state(tmp_path, folder, "--input", tmp_path / "input")
        assert (registers["rbx"], registers["rcx"]) == (digest(b"one\0two\xff"), 8)
        assert registers["rax"] >> 8 & 0xFF == 0xFF  # behind the end

    def test_input_comes_from_standard_input(self, tmp_path):
        registers = self.state(tmp_path, guest(tmp_path / "g", READER), "--input", "-", given=b"abc")
        assert registers["rbx"] == digest(b"abc")

    def test_a_replay_needs_no_input_file(self, tmp_path):
        (tmp_path / "input").write_bytes(b"gone by then")
        self.state(tmp_path, guest(tmp_path / "g", READER), "--input", tmp_path / "input")
        (tmp_path / "input").unlink()
        assert vmm("replay", tmp_path / "t").exit_code == 0

    def test_the_manifest_may_name_the_input(self, tmp_path):
        folder = guest(tmp_path / "g", READER)
        (folder / "default").write_bytes(b"default")
        manifest = folder / "guest.toml"
        manifest.write_text(manifest.read_text().replace("[input]", '[input]\nfile = "default"'))
        assert self.state(tmp_path, folder)["rbx"] == digest(b"default")
        (folder / "default").rename(folder / "elsewhere")
        assert vmm("replay", tmp_path / "t").exit_code == 0
        assert vmm("run", "-q", folder).exit_code == 2
        assert self.state(tmp_path, folder, "--input", "-", given=b"other")["rbx"] == digest(b"other")

    def test_string_input_into_code_takes_each_byte_once(self, tmp_path):
        source = f"mov edi, 0x12000; mov ecx, 5; mov edx, {INPUT}; cld; rep insb; mov rbx, [rdi - 5]; out 0xf4, al"
        registers = self.state(tmp_path, guest(tmp_path / "g", source), "--input", "-", given=b"abcdefg")
        assert registers["rbx"].to_bytes(8, "little") == b"abcde\xcc\xcc\xcc"
        assert vmm("replay", tmp_path / "t").exit_code == 0

    def test_wide_reads_are_little_endian_and_padded(self, tmp_path):
        source = f"mov edx, {INPUT}; in eax, dx; mov ebx, eax; in ax, dx; mov ecx, eax; out 0xf4, al"
        registers = self.state(tmp_path, guest(tmp_path / "g", source), "--input", "-", given=b"\1\2\3\4\5")
        assert (registers["rbx"], registers["rcx"] & 0xFFFF) == (0x04030201, 0xFF05)

    def test_the_clock_shows_what_it_is_told(self, tmp_path):
        registers = self.state(tmp_path, guest(tmp_path / "g", TELLER), "--time", "5000000000.25")
        now = registers["rbx"] | registers["rcx"] << 32
        assert (now, registers["rsi"]) == (5_000_000_000, 250_000_000)

    def test_the_hosts_time_is_recorded(self, tmp_path):
        self.state(tmp_path, guest(tmp_path / "g", TELLER))
        first = (tmp_path / "t").read_bytes()
        assert_comes_again(tmp_path / "t", first)
        self.state(tmp_path, tmp_path / "g")
        assert (tmp_path / "t").read_bytes() != first

    def test_a_manifest_may_stop_the_clock(self, tmp_path):
        folder = guest(tmp_path / "g", TELLER)
        manifest = folder / "guest.toml"
        manifest.write_text(manifest.read_text().replace("[clock]", "[clock]\ntime = 1700000000"))
        assert self.state(tmp_path, folder)["rbx"] == 1_700_000_000
        assert self.state(tmp_path, folder, "--time", "12")["rbx"] == 12

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("alias-patch", "--input", "-"), "--input: alias-patch has no port to read it from"),
            (("alias-patch", "--time", "1"), "--time: alias-patch has no port to read it from"),
            (("alias-patch", "--time", "soon"), "--time: 'soon' is no time"),
            (("alias-patch", "--time", "-1"), "is no time"),
            (("alias-patch", "--time", "9" * 20), "is no time"),
            (("alias-patch", "--input", "nowhere"), "nowhere: cannot be read"),
            (("alias-patch", "--input", "/dev/zero"), "/dev/zero: not a regular file"),
        ],
    )
    def test_bad_options(self, arguments, says):
        result = vmm("run", "-q", *arguments)
        assert result.exit_code == 2
        assert says in result.stderr
        assert result.stderr.count("\n") == 1

    def test_too_much_input(self, monkeypatch):
        monkeypatch.setattr("vmm.commands.given.INPUT_LIMIT", 3)
        result = vmm("run", "-q", "alias-patch", "--input", "-", given=b"four")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert "more than 0x3 bytes" in result.stderr


def test_what_is_done_when_the_guest_prints_is_done_again_there(tmp_path):
    """Behind the line that it printed, and with what it causes in front of the next record."""
    source = "mov al, 10; out 0xe9, al\nout 0xe9, al\nmov al, [0x12000]\nout 0xf4, al"
    manifest = guest(tmp_path / "g", source) / "guest.toml"
    manifest.write_text(manifest.read_text() + "[console]\nport = 0xe9\n")

    def act(machine):
        def answer(record):
            if isinstance(record, Modification) and record.gpa == 0x12000:
                machine.write(0x12001, b"x")

        machine.on_output(lambda _data: machine.write(0x12000, bytes([machine.reporter.total])))
        machine.observe(answer, acts=True)

    trace = recorded(tmp_path / "t", manifest, prepare=act)
    assert inputs(trace) == [("write", 1), ("write", 2), ("write", 4), ("write", 5)]
    assert [b'"at": "output"' in line for line in trace.splitlines() if b'"input"' in line] == [True, False] * 2
    assert_comes_again(tmp_path / "t", trace)


def test_an_unattached_port_is_no_input(tmp_path):
    trace = recorded(tmp_path / "t", guest(tmp_path / "g", "in al, 0x60\nout 0xf4, al"))
    assert inputs(trace) == []
    assert_comes_again(tmp_path / "t", trace)


def test_the_state_hash_is_of_what_the_state_file_shows(tmp_path):
    """As docs/formats.md defines it."""
    from hashlib import sha256

    state, trace = tmp_path / "s", tmp_path / "t"
    vmm("run", "-q", "alias-patch", "--trace", trace, "--state", state, "--hash", "0:0x100000")
    document = json.loads(state.read_text())
    *_, line, _ = (json.loads(text) for text in trace.read_text().splitlines())
    assert line["kind"] == "state"
    assert line["memory"] == document["hashes"][0]["sha256"]
    assert line["registers"] == sha256(json.dumps([document["registers"]]).encode()).hexdigest()
    assert line["console"] == sha256(b"alias-patch sum 338350 -> 0x82\n").hexdigest()
    parts = b"".join(bytes.fromhex(line[part]) for part in ("registers", "memory", "console"))
    assert line["sha256"] == sha256(parts).hexdigest()


def test_whether_it_is_shown_or_checked_leaves_no_mark(tmp_path):
    plain = recorded(tmp_path / "t", "mid-fault")
    for more in (("-q",), ("--all",), ("--audit", "--check"), ("--expect", "own", "-q"), ("--seconds", "100")):
        assert vmm("run", "mid-fault", "--trace", tmp_path / "u", *more).exit_code == 0
        assert (tmp_path / "u").read_bytes() == plain

