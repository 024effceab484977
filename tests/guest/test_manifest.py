"""The rules of guest.toml, one row each."""

import re
from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmm.ept import PROFILES, Capabilities, EptProfile, Permission
from vmm.errors import ManifestError
from vmm.guest import Console, CpuSpec, End, Limits, MachineSpec, Mapping, Paging, Policy, ept, parse_manifest
from vmm.guest.manifest import REGISTERS
from vmm.guest.views import Restriction, ViewsSpec
from vmm.memory import PAGE

PATH = Path("here/guest.toml")
DOCS = Path(__file__).parents[2] / "docs" / "manifest.md"

TOP = 'schema = "vmm-guest/1"\nname = "t"\n'
IMAGE = '[image]\nformat = "flat"\nfile = "image.bin"\nload = 0x10000\n'
ELF_IMAGE = '[image]\nformat = "elf64"\nfile = "image.elf"\n'
MACHINE = '[machine]\nmemory = 0x400000\nmode = "long"\n'
PROTECTED = MACHINE.replace("long", "protected")
REAL = MACHINE.replace("long", "real")
CPU = "[cpu]\nentry = 0x10000\n"
GOOD = TOP + IMAGE + MACHINE + CPU
BIG = GOOD.replace("0x400000", "0x40000000")
FAR_BASE = "fs_base = 0x800000000000"
END_OF_4_GIB = {"gva": "0xfffff000", "length": "0x2000"}


def parse(text):
    return parse_manifest(text, PATH)


def mapping(**changes):
    values = {"gva": "0x8000000", "gpa": "0x10000", "length": "0x1000", "access": '"rx"', **changes}
    return "[[paging.map]]\n" + "".join(f"{key} = {value}\n" for key, value in values.items() if value)


def ept_map(**changes):
    values = {"gpa": "0x10000", "length": "0x1000", "access": '"r-x"', **changes}
    return "[[ept.map]]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())


def registers(text):
    return CPU + f"registers = {{ {text} }}\n"


