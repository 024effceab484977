"""The machine that a guest finds, and its page tables, read back by a walker of the test's own."""

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.guest import Guest, LoadedImage, Segment, Symbols, build, parse_manifest

PAGE = 4096
P, W, U, A, D, NX = 1, 2, 4, 0x20, 0x40, 1 << 63
LONG_LINEAR = 0xFFFF_FE00_0000_0000
PROTECTED_LINEAR = 0xFFC0_0000


def boot(mode="long", *, memory=0x40000, entry=0x10000, cpu="", rest="", executable=(0x10000,)):
    text = (
        f'schema = "vmm-guest/1"\nname = "t"\n[image]\nformat = "flat"\nfile = "i"\nload = 0\n'
        f'[machine]\nmemory = {memory}\nmode = "{mode}"\n[cpu]\nentry = {entry}\n{cpu}\n{rest}'
    )
    segments = tuple(Segment(gpa, b"\xf4", 1, True, True, True, gpa) for gpa in executable)
    manifest = parse_manifest(text, Path("guest.toml"))
    return build(Guest(manifest, LoadedImage(segments, None, Symbols()), entry))


def pmap(gva, gpa, length, access, *, user=True):
    place = f"gva = {gva}\ngpa = {gpa}\nlength = {length}"
    return f'[[paging.map]]\n{place}\naccess = "{access}"\nuser = {str(user).lower()}\n'


class Walker:
    """Walks page tables in a boot state's system area, and insists on what their entries may hold."""

    def __init__(self, state):
        self.state = state
        self.shifts = (39, 30, 21, 12) if state.mode == "long" else (30, 21, 12)

    def entry(self, table, index):
        system = self.state.system
        assert system.gpa <= table <= system.gpa + len(system.data) - PAGE
        assert table % PAGE == 0
        return struct.unpack_from("<Q", system.data, table - system.gpa + 8 * index)[0]

    def walk(self, linear):
        """(gpa, writable, executable, user) of a linear address, or None."""
        table, rights = self.state.cr3, P | W | U
        for shift in self.shifts:
            pae_root = shift == 30 and len(self.shifts) == 3
            entry = self.entry(table, linear >> shift & (3 if pae_root else 511))
            if not entry & P:
                assert entry == 0
                return None
            if pae_root:
                assert entry & 0xFFF == P, "the other low bits of a PDPTE are reserved or unused"
            else:
                rights &= entry
                assert entry & A
            table = entry & 0xF_FFFF_FFFF_F000
            if shift != 12:
                assert not entry & NX
        assert entry & D
        assert entry & 0x7FF0_0000_0000_0F98 == 0
        return table | linear & 0xFFF, bool(rights & W), not entry & NX, bool(rights & U)

    def everything(self):
        """All mapped pages: {linear: (gpa, writable, executable, user)}."""
        found = {}
        self._collect(self.state.cr3, 0, 0, found)
        return {
            linear | (0xFFFF << 48 if linear >> 47 and self.state.mode == "long" else 0): self.walk(linear)
            for linear in found
        }

    def _collect(self, table, level, prefix, found):
        for index in range(512):
            entry = self.entry(table, index)
            if entry & P:
                linear = prefix | index << self.shifts[level]
                if level == len(self.shifts) - 1:
                    found[linear] = entry
                else:
                    self._collect(entry & 0xF_FFFF_FFFF_F000, level + 1, linear, found)


def system_page(state, linear):
    return {linear: (state.system.gpa, True, False, False)}


def identity(memory, access="rwx", *, user=True):
    return {gpa: (gpa, "w" in access, "x" in access, user) for gpa in range(0, memory, PAGE)}


# Page tables


@pytest.mark.parametrize("access", ["r", "rw", "rx", "rwx"])
@pytest.mark.parametrize(("mode", "linear"), [("long", LONG_LINEAR), ("protected", PROTECTED_LINEAR)])
def test_identity_maps_all_of_ram_and_nothing_else(mode, linear, access):
    state = boot(mode, rest=f"[paging]\nidentity = '{access}'")
    assert Walker(state).everything() == identity(0x40000, access) | system_page(state, linear)


def test_long_mode_without_paging_has_ram_at_its_own_addresses():
    state = boot()
    assert Walker(state).everything() == identity(0x40000) | system_page(state, LONG_LINEAR)


