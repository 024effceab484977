"""What a kernel finds that Multiboot enters (Multiboot Specification 0.6.96, 3.2 and 3.3)."""

import pytest
from multiboot_images import ENTRY, LOAD, MEMORY, STACK, Information, build, code, flat, load

from vmm.errors import ImageError, OptionError
from vmm.machine import RunOptions

CODE = b"\xfa\xf4"
MIB = 1 << 20


def test_the_machine_state_is_that_of_the_specification(tmp_path):
    guest = load(tmp_path, flat(CODE))
    state, cpu = guest.boot, guest.boot.cpus[0]
    assert cpu.gprs["rax"] == 0x2BADB002
    assert cpu.rip == ENTRY
    assert (state.cr0 & 1, state.cr0 >> 31, state.cr4, state.efer) == (1, 0, 0, 0)
    assert cpu.rflags & (1 << 17 | 1 << 9) == 0
    assert (cpu.segments["cs"].base, cpu.segments["cs"].limit) == (0, 0xFFFFFFFF)
    assert cpu.segments["cs"].access_rights & 0x60FF == 0x409B  # 32 bits, present, ring 0, code that can be read
    for name in ("ds", "es", "fs", "gs", "ss"):
        segment = cpu.segments[name]
        assert (segment.base, segment.limit, segment.access_rights & 0xFF) == (0, 0xFFFFFFFF, 0x93)


def test_the_boot_information_tells_of_memory(tmp_path):
    info = Information(load(tmp_path, flat(CODE), memory=8 * MIB))
    assert info.field(0) == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (info.field(4), info.field(8)) == (0x9F000 // 1024, 7 * 1024)
    assert info.memory_map == [(0, 0x9F000, 1), (0x9F000, 0x61000, 2), (MIB, 7 * MIB, 1)]


@pytest.mark.parametrize("appended", ["", "x", "xx", "xxx"])
def test_the_boot_information_lies_where_the_map_says_that_no_memory_is_free(tmp_path, appended):
    info = Information(load(tmp_path, flat(CODE), command_line=appended))
    free = [(base, base + size) for base, size, kind in info.memory_map if kind == 1]
    places = [info.address, *(info.field(offset) for offset in (16, 24, 48, 64))]
    assert not [place for place in places for start, end in free if start <= place < end]
    assert all(place % 4 == 0 for place in places)


@pytest.mark.parametrize(
    ("given", "line"),
    [("", b"kernel.flat"), ("a=1  b", b"kernel.flat a=1  b"), ("n\u00e4her", "kernel.flat n\u00e4her".encode())],
)
def test_the_command_line_is_the_name_and_what_is_appended(tmp_path, given, line):
    info = Information(load(tmp_path, flat(CODE), command_line=given))
    assert info.text(info.field(16)) == line
    assert info.text(info.field(64)) == b"vmm"


def test_modules_lie_on_pages_of_their_own_above_the_image(tmp_path):
    sizes = {"first": 5000, "empty": 0, "third": 4096}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(name[:1].encode() * size)
    guest = load(tmp_path, flat(CODE, bss_end=0x200001), modules=[tmp_path / name for name in sizes])
    info = Information(guest)
    assert info.modules == [
        (0x201000, 0x201000 + 5000, b"first"),
        (0x203000, 0x203000, b"empty"),
        (0x203000, 0x204000, b"third"),
    ]
    assert info.bytes_at(0x201000, 5000) == b"f" * 5000
    assert info.bytes_at(0x203000, 4096) == b"t" * 4096


def test_modules_of_an_image_in_low_memory_are_above_1_mib(tmp_path):
    (tmp_path / "module").write_bytes(b"data")
    image = flat(CODE, header=0x8000, load=0x8000, entry=0x8020)
    assert Information(load(tmp_path, image, modules=[tmp_path / "module"])).modules == [(MIB, MIB + 4, b"module")]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": 3 * MIB}, "memory: 0x300000 bytes of memory; give a multiple of 2 MiB"),
        ({"memory": 0}, "memory: 0x0 bytes"),
        ({"memory": -2 * MIB}, "bytes of memory"),
        ({"memory": 2048 * MIB}, "multiple of 2 MiB up to 1024M"),
        ({"command_line": "x" * 4000}, "bytes of boot information, with the command line and 0 modules; shorten it"),
        ({"command_line": "a\0b"}, "append: a NUL in the command line"),
        ({"command_line": "\ud800"}, "append: a lone surrogate in the command line"),
    ],
)
def test_what_cannot_be_given_is_refused_in_one_line(tmp_path, options, says):
    with pytest.raises(OptionError) as caught:
        load(tmp_path, flat(CODE), **options)
    assert says in str(caught.value)