def test_the_documented_example_means_what_it_says():
    text = re.search(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[1]
    manifest = parse(text)
    assert manifest.name == "alias-demo"
    assert manifest.image.file == Path("here/image.bin")
    assert manifest.image.symbols == Path("here/image.sym")
    assert manifest.image.load == 0x10000
    assert manifest.machine == MachineSpec(0x400000, "long")
    assert manifest.cpu == CpuSpec(
        entry=0x10000,
        cpl=3,
        iopl=3,
        registers={"rsp": 0x3F000, "rflags": 2, "mxcsr": 0x1F80, "fcw": 0x37F},
        idt=0x18000,
        rsp0=0x60000,
    )
    capabilities = Capabilities(pages_1g=False)
    assert manifest.ept == EptProfile(accessed_dirty=True, vm_functions=True, capabilities=capabilities)
    limit = Restriction(0, 0x20000, 0x1000, Permission.R, convertible=False)
    assert manifest.views == ViewsSpec(2, restrictions=(limit,), eptp_list=(0, 1))
    maps = (Mapping(0x8000000, 0x10000, 0x10000, "rx"), Mapping(0x9000000, 0x10000, 0x10000, "rw"))
    assert manifest.paging == Paging("rwx", maps)
    assert manifest.policy == Policy("step", "step", "fetch")
    assert manifest.console == Console(0xE9)
    assert manifest.end == End(0xF4, 0)
    assert manifest.limits == Limits(1_000_000, 60.0)


def test_every_key_of_the_format_is_documented():
    text = DOCS.read_text(encoding="utf-8")
    keys = """
        schema name summary  format file load symbols  memory mode  entry cpl iopl registers idt rsp0
        identity map gva gpa length access user  reads writes code wx  console.port
        input.port input.file clock.port clock.time  end.port end.value end.halt  limits.exits limits.seconds
        at bytes jump
    """
    assert [key for key in keys.split() if f"| `{key}` |" not in text] == []


def test_defaults():
    manifest = parse(GOOD)
    assert manifest.summary == ""
    assert manifest.cpu == CpuSpec(entry=0x10000)
    assert manifest.paging == Paging("rwx")
    assert (manifest.policy, manifest.console) == (Policy("step", "step", "fetch"), Console(0xE9))
    assert (manifest.end, manifest.limits) == (End(0xF4, None, halt=False), Limits(1_000_000, 300.0))


def test_elf_defaults_to_code_at_load_and_the_headers_entry():
    manifest = parse(TOP + ELF_IMAGE + MACHINE)
    assert (manifest.policy.code, manifest.cpu.entry) == ("load", None)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_by_its_name(name):
    assert parse(GOOD + f'[ept]\nprofile = "{name}"').ept == PROFILES[name]


def test_switches_and_capabilities_replace_those_of_the_profile():
    text = '[ept]\nprofile = "minimal"\ncapabilities = { accessed_dirty = true, physical_address_width = 36 }\n'
    minimal = PROFILES["minimal"].capabilities
    capabilities = evolve(minimal, accessed_dirty=True, physical_address_width=36)
    assert parse(GOOD + text).ept == EptProfile(capabilities=capabilities)
    enabled = EptProfile(capabilities=capabilities, accessed_dirty=True)
    assert parse(GOOD + text + "accessed_dirty = true").ept == enabled


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_the_values_of_a_profile_make_it_again(profile):
    assert ept.ept_from(ept.ept_values(profile), "here") == profile


def test_what_is_as_by_default_has_no_values():
    assert ept.ept_values(EptProfile()) == {}


def test_what_the_ept_allows_at_the_start():
    text = "[ept]\nmode_based_execute = true\n" + ept_map() + ept_map(gpa="0x20000", access='"r--u"')
    text += ept_map(gpa="0x30000", access='"r-x-"')
    assert parse(GOOD + text).ept_maps == (
        ept.EptMap(0x10000, PAGE, Permission.R | Permission.X),
        ept.EptMap(0x20000, PAGE, Permission.R, user_execute=True),
        ept.EptMap(0x30000, PAGE, Permission.R | Permission.X, user_execute=False),
    )


def test_every_switch_of_the_ept_is_documented():
    text = DOCS.read_text(encoding="utf-8")
    assert [key for key in ept.KEYS if f"| `{key}` |" not in text] == []


@pytest.mark.parametrize("value", ["0x10000", '"start"'])
def test_entry_is_an_address_or_a_symbol(value):
    assert parse(TOP + IMAGE + MACHINE + f"[cpu]\nentry = {value}").cpu.entry in (0x10000, "start")


def test_paging_without_identity_maps_nothing_else():
    assert parse(GOOD + "[paging]\n" + mapping()).paging.identity is None


def test_protected_and_real_mode_start_without_paging():
    assert parse(TOP + IMAGE + PROTECTED + CPU).paging is None
    assert parse(TOP + IMAGE + REAL + CPU).paging is None


def test_own_page_tables_leave_none_to_build():
    manifest = parse(TOP + IMAGE + MACHINE + registers("cr3 = 0x20000"))
    assert manifest.paging is None
    assert manifest.cpu.registers == {"cr3": 0x20000}


def test_halt_alone_leaves_no_end_port():
    assert parse(GOOD + "[end]\nhalt = true").end == End(None, None, halt=True)
    assert parse(GOOD + "[end]\nhalt = true\nport = 0xf4").end == End(0xF4, None, halt=True)


def test_later_mappings_win():
    paging = Paging("r", (Mapping(0x1000, 0x5000, 0x2000, "rx"), Mapping(0x2000, 0x9000, 0x1000, "rw")))
    assert [paging.resolve(a, 0x10000)[0] for a in (0x0, 0x1234, 0x2234, 0x3000)] == [
        0,
        0x5234,
        0x9234,
        0x3000,
    ]
    assert paging.resolve(0x10000, 0x10000) is None


# The bad input: (manifest, the key path that the message names, what it says of it or how to mend it).
RESTRICT = "[[views.restrict]]\n"

BAD = [
    # schema and name
    (GOOD.replace("vmm-guest/1", "vmm-guest/2"), "schema", "vmm-guest/1"),
    (GOOD.replace('schema = "vmm-guest/1"\n', ""), "schema", "missing"),
    (GOOD.replace('name = "t"\n', ""), "name", "missing"),
    (GOOD.replace('"t"', '""'), "name", "printable"),
    (GOOD.replace('"t"', '"a\\u001b[31m"'), "name", "printable"),
    (GOOD.replace('"t"', '"' + "t" * 101 + '"'), "name", "1 to 100"),
    (GOOD.replace('"t"', "1"), "name", "not a string"),
    ('summary = "a\\nb"\n' + GOOD, "summary", "one line"),
    # unknown keys, with the near ones suggested
    ("colour = 1\n" + GOOD, "colour", "unknown key"),
    (GOOD + "[polcy]\n", "polcy", '"policy"'),
    (GOOD.replace("memory", "memroy"), "[machine].memroy", '"memory"'),
    (GOOD + "idtr = 0", "[cpu].idtr", '"idt"'),
    (GOOD + "cr3 = 0x1000", "[cpu].cr3", "registers = { cr3"),
    (GOOD + "rip = 0x1000", "[cpu].rip", "give it as entry"),
    (GOOD.replace("load", "laod"), "[image].laod", '"load"'),
    (GOOD + "[end]\nprot = 1", "[end].prot", '"port"'),
    (GOOD + "[paging]\nidentiy = 'rwx'", "[paging].identiy", '"identity"'),
    (GOOD + mapping(acess='"rx"'), "[paging.map][0].acess", '"access"'),
    (TOP + IMAGE + MACHINE + registers("rip = 0"), "[cpu].registers.rip", "[cpu].entry"),
    (TOP + IMAGE + MACHINE + registers("eax = 0"), "[cpu].registers.eax", '"rax"'),
    (TOP + IMAGE + MACHINE + registers("xmm16 = 0"), "[cpu].registers.xmm16", '"xmm'),
    # TOML itself
    (GOOD + "entry = 1", "here/guest.toml", "TOML syntax"),
    (GOOD + "[machine]\n", "here/guest.toml", "TOML syntax"),
    ("schema =", "here/guest.toml", "TOML syntax"),
    ("x = " + "[" * 100_000, "here/guest.toml", "nested too deeply"),
    ("x = " + "9" * 5000, "here/guest.toml", "4300 digits"),
    # types
    ("image = 1\n" + TOP + MACHINE + CPU, "image", "not a table"),
    (GOOD.replace("0x400000", "true"), "[machine].memory", "true is not an integer"),
    (GOOD.replace("0x400000", "4194304.0"), "[machine].memory", "not an integer"),
    (GOOD.replace("0x400000", '"4M"'), "[machine].memory", "not an integer"),
    (GOOD.replace('"long"', "64"), "[machine].mode", '"long" or "protected" or "real"'),
    (GOOD.replace('"long"', '"Long"'), "[machine].mode", "not one of its values"),
    (GOOD + "cpl = true", "[cpu].cpl", "not an integer"),
    (GOOD + "registers = 1", "[cpu].registers", "not a table"),
    (GOOD + "[paging]\nmap = 1", "[paging].map", "not an array of tables"),
    (GOOD + "[paging.map]\ngva = 0", "[paging].map", "double brackets"),
    (GOOD + "[paging]\nmap = [1]", "[paging].map", "not an array of tables"),
    (GOOD + mapping(user="1"), "[paging.map][0].user", "not a boolean"),
    (GOOD + "[end]\nhalt = 'yes'", "[end].halt", "true or false"),
    (GOOD + "[limits]\nseconds = true", "[limits].seconds", "not a number"),
    # image
    (GOOD.replace('format = "flat"\n', ""), "[image].format", "missing"),
    (GOOD.replace('"flat"', '"pe"'), "[image].format", '"flat" or "elf64"'),
    (GOOD.replace('"image.bin"', '""'), "[image].file", "not usable text"),
    (GOOD.replace('"image.bin"', '"a\\u0000b"'), "[image].file", "not usable text"),
    (GOOD.replace("load = 0x10000\n", ""), "[image].load", "missing"),
    (GOOD.replace("load = 0x10000", "load = 0x400000"), "[image].load", "out of range"),
    (GOOD.replace("load = 0x10000", "load = -1"), "[image].load", "out of range"),
    (TOP + ELF_IMAGE + "load = 0\n" + MACHINE, "[image].load", "only flat"),
    (TOP + ELF_IMAGE + "symbols = 'a'\n" + MACHINE, "[image].symbols", "only flat"),
    # machine
    (TOP + IMAGE + CPU, "[machine].memory", "missing"),
    (GOOD.replace("0x400000", "0"), "[machine].memory", "out of range"),
    (GOOD.replace("0x400000", "0x400001"), "[machine].memory", "such as 0x400000"),
    (GOOD.replace("0x400000", "0x40001000"), "[machine].memory", "0x40000000"),
    (GOOD.replace("0x400000", "0x" + "f" * 6000), "[machine].memory", "out of range"),
    # cpu
    (TOP + IMAGE + MACHINE, "[cpu].entry", "missing"),
    (GOOD.replace("entry = 0x10000", "entry = 1.5"), "[cpu].entry", "not an integer"),
    (GOOD.replace("entry = 0x10000", "entry = ''"), "[cpu].entry", "not usable text"),
    (GOOD.replace("entry = 0x10000", "entry = 0x800000000000"), "[cpu].entry", "not canonical"),
    (TOP + IMAGE + PROTECTED + "[cpu]\nentry = 0x100000000", "[cpu].entry", "out of range"),
    (TOP + IMAGE + REAL + "[cpu]\nentry = 0x100000", "[cpu].entry", "0xfffff"),
    (GOOD + "cpl = 4", "[cpu].cpl", "out of range"),
    (GOOD + "iopl = -1", "[cpu].iopl", "out of range"),
    (TOP + IMAGE + REAL + CPU + "cpl = 3", "[cpu].cpl", "out of range"),
    (TOP + IMAGE + REAL + CPU + "rsp0 = 0x1000", "[cpu].rsp0", "real mode has no TSS"),
    (GOOD + "idt = 0x800000000000", "[cpu].idt", "not canonical"),
    (GOOD + "rsp0 = 0x1000000000000000", "[cpu].rsp0", "not canonical"),
    # registers
    (TOP + IMAGE + MACHINE + registers("rax = -1"), "[cpu].registers.rax", "out of range"),
    (TOP + IMAGE + MACHINE + registers("rax = 0x10000000000000000"), "[cpu].registers.rax", "out of range"),
    (TOP + IMAGE + PROTECTED + registers("rax = 0x100000000"), "[cpu].registers.rax", "out of range"),
    (TOP + IMAGE + PROTECTED + registers("r8 = 0"), "[cpu].registers.r8", "64-bit code only"),
    (TOP + IMAGE + MACHINE + registers("rflags = 8"), "[cpu].registers.rflags", "0x8"),
    (TOP + IMAGE + MACHINE + registers("rflags = 0x20002"), "[cpu].registers.rflags", "0x20000"),
    (TOP + IMAGE + MACHINE + registers("mxcsr = 0x11f80"), "[cpu].registers.mxcsr", "0x10000"),
    (TOP + IMAGE + MACHINE + registers("fcw = 0x10000"), "[cpu].registers.fcw", "out of range"),
    (TOP + IMAGE + MACHINE + registers(f"xmm0 = {1 << 128}"), "[cpu].registers.xmm0", "out of range"),
    (TOP + IMAGE + MACHINE + registers(FAR_BASE), "[cpu].registers.fs_base", "canonical"),
    (TOP + IMAGE + REAL + registers("gs_base = 8"), "[cpu].registers.gs_base", "multiple of 16"),
    (TOP + IMAGE + MACHINE + registers("cr3 = 0x400000"), "[cpu].registers.cr3", "out of range"),
    (TOP + IMAGE + MACHINE + registers("cr3 = 0x1001"), "[cpu].registers.cr3", "reserved bits"),
    (TOP + IMAGE + PROTECTED + registers("cr3 = 0x1000"), "[cpu].registers.cr3", "long-mode"),
    (TOP + IMAGE + MACHINE + registers("cr3 = 0x1000") + "[paging]\n", "[paging]", "own page tables"),
    # paging
    (TOP + IMAGE + REAL + CPU + "[paging]\n", "[paging]", "real mode has no paging"),
    (GOOD + "[paging]\nidentity = 'x'", "[paging].identity", "not one of its values"),
    (GOOD + mapping() + mapping(gva="0x8000010"), "[paging.map][1].gva", "such as 0x8000000"),
    (GOOD + mapping(gva=None), "[paging.map][0].gva", "missing"),
    (GOOD + mapping(gpa="0x10010"), "[paging.map][0].gpa", "not aligned"),
    (GOOD + mapping(gpa="0x400000"), "[paging.map][0].gpa", "out of range"),
    (GOOD + mapping(length="0"), "[paging.map][0].length", "out of range"),
    (GOOD + mapping(length="0x1001"), "[paging.map][0].length", "not aligned"),
    (GOOD + mapping(gpa="0x3ff000", length="0x2000"), "[paging.map][0].length", "out of RAM"),
    (GOOD + mapping(access=None), "[paging.map][0].access", "missing"),
    (GOOD + mapping(access='"wx"'), "[paging.map][0].access", "not one of its values"),
    (GOOD + mapping(gva="0x800000000000"), "[paging.map][0].gva", "canonical"),
    (GOOD + mapping(gva="0x7ffffffff000", length="0x2000"), "[paging.map][0].gva", "canonical"),
    (GOOD + mapping(gva="0xfffffffffffff000", length="0x2000"), "[paging.map][0].length", "wraps"),
    (GOOD + mapping(gva="0xfffffe0000000000"), "[paging.map][0].gva", "GDT and TSS"),
    (GOOD + mapping(gva="0xfffffdfffffff000", length="0x2000"), "[paging.map][0].gva", "GDT and TSS"),
    (GOOD + mapping(gva="0xfffffe00001ff000"), "[paging.map][0].gva", "GDT and TSS"),
    (TOP + IMAGE + PROTECTED + CPU + mapping(gva="0xffc00000"), "[paging.map][0].gva", "GDT and TSS"),
    (TOP + IMAGE + PROTECTED + CPU + mapping(gva="0x100000000"), "[paging.map][0].gva", "out of range"),
    (TOP + IMAGE + PROTECTED + CPU + mapping(**END_OF_4_GIB), "[paging.map][0].length", "wraps"),
    (GOOD + mapping() * 1025, "[paging].map", "at most 1024"),
    (BIG + mapping(gpa="0", length="0x40000000") * 5, "[paging.map][4].length", "altogether"),
    # policy, console, end, limits
    (GOOD + "[policy]\nreads = 'allow'", "[policy].reads", '"step" or "grant" or "adaptive"'),
    (GOOD + "[policy]\nwrites = 'grant'", "[policy].writes", '"step" or "window" or "adaptive" or "attribute"'),
    (GOOD + "[policy]\ncode = 'store'", "[policy].code", '"load" or "fetch" or "seal"'),
    (GOOD + "[policy]\nwx = true", "[policy].wx", '"off" or "fault" or "stop"'),
    (TOP + IMAGE + PROTECTED + CPU + "[policy]\nwx = 'fault'", "[policy].wx", "without page tables"),
    (TOP + IMAGE + REAL + CPU + "[policy]\nwx = 'stop'", "[policy].wx", "without page tables"),
    (GOOD + "[ept]\nprofile = 'big'", "[ept].profile", '"default" or "accessed-dirty"'),
    (GOOD + "[ept]\naccessed_dirty = 1", "[ept].accessed_dirty", "not a boolean"),
    (GOOD + "[ept]\naccessed_drity = true", "[ept].accessed_drity", "accessed_dirty"),
    (GOOD + "[ept]\nprofile = 'minimal'\naccessed_dirty = true", "[ept]", "on a processor without it"),
    (GOOD + ept_map(gpa="1"), "[ept.map][0].gpa", "not aligned"),
    (GOOD + ept_map(length="0"), "[ept.map][0].length", "out of range"),
    (GOOD + ept_map(gpa="0x3ff000", length="0x2000"), "[ept.map][0].length", "lies out of RAM"),
    (GOOD + ept_map(access='"rx"'), "[ept.map][0].access", "no access"),
    (GOOD + ept_map(access='"x--"'), "[ept.map][0].access", "no access"),
    (GOOD + ept_map(access='"r-xux"'), "[ept.map][0].access", "not usable text"),
    (GOOD + ept_map(access='"rwx"'), "[ept.map][0].access", "writable and executable"),
    (GOOD + ept_map(access='"r--u"'), "[ept.map][0].access", "needs mode-based execute control"),
    (GOOD + "[ept]\nmode_based_execute = true\n" + ept_map(access='"rw-u"'), "[ept.map][0].access", "executable"),
    (GOOD + ept_map() * 1025, "[ept].map", "at most 1024"),
    (GOOD + ept_map(sub_pages="1"), "[ept.map][0].sub_pages", "read-only page"),
    (GOOD + ept_map(access='"r--"', sub_pages="1"), "[ept.map][0].sub_pages", "with sub-page write permissions"),
    (GOOD + ept_map(access='"r--"', sub_pages="-1"), "[ept.map][0].sub_pages", "out of range"),
    (GOOD + "[ept]\ncapabilities = 1", "[ept].capabilities", "not a table"),
    (GOOD + "[ept.capabilities]\npages_1g = 'no'", "[ept].capabilities.pages_1g", "not a boolean"),
    (GOOD + "[ept.capabilities]\nwalk_length_4 = false", "[ept]", "no 4-level walk"),
    (GOOD + "[ept]\ncapabilities.physical_address_width = 9", "[ept].capabilities.physical_address_width", "out of"),
    (GOOD + "[views]\ncount = 65", "[views].count", "out of range"),
    (GOOD + "[views]\nviews = 2", "[views].views", "unknown key"),
    (GOOD + "[views]\ncount = 2\neptp_list = [0, 1]", "[views].eptp_list", "VMFUNC is not enabled"),
    (GOOD + "[ept]\nvm_functions = true\n[views]\neptp_list = [1]", "[views].eptp_list", "integers from 0 to 0x0"),
    (GOOD + "[ept]\nvm_functions = true\n[views]\neptp_list = 0", "[views].eptp_list", "not an array"),
    (GOOD + f"[ept]\nvm_functions = true\n[views]\neptp_list = {[0] * 513}", "[views].eptp_list", "too many"),
    (GOOD + "[views]\nve_area = 0x2000", "[views].ve_area", "#VE is not enabled"),
    (GOOD + "[views]\nve_area = 0x2008", "[views].ve_area", "not aligned"),
    (GOOD + "[views]\ndenied = 'ask'", "[views].denied", '"stop" or "fault"'),
    (GOOD + RESTRICT + "view = 1\ngpa = 0\naccess = '---'", "[views.restrict][0].view", "out of range"),
    (GOOD + RESTRICT + "view = 0\ngpa = 1\naccess = '---'", "[views.restrict][0].gpa", "not aligned"),
    (GOOD + RESTRICT + "view = 0\ngpa = 0\naccess = '-w-'", "[views.restrict][0].access", "not one of"),
    (
        GOOD + RESTRICT + "view = 0\ngpa = 0\naccess = 'r--'\nconvertible = true",
        "[views].restrict",
        "#VE is not enabled",
    ),
    (GOOD + "[[views.map]]\nview = 0\ngpa = 0\ntarget = 0", "[views.map][0].view", "out of range"),
    (GOOD + "[[views.map]]\nview = 1\ngpa = 0\ntarget = 0", "[views.map][0].view", "no view 1"),
    (GOOD + "[console]\nport = 0x10000", "[console].port", "out of range"),
    (GOOD + "[console]\nport = 0xf4", "[console].port", "[end].port too"),
    (GOOD + "[input]\nfile = 'x'", "[input].port", "missing"),
    (GOOD + "[input]\nport = 0xffff", "[input].port", "out of range"),
    (GOOD + "[input]\nport = 0xe8", "[input].port", "its 2 ports from 0xe8 on include 0xe9, which is [console].port"),
    (GOOD + "[input]\nport = 0xf4", "[input].port", "which is [end].port"),
    (GOOD + "[clock]\nport = 0xf3", "[clock].port", "its 3 ports from 0xf3 on include 0xf4"),
    (GOOD + "[clock]\nport = 0xe1\n[input]\nport = 0xe0", "[clock].port", "which is [input]'s"),
    (GOOD + "[clock]\nport = 0xe0\n[ipi]\nport = 0xe2", "[clock].port", "which is [ipi].port"),
    (GOOD + "[clock]\ntime = 1", "[clock].port", "missing"),
    (GOOD + "[clock]\nport = 0xe0\ntime = -1", "[clock].time", "out of range"),
    (GOOD + "[clock]\nport = 0xe0\ntime = 20000000000", "[clock].time", "out of range"),
    (GOOD + "[end]\nport = 0x10000", "[end].port", "out of range"),
    (GOOD + "[end]\nvalue = 256", "[end].value", "out of range"),
    (GOOD + "[end]\nhalt = true\nvalue = 1", "[end].value", "no port"),
    (GOOD + "[[hidden]]\nbytes = '90'", "[hidden][0].at", "missing"),
    (GOOD + "[[hidden]]\nat = 0", "[hidden][0]", "needs one of bytes and jump"),
    (GOOD + "[[hidden]]\nat = 0\nbytes = '90'\njump = 0", "[hidden][0]", "needs one of bytes and jump"),
    (GOOD + "[[hidden]]\nat = 0\nbytes = '9'", "[hidden][0].bytes", "hexadecimal digits"),
    (GOOD + "[[hidden]]\nat = -1\nbytes = '90'", "[hidden][0].at", "out of range"),
    (GOOD + "[policy]\ncoherence = 'explicit'\n[[hidden]]\nat = 0\nbytes = '90'", "[hidden][0]", "fetch side"),
    (TOP + IMAGE + REAL + CPU + "[[hidden]]\nat = 0\njump = 0", "[hidden][0].jump", "near jump"),
    (GOOD + "[limits]\nexits = 0", "[limits].exits", "out of range"),
    (GOOD + "[limits]\nseconds = 0", "[limits].seconds", "out of range"),
    (GOOD + "[limits]\nseconds = nan", "[limits].seconds", "out of range"),
    (GOOD + "[limits]\nseconds = inf", "[limits].seconds", "out of range"),
]


@pytest.mark.parametrize(("text", "place", "says"), BAD, ids=[f"{i}-{row[1]}" for i, row in enumerate(BAD)])
def test_bad_input_is_refused_at_its_key(text, place, says):
    with pytest.raises(ManifestError) as caught:
        parse(text)
    error = caught.value
    assert error.where == "here/guest.toml" + (f": {place}" if place != "here/guest.toml" else "")
    assert says in f"{error.what}; {error.fix}"
    assert str(error).isprintable()
    assert len(str(error)) < 500


def test_edges_of_the_reserved_window_can_be_mapped():
    below, above = mapping(gva="0xfffffdfffffff000"), mapping(gva="0xfffffe0000200000")
    assert len(parse(GOOD + below + above).paging.maps) == 2


def test_the_last_pages_of_both_halves_can_be_mapped():
    edges = ("0x7ffffffff000", "0xffff800000000000", "0xfffffffffffff000")
    assert len(parse(GOOD + "".join(mapping(gva=gva) for gva in edges)).paging.maps) == 3


VALUES = st.one_of(
    st.integers(-(1 << 70), 1 << 130).map(str),
    st.sampled_from(
        ["0", "4096", "0x10000", "0x400000", "true", "1.5", "inf", "1979-05-27", "[]", "{}", '"rx"']
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="'\n\r"), max_size=20).map(lambda s: f"'{s}'"),
)
KEYS = st.sampled_from(
    ["image.load", "image.file", "image.symbols", "machine.memory", "machine.mode", "end.halt", "cpu.load"]
    + [f"cpu.registers.{name}" for name in REGISTERS]
    + ["cpu.entry", "cpu.cpl", "cpu.iopl", "cpu.idt", "cpu.rsp0", "paging.identity", "end.port", "end.value"]
    + [
        "limits.exits",
        "limits.seconds",
        "console.port",
        "input.port",
        "input.file",
        "clock.port",
        "clock.time",
        "policy.code",
        "image.format",
        "paging.map",
        "machine",
    ]
)


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
@settings(max_examples=400, deadline=None)
def test_no_value_gets_anything_but_a_manifest_or_a_manifest_error(changes, elf):
    base = {
        "schema": '"vmm-guest/1"',
        "name": '"t"',
        "image.format": '"elf64"' if elf else '"flat"',
        "image.file": '"i"',
        "image.load": None if elf else "0x10000",
        "machine.memory": "0x400000",
        "machine.mode": '"long"',
        "cpu.entry": "0x10000",
    }
    lines = [f"{key} = {value}" for key, value in {**base, **changes}.items() if value is not None]
    assert_refused_or_read("\n".join(lines))


@given(st.integers(0, 600), st.integers(0, 600), st.text(max_size=8))
@example(0, 600, "")
@settings(max_examples=300, deadline=None)
def test_no_damage_to_the_text_gets_past_as_another_error(start, end, put):
    text = GOOD + mapping() + "[end]\nport = 0xf4\nvalue = 0\n[limits]\nexits = 10\n"
    assert_refused_or_read(text[:start] + put + text[end:])


def assert_refused_or_read(text):
    refused, memory = "", 4096
    try:
        memory = parse(text).machine.memory
    except ManifestError as error:
        refused = str(error)
    assert refused.isprintable()
    assert 4096 <= memory <= 1 << 30
