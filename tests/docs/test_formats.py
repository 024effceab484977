"""`docs/formats.md` shows what is written, and names all that can be."""

import json
import re
import struct

import attrs
import pytest
from guest.elf_builder import Elf, Load
from pages import ROOT, blocks_of

from vmm.commands.audit import audit_file, document
from vmm.commands.run import RunRequest, run
from vmm.exits import ExitReason
from vmm.inputs import KINDS
from vmm.trace.fields import Schema
from vmm.trace.reading import BETWEEN

PAGE = ROOT / "docs" / "formats.md"
TEXT = PAGE.read_text(encoding="utf-8")
assert PAGE.name == "formats.md"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The lines of a trace, and of one of a guest that is given something to read; a state."""
    folder = tmp_path_factory.mktemp("formats")
    trace, state = folder / "run.jsonl", folder / "state.json"
    request = RunRequest("alias-patch", trace=str(trace), state=str(state), hashes=("0x10000:16",), quiet=True)
    assert run(request) == 0
    given = folder / "contract.jsonl"
    assert run(RunRequest("contract", trace=str(given), quiet=True)) == 0
    lines = [json.loads(line) for path in (trace, given) for line in path.read_text().splitlines()]
    return lines, json.loads(state.read_text())


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """The document of an audit that finds a text relocation."""
    path = tmp_path_factory.mktemp("audit") / "image"
    path.write_bytes(with_text_relocation())
    return document([audit_file(str(path))])


def with_text_relocation():
    """Code at 0x10000, and at 0x20000 a dynamic table and one R_X86_64_RELATIVE relocation, of 0x10004."""
    table = [(7, 0x20030), (8, 24), (0, 0)]  # DT_RELA, DT_RELASZ, DT_NULL
    data = b"".join(struct.pack("<QQ", *entry) for entry in table) + struct.pack("<QQQ", 0x10004, 8, 0)
    loads = [Load(0x10000, bytes(64)), Load(0x20000, data, flags=6)]
    return Elf([*loads, Load(0x20000, b"", type=2, flags=6), Load(0, b"", type=0x6474E551, flags=6)]).build()


def shows(example, real):
    """Whether an example is the real thing, but for what ``…`` leaves out at the end of a text or of an object."""
    if isinstance(example, dict):
        there = {key: value for key, value in example.items() if key != "…"}
        whole = "…" in example or there.keys() == real.keys()
        return whole and all(key in real and shows(value, real[key]) for key, value in there.items())
    if isinstance(example, list):
        return len(example) == len(real) and all(map(shows, example, real))
    if isinstance(example, str) and example.endswith("…"):
        return real.startswith(example[:-1])
    return example == real


@pytest.mark.parametrize("block", blocks_of(PAGE), ids=lambda block: block.where)
def test_an_example_is_real(block, written, audited):
    trace, state = written
    example = json.loads(block.text)
    documents = [state, audited]
    candidates = [one for one in documents if one["schema"] == example.get("schema")] or trace
    assert any(shows(example, real) for real in candidates)


def test_every_kind_of_record_has_a_section():
    titles = re.findall(r"^### `(\w+)`", TEXT, re.MULTILINE)
    assert sorted(titles) == sorted([*Schema.of_records().kinds, *BETWEEN])


@pytest.mark.parametrize("reason", ExitReason, ids=lambda reason: reason.name)
def test_every_exit_is_in_the_table_with_its_fields(reason):
    (row,) = re.findall(rf"^\| (.*`{reason.name}`.*)$", TEXT, re.MULTILINE)
    _, numbers, keys = (cell.strip() for cell in row.removesuffix("|").split("|"))
    assert str(int(reason)) in numbers.split(", ")
    fields = Schema.of_records().exits[reason.name].keys() - {"rip", "reason", "number", "vcpu"}
    assert {field for field in fields if f"`{field}`" not in keys} == set()


@pytest.mark.parametrize("name", KINDS)
def test_every_input_is_in_the_table_with_its_fields(name):
    section = TEXT[TEXT.index("### `input`") : TEXT.index("### `state`")]
    (row,) = re.findall(rf"^\| `{name}` \| (.*?) \|", section, re.MULTILINE)
    assert {field.name for field in attrs.fields(KINDS[name]) if f"`{field.name}`" not in row} == set()


def test_every_end_is_in_the_table():
    source = "".join(path.read_text() for path in (ROOT / "vmm").rglob("*.py"))
    ends = set(re.findall(r'finish\("([^"]+)"', source)) | {"error"}
    table = TEXT[TEXT.index("### `end`") : TEXT.index("## A final state")]
    rows = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall("`([^`]+)`", row)} == ends


def test_every_register_of_a_state_is_named(written):
    _, state = written
    section = TEXT[TEXT.index("## A final state") :]
    (row,) = re.findall(r"^\| `registers` \| (.*) \|$", section, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", row)) | {f"r{i}" for i in range(8, 16)} | {f"xmm{i}" for i in range(16)}
    named |= {"rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"}
    assert named == set(state["registers"])


def test_every_key_of_an_audit_is_named(audited):
    section = TEXT[TEXT.index("## An audit") :]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    named = {name for row in rows for name in re.findall("`(\\w+)`", row)}
    (image,) = audited["images"]
    (finding,) = image["findings"]
    assert named == (audited.keys() | image.keys() | finding.keys()) - {"schema", "findings"}