def test_a_command_line_that_just_fits_is_given(tmp_path):
    longest = max(size for size in range(3700, 4096) if _fits(tmp_path, size))
    info = Information(load(tmp_path, flat(CODE), command_line="x" * longest))
    assert len(info.text(info.field(16))) == len("kernel.flat ") + longest
    assert info.bytes_at(0x9F000, 4096)


def _fits(folder, size):
    try:
        load(folder, flat(CODE), command_line="x" * size)
    except OptionError:
        return False
    return True


def test_modules_that_do_not_fit_into_ram_are_refused(tmp_path):
    (tmp_path / "big").write_bytes(bytes(3 * MIB))
    with pytest.raises(ImageError) as caught:
        load(tmp_path, flat(CODE), modules=[tmp_path / "big"])
    what = "0x300000 bytes at 0x101000 reach out of RAM, which ends at 0x400000; give it --memory 6M or more"
    assert str(caught.value) == f"{tmp_path / 'big'}: {what}"


def test_more_modules_than_can_be_told_of_are_refused(tmp_path):
    (tmp_path / "m").write_bytes(b"m")
    with pytest.raises(OptionError, match="500 modules"):
        load(tmp_path, flat(CODE), modules=[tmp_path / "m"] * 500, memory=8 * MIB)


#: Functions of a kernel: ``print`` the string at ESI, ``hex`` EAX, ``line``.
ROUTINES = """
    print: mov dx, 0x3f8; lodsb; test al, al; jz back; out dx, al; jmp print
    back: ret
    hex: mov ecx, 8
    digit: rol eax, 4; push eax; and al, 15; cmp al, 10; sbb al, 0x69; das; mov dx, 0x3f8; out dx, al; pop eax
    dec ecx; jnz digit
    mov al, 0x20; out dx, al; ret
    line: mov al, 10; mov dx, 0x3f8; out dx, al; ret
"""

#: Tells of what it was given, then switches paging on, patches ``answer`` through an alias, and adds up what it says.
KERNEL = f"""
    mov esp, {STACK}; mov ebp, ebx
    cmp eax, 0x2badb002; jne wrong
    mov esi, [ebp + 16]; call print; call line
    mov esi, [ebp + 48]; mov edi, [ebp + 44]; add edi, esi
    area: mov eax, [esi + 4]; call hex; mov eax, [esi + 12]; call hex; mov eax, [esi + 20]; call hex; call line
    add esi, [esi]; add esi, 4; cmp esi, edi; jb area
    mov dword ptr [0x200000], 0x83; mov dword ptr [0x200004], 0x83
    mov eax, 0x10; mov cr4, eax; mov eax, 0x200000; mov cr3, eax; mov eax, cr0; or eax, 0x80000000; mov cr0, eax
    xor ebx, ebx; mov ecx, 5
    again: mov byte ptr [0x501001], cl
    mov eax, 0x101000; call eax; add ebx, eax; dec ecx; jnz again
    mov eax, ebx; out 0xf4, al
    wrong: mov al, 0xff; out 0xf4, al
"""
ANSWER = 0x101000


def kernel_image():
    text = code(KERNEL + ROUTINES)
    answer = bytes.fromhex("b800000000 c3")  # mov eax, 0; ret
    return flat(text.ljust(ANSWER - ENTRY, b"\xcc") + answer)


