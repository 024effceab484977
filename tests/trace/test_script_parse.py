"""What the parser of expectation scripts refuses, and how it says so."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from script_runs import SYMBOLS, refusal, script

from vmm.errors import ScriptError
from vmm.trace.script import Script

# script without its first line, line of the error, what it must say
ERRORS = [
    # statements
    ("bogus", 2, "expected a statement, found `bogus`"),
    ("\n\nmodifcation gpa=1", 4, "did you mean `modification`"),
    ("exit HLT exit", 2, "expected a field of exit HLT, found `exit`"),
    ("exit HLT\n}", 3, "this `}` closes nothing"),
    ("exit HLT\nonly exits", 3, "`only` comes too late"),
    ("only exist", 2, "expected a kind of record, found `exist`; did you mean `exit`?"),
    ("only exits modifications", 2, "expected `,` or the end of the line, found `modifications`"),
    ("next", 2, "expected a kind of record, found the end of the script"),
    ("= 5", 2, "expected a statement, found `=`"),
    ("\x00", 2, "found `\\x00`"),
    # labels and fields
    ("exit EPT_VIOLATON", 2, "found `EPT_VIOLATON`; did you mean `EPT_VIOLATION`?"),
    ("exit ept_violation", 2, "did you mean `EPT_VIOLATION`?"),
    ("exit 47", 2, "expected the number of an exit reason, found `47`"),
    (
        "exit EPT_VIOLATION gpaa=1",
        2,
        "expected a field of exit EPT_VIOLATION, found `gpaa`; did you mean `gpa`?",
    ),
    ("exit HLT gpa=1", 2, "the fields of exit HLT are"),
    ("modification gpa", 2, "expected an operator after `gpa`, found the end of the script"),
    ("modification store gpa==1", 2, "expected an operator after `gpa`, found `==`"),
    ("modification gpa starts 1", 2, "`starts` does not go with `gpa`, which holds a number"),
    ("modification new < 90", 2, "`<` does not go with `new`, which holds bytes"),
    ("modification aliases in 1..2", 2, "`in` does not go with `aliases`, which holds a list of numbers"),
    ("modification\n  and gpa=", 3, "expected a number, found the end of the script"),
    # values
    ("modification gpa=patch_sit", 2, "the image has no symbol `patch_sit`; did you mean `patch_site`?"),
    ("modification gpa=zzz", 2, "the image has no symbol `zzz`; write a number"),
    ("modification gpa=0xzz", 2, "expected a number, found `0xzz`"),
    ("modification gpa=12ab", 2, "expected a number, found `12ab`"),
    ("modification gpa=0x10000000000000000", 2, "is too large"),
    ("modification gpa=" + "9" * 5000, 2, "is too large"),
    ("modification gpa=(1+2", 2, "expected `)`, found the end of the script"),
    ("modification gpa=1+2&3", 2, "mixed in one sum"),
    ("modification gpa=1|2&3", 2, "`&` and `|` are mixed in one sum"),
    ("modification gpa=" + "(" * 40, 2, "parentheses are nested too deeply"),
    ("modification gpa=1" + "+1" * 100, 2, "this sum is too long"),
    ("modification gpa in 5", 2, "expected `..`, found the end of the script"),
    ("modification gpa < none", 2, "`< none` means nothing"),
    ("modification new=xyz", 2, "expected bytes, found `xyz`"),
    ("modification new=b8020", 2, "`b8020` is not a row of whole bytes"),
    ('modification new="zz"', 2, "`zz` is not a row of whole bytes"),
    ("modification aliases=5", 2, "expected `[`, found `5`"),
    ("modification aliases=[1 2]", 2, "expected `,` or `]`, found `2`"),
    ("modification aliases=[1,", 2, "expected a number, found the end of the script"),
    ('exit IO_INSTRUCTION direction="in', 2, 'expected a text in double quotes, found `"in`'),
    ('console contains "\\q"', 2, "unknown escape `\\q`"),
    # captures
    ("modification gpa=$page", 2, "nothing before this line captures `$page`; capture it in an earlier line"),
    ("exit EPT_VIOLATION gpa as $page\nmodification gpa=$pgae", 3, "did you mean `page`?"),
    ("modification gpa as page", 2, "expected a name with `$`, found `page`"),
    ("never modification gpa as $page", 2, "`as` cannot capture here"),
    ("\nnever modification gpa=$page", 3, "nothing in this script captures `$page`"),
    ("modification new as $v\nmodification gpa=$v", 3, "`$v` holds bytes, and a number is needed here"),
    (
        "modification new as $v\nmodification gpa as $v",
        3,
        "`$v` held bytes before and would now hold a number",
    ),
    ("never modification gpa=$v\nmodification new as $v", 2, "`$v` holds bytes, and a number is needed here"),
    ("modification old=.nwe", 2, "this record has no field `.nwe`; did you mean `new`?"),
    ("modification gpa=.new", 2, "`.new` holds bytes, and a number is needed here"),
    # watches
    ("exactly exit HLT", 2, "expected a count, found `exit`"),
    ("exactly 0x5 exit HLT", 2, "expected a count, found `0x5`"),
    ("exactly 2..3 exit HLT", 2, "expected a kind of record, found `..`"),
    ("5 exit HLT", 2, "a bare `5` does not count records; write `exactly 5`"),
    ("4..2 exit HLT", 2, "`4..2` ends before it begins"),
    ("at 5 exit HLT", 2, "expected `least` or `most`, found `5`"),
    ("never exit HLT -> stop", 2, "`never` cannot act"),
    ("whenever exit HLT", 2, "expected `->` and an action, found the end of the script"),
    ("never exit HLT until", 2, "expected a kind of record, found the end of the script"),
    ("repeat 2 {\n never exit HLT\n exit HLT\n}", 3, "`never` stands directly inside of a repeat"),
    # blocks
    ("repeat {", 2, "expected a count, found `{`"),
    ("repeat 3 exit HLT", 2, "expected `{`, found `exit`"),
    ("modification gpa=\nexit HLT", 2, "expected a number, found the end of the line"),
    (
        "repeat 3 {\nexit HLT\n",
        4,
        "expected `}`, found the end of the script; close the block that line 2 opens",
    ),
    ("repeat 3 {\n}", 2, "this `repeat` block is empty"),
    ("repeat 0 { exit HLT }", 2, "never does anything"),
    ("repeat 3 { repeat 0..1 { exit HLT } }", 2, "could go round without any record"),
    ("any { exit HLT }", 2, "expected `order`, found `{`"),
    ("either { exit HLT }", 2, "expected `or {`"),
    ("either { exit HLT } or { repeat at most 1 { exit } }", 2, "could be taken without any record"),
    ("section { never exit HLT }", 2, "nothing says where this section ends"),
    ("section { exit HLT\n repeat at least 1 { exit } }", 2, "nothing says where this section ends"),
    ("repeat 1..2 { exit }\nsection { exit HLT }", 3, "nothing says where this section begins"),
    ("repeat 1..2 { section { exit HLT } }", 2, "nothing says where this section begins"),
    ("either { section { exit HLT } } or { exit }", 2, "nothing says where this section begins"),
    ("repeat 1 {" * 40, 2, "blocks are nested too deeply"),
    ('section {\nexit HLT\nconsole contains "x"\n}', 4, "`console` stands inside of a block"),
    ("console has", 2, "expected `contains`, `lacks` or `is`, found `has`"),
    ("console contains ok", 2, "expected a text in double quotes, found `ok`"),
    # reasons
    ("exit HLT because", 2, "expected a text in double quotes, found the end of the script"),
    ("exit HLT because the guest is done", 2, "expected a text in double quotes, found `the`"),
    ("exit HLT\n  because 'done'", 3, "expected a text in double quotes, found `'`"),
    ('exit HLT because "\\q"', 2, "unknown escape `\\q`"),
    ('exit HLT because " "', 2, "the reason is empty"),
    ('exit HLT because "a" because "b"', 2, "expected the end of the line behind the reason, found `because`"),
    ('exit HLT because "a" -> stop', 2, "found `->`; write `because` last"),
    ('exit HLT because "a"\n  and rip=1', 3, "found `and`; write `because` last"),
    ('never exit HLT because "a" until exit CPUID', 2, "found `until`; write `because` last"),
    ('whenever exit HLT -> stop\n  because "a"', 3, "`whenever` demands nothing and takes no `because`"),
    ('whenever exit HLT because "a" -> stop', 2, "`whenever` demands nothing and takes no `because`"),
    ('because "a"', 2, "this `because` is the reason of nothing; write it at the end of a record line"),
    ('repeat 2 {\n because "a"\n exit HLT\n}', 3, "this `because` is the reason of nothing"),
    ('repeat 2 {\n exit HLT\n}\nbecause "a"', 5, "this `because` is the reason of nothing"),
    ('only exits because "a"', 2, "this `because` is the reason of nothing"),
    ('exit HLT becuase "a"', 2, "found `becuase`; did you mean `because`?"),
    ('exit HLT -> stop becuase "a"', 2, "found `becuase`; did you mean `because`?"),
    ('exit HLT\n  becuase "a"', 3, "found `becuase`; did you mean `because`?"),
    ('console is "a" becuase "b"', 2, "found `becuase`; did you mean `because`?"),
    ("exit EPT_VIOLATION cause=store", 2, "found `cause`; the fields of exit EPT_VIOLATION are"),
    # actions
    ("exit HLT -> injekt vector=1", 2, "expected an action, found `injekt`; did you mean `inject`?"),
    ("exit HLT -> inject", 2, "expected `vector=`, found the end of the script"),
    ("exit HLT -> inject vector 14", 2, "expected `=` after `vector`, found `14`"),
    ("exit HLT -> inject vector=256", 2, "`256` is out of range for vector; use 0..0xff"),
    ("exit HLT\n  -> inject vector=14 eror=2", 3, "expected the end of the line, found `eror`"),
    ("exit HLT -> write gpa=1", 2, "expected `bytes=`"),
    ("exit HLT -> protect gpa=1 length=1 access=xyz", 2, "expected an access, found `xyz`"),
    ("exit HLT -> answer 5", 2, "`answer` needs a port that is being read"),
    ("modification -> inject vector=1", 2, "`inject` acts at a VM exit, and this line expects modification"),
]


@pytest.mark.parametrize(("body", "line", "says"), ERRORS, ids=range(len(ERRORS)))
def test_a_malformed_script_is_refused_with_file_line_and_expectation(body, line, says):
    error = refusal(body)
    assert error is not None
    assert error.where == f"expect.script:{line}"
    assert says in str(error)
    assert "\n" not in str(error)
    assert error.fix


@pytest.mark.parametrize("text", ["", "\n", "exit HLT", "vmm-script/2\n", " # vmm-script/1", "vmm-script/1x"])
def test_the_first_line_names_the_format(text):
    with pytest.raises(ScriptError, match=r"expect\.script:1: expected `vmm-script/1`"):
        Script.parse(text, file="expect.script", symbols={})


def test_layout_is_free_where_it_does_no_harm():
    plain = script("exit HLT rip=1\nmodification gpa=1 and new=90\n")
    for body in (
        "exit HLT rip = 1;modification gpa=1 new=90",
        "\r\n  exit HLT   rip=1 # a\r\n\n# b\n  modification\n\n  # c\n   and gpa=1\n\tand new=90",
    ):
        assert _shape(script(body)) == _shape(plain)


def _shape(parsed):
    return [
        (node.pattern.title(), [(c.field, c.operator, c.value) for c in node.pattern.conditions])
        for node in parsed.program.root.body
    ]


def test_a_comment_sign_in_a_text_is_text():
    assert script('console contains "# no comment"').program.console[0].text == "# no comment"


def test_escapes_in_texts():
    assert script(r'console is "a\n\t\"\\\x1b"').program.console[0].text == 'a\n\t"\\\x1b'


def test_a_reason_ends_a_line_that_expects_a_record_a_watch_or_a_console_check():
    parsed = script(
        'exit EPT_VIOLATION gpa as $page -> stop because "one"\n'
        'modification because "two"; modification new=b8 02\n  # not yet\n\n  because "t\\x68ree" # so\n'
        'never exit HLT until exit CPUID because "four"\n'
        'section "s" { 1..2 injections vector=3\n because "five"\n exit HLT }\n'
        'console is "out"\n because "six"\n'
        "exit HLT"
    ).program
    *lines, section, last = parsed.root.body
    assert [line.because for line in (*lines, last)] == ["one", "two", "three", ""]
    assert [watch.because for watch in (*parsed.root.watches, *section.watches)] == ["four", "five"]
    assert [check.because for check in parsed.console] == ["six"]


def test_because_is_no_label_unless_in_quotes():
    labels = script('block because "a"\nblock "because" because "b"').program.root.body
    assert [line.pattern.label for line in labels] == [None, "because"]


def test_the_search_for_close_symbols_stays_quick():
    symbols = {f"symbol_{n:06}": n for n in range(200_000)}
    with pytest.raises(ScriptError, match="did you mean"):
        script("modification gpa=symbol_00001", symbols=symbols)


def test_a_script_file_is_loaded(tmp_path):
    path = tmp_path / "expect.script"
    path.write_text("vmm-script/1\nmodification gpa=patch_site\n")
    assert Script.load(path, symbols=SYMBOLS).file == str(path)


@pytest.mark.parametrize(
    ("data", "says"),
    [(None, "cannot be read"), (b"vmm-script/1\n\xff", ":2: is not UTF-8"), (b" " * (5 << 20), "too large")],
)
def test_a_script_file_that_cannot_be_read_is_refused(tmp_path, data, says):
    path = tmp_path / "expect.script"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ScriptError, match=says):
        Script.load(path, symbols={})


VOCABULARY = """
    exit exits HLT EPT_VIOLATION 48 modification block end port next only never exactly at least most whenever
    until because repeat any order either or section console contains is as in has lacks starts and none
    gpa new old aliases rip $page $v .gpa .new = == != < <= + - & | ( ) [ ] { } , ; -> .. 0x10 5 b802 90
    patch_site nothing "text" " # \\ inject vector error write bytes protect length
    access r-x answer stop \0 é
"""


@given(st.lists(st.sampled_from([*VOCABULARY.split(), "\n", "\n"]), max_size=40))
def test_any_row_of_words_is_parsed_or_refused(words):
    error = refusal(" ".join(words))
    assert error is None or error.where.startswith("expect.script:")


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text):
    for whole in (text, "vmm-script/1\n" + text):
        with contextlib.suppress(ScriptError):
            Script.parse(whole, file="f", symbols={})