def test_without_identity_only_the_maps_are_there():
    state = boot(rest=pmap(0x8000000, 0x10000, 0x2000, "rx", user=False))
    expected = {0x8000000: (0x10000, False, True, False), 0x8001000: (0x11000, False, True, False)}
    assert Walker(state).everything() == expected | system_page(state, LONG_LINEAR)


def test_later_maps_win_over_earlier_ones_and_over_the_identity():
    maps = pmap(0x10000, 0x20000, 0x3000, "rx") + pmap(0x11000, 0x5000, 0x1000, "rw", user=False)
    pages = Walker(boot(rest=f"[paging]\nidentity = 'rwx'\n{maps}")).everything()
    assert [pages[a] for a in (0xF000, 0x10000, 0x11000, 0x12000, 0x13000)] == [
        (0xF000, True, True, True),
        (0x20000, False, True, True),
        (0x5000, True, False, False),
        (0x22000, False, True, True),
        (0x13000, True, True, True),
    ]


def test_maps_that_cross_tables_of_every_level_are_whole():
    for gva in (0x1FF000, 0x3FFFF000, 0x7FFFFFF000, 0xFFFFFFFFFFFFC000):
        state = boot(rest=pmap(gva, 0, 0x4000, "rw"))
        walker = Walker(state)
        for page in range(0, 0x4000, PAGE):
            assert walker.walk(gva + page + 5) == (page + 5, True, False, True)


MAPS = st.lists(
    st.tuples(
        st.sampled_from([0, 0x1FD000, 0x3FFFE000, 0x8000000]),
        st.integers(0, 3),
        st.integers(0, 7),
        st.integers(1, 4),
        st.sampled_from(["r", "rw", "rx", "rwx"]),
        st.booleans(),
    ),
    max_size=8,
)


@given(MAPS, st.sampled_from(["", "r", "rwx"]), st.sampled_from(["long", "protected"]))
@settings(max_examples=60, deadline=None)
def test_tables_hold_what_painting_the_maps_in_order_gives(maps, access, mode):
    memory = 0xB000
    text = f"[paging]\nidentity = '{access}'\n" if access else "[paging]\n"
    painted = identity(memory, access) if access else {}
    for base, page, frame, pages, rights, user in maps:
        text += pmap(base + page * PAGE, frame * PAGE, pages * PAGE, rights, user=user)
        for i in range(pages):
            gpa = (frame + i) * PAGE
            painted[base + (page + i) * PAGE] = (gpa, "w" in rights, "x" in rights, user)
    state = boot(mode, memory=memory, entry=0, rest=text, executable=())
    linear = LONG_LINEAR if mode == "long" else PROTECTED_LINEAR
    assert Walker(state).everything() == painted | system_page(state, linear)


def test_a_gigabyte_is_mapped_completely():
    state = boot(memory=1 << 30)
    walker = Walker(state)
    for linear in (0, 0x12345678, (1 << 30) - 1):
        assert walker.walk(linear) == (linear, True, True, True)
    assert walker.walk(1 << 30) is None
    # the page of GDT and TSS; PML4; PDPT and PD of RAM and of the VMM; 512 page tables of RAM, one of the VMM
    assert len(state.system.data) == (1 + 1 + 2 + 2 + 512 + 1) * PAGE


# The system area


@pytest.mark.parametrize(("memory", "gpa"), [(0x1000, 0x200000), (0x200000, 0x200000), (0x201000, 0x400000)])
def test_the_system_area_starts_above_ram_at_a_multiple_of_2_mib(memory, gpa):
    state = boot(memory=memory, entry=0, executable=())
    assert state.system.gpa == gpa
    assert len(state.system.data) % PAGE == 0
    assert state.cr3 == gpa + PAGE


def descriptor(state, selector):
    """(base, limit, access byte, flags) of a GDT entry, decoded by the figure in the manual."""
    raw = struct.unpack_from("<HHBBBB", state.system.data, selector & ~7)
    limit = raw[0] | (raw[4] & 0xF) << 16
    if raw[4] & 0x80:
        limit = limit << 12 | 0xFFF
    return raw[1] | raw[2] << 16 | raw[5] << 24, limit, raw[3], raw[4] >> 4


