"""Every page of the documentation is followed from its first line to its last, as a newcomer would."""

import contextlib

import pytest
from pages import ROOT, Block, Reader, blocks_of, matches, provide_commands

from vmm.errors import ManifestError

#: Pages whose examples have tests of their own, which know what to do with them.
TESTED_ELSEWHERE = {
    "scripts.md": "tests/trace/test_script_docs.py",
    "manifest.md": "tests/guest/test_manifest.py",
    "formats.md": "tests/docs/test_formats.py",
}
#: Blocks that are not followed: by page and opening, how many there are, and why.
NOT_FOLLOWED = {
    ("README.md", "sh"): (2, "they set up an environment; one is the command that runs this test"),
    ("architecture.md", "text diagram"): (1, "a picture"),
}
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if page.name not in TESTED_ELSEWHERE
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_does_what_it_says(page, tmp_path):
    provide_commands(tmp_path / "bin")
    (tmp_path / "guest").mkdir()
    reader = Reader(tmp_path / "guest", tmp_path / "bin")
    for block in blocks_of(page):
        if (page.name, block.opening) not in NOT_FOLLOWED:
            reader.follow(block)


@pytest.mark.parametrize(("name", "opening"), NOT_FOLLOWED)
def test_what_is_not_followed_is_there(name, opening):
    openings = [block.opening for page in PAGES if page.name == name for block in blocks_of(page)]
    assert openings.count(opening) == NOT_FOLLOWED[name, opening][0]


@pytest.mark.parametrize(("name", "test"), TESTED_ELSEWHERE.items())
def test_what_is_tested_elsewhere_is(name, test):
    assert (ROOT / "docs" / name).exists()
    assert f'"{name}"' in (ROOT / test).read_text()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_no_fence_is_missed(page):
    text = page.read_text(encoding="utf-8")
    assert sum(line.lstrip().startswith(("```", "~~~")) for line in text.splitlines()) == 2 * len(blocks_of(page))


@pytest.fixture
def reader(tmp_path):
    provide_commands(tmp_path / "bin")
    (tmp_path / "guest").mkdir()
    return Reader(tmp_path / "guest", tmp_path / "bin")


def block(language, text, words=""):
    return Block(language, words, text, "page.md:1")


class TestReader:
    """The reader would notice."""

    def test_another_output(self, reader):
        reader.follow(block("sh", "echo one\n"))
        with pytest.raises(AssertionError, match="one"):
            reader.follow(block("text", "two\n"))

    def test_another_output_of_python(self, reader):
        reader.follow(block("python", "x = 1\n"))
        reader.follow(block("python", "print(x)\n"))
        with pytest.raises(AssertionError):
            reader.follow(block("text", "2\n"))

    @pytest.mark.parametrize("text", ["false\necho on\n", "exit 3\n", "nosuchcommand\n"])
    def test_a_command_that_fails(self, reader, text):
        with pytest.raises(AssertionError, match="exit status"):
            reader.follow(block("sh", text))

    def test_a_manifest_that_is_none(self, reader):
        with pytest.raises(ManifestError, match="schema"):
            reader.follow(block("toml", "x = 1\n"))

    @pytest.mark.parametrize(("language", "words"), [("text", ""), ("c", ""), ("", ""), ("sh", "later")])
    def test_a_block_that_nothing_is_done_with(self, reader, language, words):
        with pytest.raises(LookupError):
            reader.follow(block(language, "x\n", words))

    @pytest.mark.parametrize(
        ("text", "same"),
        [
            ("jmp 0xffff8123 <f+0x10>   1,234  e9fb\n", True),
            ("jmp 0xffff81 <f+0x9> 7 90\n", True),
            ("jmp 0xffff8123 <g+0x10>   1,234  e9fb\n", False),
            ("jmp 0xffff8123 <f>   1,234  e9fb\n", False),
            ("call 0xffff8123 <f+0x10>   1,234  e9fb\n", False),
        ],
    )
    def test_figures_may_be_others_and_nothing_else(self, reader, text, same):
        reader.follow(block("sh", "echo 'jmp 0xffff8123 <f+0x10>   1,234  e9fb'\n"))
        with contextlib.nullcontext() if same else pytest.raises(AssertionError):
            reader.follow(block("text", text, "figures"))

    def test_an_output_is_that_of_the_block_before_it(self, reader):
        reader.follow(block("sh", "echo one\n"))
        reader.follow(block("script", "", "a.script"))
        with pytest.raises(LookupError):
            reader.follow(block("text", "one\n"))

    def test_what_needs_a_missing_program_is_left_out_with_its_output(self, reader):
        reader.follow(block("sh", "exit 1\n", "needs no-such-program"))
        reader.follow(block("text", "anything\n"))
        with pytest.raises(AssertionError):
            reader.follow(block("sh", "exit 1\n", "needs sh"))


@pytest.mark.parametrize(
    ("expected", "same"),
    [
        ("a\nb\nc\nd", True),
        ("a\n...", True),
        ("...\nd", True),
        ("a\n...\nd", True),
        ("...\nb\n...\nd", True),
        ("a\nb\nc\nd\n...", True),
        ("...", True),
        ("a", False),
        ("...\nc", False),
        ("...\nc\nb\n...", False),
        ("...\nc\n...\nb\n...", False),
        ("...\nc\n...\nc\nd", False),
        ("b\n...", False),
        ("a\nb\n...\nb\nc\nd", False),
    ],
)
def test_three_dots_stand_for_lines(expected, same):
    assert matches(expected + "\n", "a\nb\nc\nd\n") == same