class TestKernel:
    """A kernel that prints what it is given and changes its own code through an alias, with paging on."""

    @pytest.fixture
    def run(self, tmp_path):
        tiny = build(tmp_path, kernel_image(), command_line="debug=1")
        tiny.run()
        return tiny

    def test_it_is_told_what_there_is(self, run):
        assert bytes(run.machine.console.output).decode().splitlines() == [
            "kernel.flat debug=1",
            "00000000 0009F000 00000001 ",
            "0009F000 00061000 00000002 ",
            "00100000 00300000 00000001 ",
        ]

    def test_it_executes_what_it_wrote(self, run):
        assert (run.end.reason, run.end.detail) == ("port", {"port": 0xF4, "value": 5 + 4 + 3 + 2 + 1})

    def test_each_store_through_the_alias_is_trapped_and_told(self, run):
        changes = [(m.gpa, m.gva, m.old, m.new) for m in run.modifications]
        # The first store comes before ``answer`` was executed: its frame is data then.
        assert changes == [(ANSWER + 1, 0x501001, bytes([n]), bytes([n - 1])) for n in (5, 4, 3, 2)]
        assert all(ANSWER + 1 in m.aliases and 0x501001 in m.aliases for m in run.modifications)

    @pytest.mark.parametrize(
        "options",
        [
            RunOptions(traps=False),
            RunOptions(single_step=True),
            RunOptions(capacity=4, check=True, audit=True),
            RunOptions(tlb="strict", check=True),
        ],
        ids=["no traps", "single step", "four blocks", "strict TLB"],
    )
    def test_it_ends_in_the_same_state_whichever_way_it_is_run(self, run, tmp_path, options):
        other = build(tmp_path, kernel_image(), command_line="debug=1", options=options)
        other.run()
        machines = (run.machine, other.machine)
        first, second = (m.vcpu.context.registers() for m in machines)
        assert first == second
        assert machines[0].read(0, MEMORY) == machines[1].read(0, MEMORY)
        assert machines[0].console.output == machines[1].console.output

    def test_a_run_repeats(self, run, tmp_path):
        again = build(tmp_path, kernel_image(), command_line="debug=1")
        again.run()
        assert again.records == run.records


def run_code(folder, source, **options):
    tiny = build(folder, flat(code(source)), seconds=20.0, **options)
    return tiny, tiny.run()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("cli; hlt", "halt"),
        ("mov al, 0xfe; out 0x64, al", "reset"),
        ("mov al, 3; out 0xf4, al", "port"),
        ("push eax", "unmapped memory"),  # there is no stack
        ("int 3", "triple fault"),  # nor an IDT
        ("hlt", "halt"),  # nor interrupts
        ("mov eax, [0xfffff000]", "unmapped memory"),
    ],
)
def test_how_a_kernel_may_end(tmp_path, source, reason):
    assert run_code(tmp_path, source)[1].reason == reason


def test_segments_can_be_loaded_from_the_gdt_that_is_there(tmp_path):
    _, end = run_code(tmp_path, "mov eax, 0x10; mov ds, ax; mov ss, ax; mov al, 1; out 0xf4, al")
    assert end.reason == "port"


def test_the_devices_of_a_pc_are_around_it(tmp_path):
    """The timer interrupts it by way of the interrupt controllers."""
    idt, gate = 0x140000, 0x140000 + 8 * 0x20
    source = f"""
        mov esp, {STACK}; mov eax, offset_of_handler; mov edi, {gate}
        mov [edi], ax; mov word ptr [edi + 2], 8; mov word ptr [edi + 4], 0x8e00; shr eax, 16; mov [edi + 6], ax
        mov word ptr [0x141000], 0x7ff; mov dword ptr [0x141002], {idt}; lidt [0x141000]
        mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al
        mov al, 0xfe; out 0x21, al
        mov al, 0x34; out 0x43, al; mov al, 0; out 0x40, al; mov al, 0x10; out 0x40, al
        sti
        wait: hlt; jmp wait
    """
    handler = ENTRY + 0x200
    text = code(source.replace("offset_of_handler", hex(handler))).ljust(0x200, b"\xcc")
    text += code("mov al, 7; out 0xf4, al")
    tiny = build(tmp_path, flat(text), seconds=20.0)
    assert tiny.run().detail == {"port": 0xF4, "value": 7}


def test_firmware_leaves_its_words_where_the_image_is_not(tmp_path):
    found = Information(load(tmp_path, flat(CODE)))
    assert found.word(0x400) == 0x3F8
    assert found.bytes_at(0x40E, 2) + found.bytes_at(0x413, 2) == (0x9F00).to_bytes(2, "little") + b"\x7c\x02"
    image = flat(CODE, header=0, load=0, entry=0x20, bss_end=0x401)
    assert 0x400 not in dict(load(tmp_path, image).boot.writes)


def test_names_may_be_others_than_those_of_the_files(tmp_path):
    (tmp_path / "module").write_bytes(b"m")
    info = Information(load(tmp_path, flat(CODE), modules=[tmp_path / "module"], names=["kernel", "first"]))
    assert (info.text(info.field(16)), info.modules[0][2]) == (b"kernel", b"first")


def test_ram_is_what_the_image_does_not_fill(tmp_path):
    guest = load(tmp_path, flat(CODE, bss_end=LOAD + 0x1000))
    assert guest.manifest.machine.memory == MEMORY
    assert all(gpa + len(data) <= MEMORY for gpa, data in guest.boot.writes)