@pytest.mark.parametrize(("mode", "code_flags"), [("long", 0b1010), ("protected", 0b1100)])
def test_the_gdt_has_the_promised_selectors(mode, code_flags):
    state = boot(mode)
    flat = (0, 0xFFFF_FFFF)
    assert state.system.data[:8] == bytes(8)
    assert descriptor(state, 0x08) == (*flat, 0x9B, code_flags)
    assert descriptor(state, 0x10) == (*flat, 0x93, 0b1100)
    assert descriptor(state, 0x1B) == (*flat, 0xF3, 0b1100)
    assert descriptor(state, 0x23) == (*flat, 0xFB, code_flags)
    tss_base = (LONG_LINEAR if mode == "long" else state.system.gpa) + 0x400
    assert descriptor(state, 0x28) == (tss_base & 0xFFFF_FFFF, 103, 0x8B, 0)
    assert struct.unpack_from("<Q", state.system.data, 0x30)[0] == tss_base >> 32
    assert state.gdtr == (tss_base - 0x400, 0x37)


@pytest.mark.parametrize("mode", ["long", "protected"])
@pytest.mark.parametrize("cpl", [0, 1, 2, 3])
def test_segment_registers_are_what_loading_their_selectors_from_the_gdt_gives(mode, cpl):
    state = boot(mode, cpu=f"cpl = {cpl}")
    for name in ("cs", "ss", "ds", "es", "tr"):
        segment = state.cpus[0].segments[name]
        base, limit, access, flags = descriptor(state, segment.selector)
        if name == "tr" and mode == "long":
            base |= LONG_LINEAR & ~0xFFFF_FFFF
        assert (segment.base, segment.limit) == (base, limit)
        assert segment.access_rights == access | flags << 12
        assert (segment.selector & ~7) + 7 <= state.gdtr[1]
    segments = state.cpus[0].segments
    assert segments["cs"].dpl == segments["ss"].dpl == segments["cs"].selector & 3 == cpl


@pytest.mark.parametrize(("cpl", "cs", "data"), [(0, 0x08, 0x10), (3, 0x23, 0x1B)])
def test_selectors_by_privilege_level(cpl, cs, data):
    segments = boot(cpu=f"cpl = {cpl}").cpus[0].segments
    assert segments["cs"].selector == cs
    assert {segments[name].selector for name in ("ss", "ds", "es")} == {data}
    assert {segments[name].selector for name in ("fs", "gs", "ldtr")} == {0}
    assert segments["tr"].selector == 0x28


def test_the_64_bit_tss_holds_rsp0_and_no_io_bitmap():
    tss = boot(cpu="rsp0 = 0x12345").system.data[0x400 : 0x400 + 104]
    assert struct.unpack_from("<Q", tss, 4) == (0x12345,)
    assert struct.unpack_from("<H", tss, 102)[0] > 103
    assert tss.count(0) == 104 - 4  # rsp0 has three bytes, the map base one


def test_the_32_bit_tss_holds_the_ring_0_stack():
    tss = boot("protected", cpu="rsp0 = 0x12345").system.data[0x400 : 0x400 + 104]
    assert struct.unpack_from("<II", tss, 4) == (0x12345, 0x10)
    assert struct.unpack_from("<H", tss, 102)[0] > 103


# Registers


def test_long_mode_control_registers():
    state = boot()
    assert state.cr0 == 0x8001_0033  # PG WP NE ET MP PE
    assert state.cr4 == 0x620  # OSXMMEXCPT OSFXSR PAE
    assert state.efer == 0xD01  # NXE LMA LME SCE


def test_protected_mode_control_registers():
    flat, paged = boot("protected"), boot("protected", rest="[paging]\nidentity = 'rwx'")
    assert (flat.cr0, flat.cr3, flat.cr4, flat.efer) == (0x1_0033, 0, 0x600, 0)
    assert (paged.cr0, paged.cr4, paged.efer) == (0x8001_0033, 0x620, 0x800)
    assert paged.cr3 == paged.system.gpa + PAGE
    assert paged.gdtr[0] == PROTECTED_LINEAR


def test_real_mode_has_no_system_area_and_no_protection():
    state = boot("real")
    assert (state.cr0, state.cr3, state.cr4, state.efer) == (0x32, 0, 0x600, 0)
    assert state.system.data == b""
    assert state.cpus[0].idtr == (0, 0x3FF)
    assert all(state.cpus[0].segments[name].limit == 0xFFFF for name in state.cpus[0].segments)


@pytest.mark.parametrize(
    ("entry", "selector", "ip"),
    [(0x7C00, 0, 0x7C00), (0xFFFF, 0, 0xFFFF), (0x10000, 0x1000, 0), (0xFFFF7, 0xFFFF, 7)],
)
def test_real_mode_starts_at_cs_ip(entry, selector, ip):
    state = boot("real", memory=0x100000, entry=entry, executable=())
    cs = state.cpus[0].segments["cs"]
    assert (cs.selector, cs.base, state.cpus[0].rip) == (selector, selector * 16, ip)
    assert cs.access_rights == 0x9B
    assert all(state.cpus[0].segments[name].base == 0 for name in ("ss", "ds", "es"))


def test_real_mode_segment_bases_give_selectors():
    segments = boot("real", cpu="registers = { fs_base = 0x12340, gs_base = 0x10 }").cpus[0].segments
    assert (segments["fs"].selector, segments["fs"].base) == (0x1234, 0x12340)
    assert segments["gs"].selector == 1


def test_registers_that_are_not_given():
    state = boot()
    assert set(state.cpus[0].gprs.values()) == {0}
    assert len(state.cpus[0].gprs) == 16
    assert state.cpus[0].xmm == (0,) * 16
    assert (state.cpus[0].rflags, state.cpus[0].mxcsr, state.cpus[0].fcw) == (2, 0x1F80, 0x37F)
    assert (state.cpus[0].idtr, state.cpus[0].rip) == ((0, 0), 0x10000)


def test_registers_that_are_given():
    given = (
        "{ rax = 1, r15 = 0xffffffffffffffff, rsp = 0x3f000, mxcsr = 0x9fc0, fcw = 0x27f, rflags = 0x202, "
    )
    state = boot(cpu=f"registers = {given} fs_base = 0x5000, gs_base = 0x6000, xmm3 = {1 << 127} }}")
    cpu = state.cpus[0]
    assert (cpu.gprs["rax"], cpu.gprs["r15"], cpu.gprs["rsp"]) == (1, (1 << 64) - 1, 0x3F000)
    assert (cpu.rflags, cpu.mxcsr, cpu.fcw) == (0x202, 0x9FC0, 0x27F)
    assert (cpu.segments["fs"].base, cpu.segments["gs"].base) == (0x5000, 0x6000)
    assert cpu.xmm[3] == 1 << 127


@pytest.mark.parametrize(
    ("cpu", "rflags"),
    [
        ("iopl = 3\nregisters = { rflags = 2 }", 0x3002),
        ("iopl = 1\nregisters = { rflags = 0x3202 }", 0x1202),
        ("iopl = 0\nregisters = { rflags = 0x3202 }", 0x202),
        ("registers = { rflags = 0x3000 }", 0x3002),
        ("iopl = 3", 0x3002),
    ],
)
def test_iopl_replaces_the_field_in_rflags(cpu, rflags):
    assert boot(cpu=cpu).cpus[0].rflags == rflags


@pytest.mark.parametrize(("mode", "limit"), [("long", 0xFFF), ("protected", 0x7FF), ("real", 0x3FF)])
def test_the_idt_has_256_gates_of_its_mode(mode, limit):
    assert boot(mode, cpu="idt = 0x18000").cpus[0].idtr == (0x18000, limit)


def test_page_tables_of_the_guests_own_are_used_as_they_are():
    state = boot(cpu="registers = { cr3 = 0x20018 }")
    assert state.cr3 == 0x20018
    assert (state.cr0, state.cr4, state.efer) == (0x8001_0033, 0x620, 0xD01)
    assert len(state.system.data) == PAGE
    assert state.gdtr[0] == state.system.gpa
    assert state.cpus[0].segments["tr"].base == state.system.gpa + 0x400


# Memory


def test_the_image_is_what_is_written_to_ram():
    state = boot(executable=(0x10000, 0x20FFF))
    assert state.writes == ((0x10000, b"\xf4"), (0x20FFF, b"\xf4"))
    assert state.memory == 0x40000


def test_code_frames_come_from_the_policy():
    assert boot(executable=(0x10000, 0x20FFF)).code_frames == ()
    loaded = boot(executable=(0x10000, 0x20FFF), rest="[policy]\ncode = 'load'")
    assert loaded.code_frames == (0x10000, 0x20000)


def test_the_same_guest_gives_the_same_machine():
    assert boot(rest=pmap(0x8000000, 0, 0x1000, "rw")) == boot(rest=pmap(0x8000000, 0, 0x1000, "rw"))
