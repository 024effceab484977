"""What a divergence says, and what the matcher costs."""

import gc
import time

import pytest
from script_runs import RecordedActions, records, script, verdict

from vmm.trace.matcher import Matcher

BODY = """\
# the patch
exit EPT_VIOLATION gpa as $page
modification gpa=0x1003 new=b8020000
end port value=0x88
"""
RUN = """\
exit CPUID rip=1
exit EPT_VIOLATION gpa=0x1003
modification gpa=0x1003 new=b8030000
exit HLT
end port value=0x88
"""


def report(body, run):
    return verdict(body, run).divergence.render()


def test_the_report_reads_like_this():
    assert (
        report(BODY, RUN)
        == """\
expect.script:4: the run ended before this modification came

  script
        2 | # the patch
        3 | exit EPT_VIOLATION gpa as $page
  >     4 | modification gpa=0x1003 new=b8020000
        5 | end port value=0x88
        6 |

  run
        #1 exit CPUID rip=1
  +     #2 exit EPT_VIOLATION gpa=0x1003   <- line 3
  ~     #3 modification gpa=0x1003 new=b8030000
        #4 exit HLT
        #5 end port value=0x88

  #3 modification at 0x1003: line 4 wants new = b8020000, but it is b8030000
  $page = 0x1003"""
    )


def test_a_strict_line_names_the_record_that_came_instead():
    text = report(
        "exit CPUID\nnext modification gpa=1",
        "exit CPUID; exit HLT; modification gpa=1; exit CPUID; exit RDTSC",
    )
    assert "expect.script:3: `next` wants modification here, but #2 came" in text
    assert "  >     #2 exit HLT" in text
    assert "line 3 wants modification, but #2 is exit HLT" in text
    assert "#4" in text
    assert "#5" not in text


def test_near_misses_are_explained_field_by_field_in_the_words_of_the_script():
    run = "modification gpa=0x1004 new=91 aliases=[1]; modification gpa=0x1003 new=90 aliases=[2]"
    text = report("modification gpa=patch_site new=90 aliases has 1 gva=none rip!=none", run)
    assert "gpa = patch_site (0x1003), but it is 0x1004; and new = 90, but it is 91; and rip != none" in text
    assert "#2 modification at 0x1003: line 2 wants aliases has 1, but it is [2]; and rip != none" in text
    assert text.index("#2 modification at") < text.index("#1 modification at")


def test_ranges_masks_captures_and_sums_are_resolved():
    run = "exit EPT_VIOLATION gpa=0x1003 qualification=0x181"
    assert "qualification has 3, but it is 0x181 (without bits 0x2)" in report(
        "exit 48 qualification has 3", run
    )
    assert "gpa in start..start+1 (0x1000..0x1001), but it is 0x1003" in report(
        "exit 48 gpa in start..start+1", run
    )
    assert "gpa = $p+1 (0x1004), but it is 0x1003" in report(
        "exit 48 gpa as $p\nexit 48 gpa=$p+1", run + ";" + run
    )
    unmade = "either { exit HLT rip as $r } or { exit 48 }\nexit 48 gpa=$r"
    assert "gpa = $r, but `$r` has no value yet" in report(unmade, run + ";" + run)


def test_a_near_miss_far_back_is_still_shown():
    text = report(
        "modification gpa=5 new=90", "exit HLT;" * 50 + "modification gpa=5 new=91;" + "exit HLT;" * 500
    )
    assert "~    #51 modification gpa=5 new=91" in text
    assert "… 47 more" in text
    assert "… 495 more" in text


def test_the_records_right_after_the_last_line_that_was_met_are_shown():
    text = report("exit CPUID\nmodification", "exit RDTSC;" * 9 + "exit CPUID;" + "exit HLT;" * 50)
    assert [line.split()[:3] for line in text.splitlines()[8:12]] == [
        ["…", "9", "more"],
        ["+", "#10", "exit"],
        ["#11", "exit", "HLT"],
        ["#12", "exit", "HLT"],
    ]


def test_without_a_near_miss_the_report_says_that_nothing_came():
    text = report("exit HLT\nmodification gpa=5\nexit HLT", "exit HLT; exit HLT")
    assert "no modification came since the line before was met" in text


def test_never_and_counts_name_the_record():
    assert "`never exit HLT`, but #2 is one" in report("never exit HLT", "exit CPUID; exit HLT")
    assert "`at most 1 exit HLT` allows 1, and #2 is one more (2)" in report(
        "at most 1 exit HLT", "exit HLT; exit HLT"
    )
    text = report("exactly 2 modifications gpa=1", "modification gpa=1; modification gpa=2")
    assert "`exactly 2 modification` wanted 2 by the end of the run, but 1 came" in text
    assert "#2 modification at 2: line 2 wants gpa = 1, but it is 2" in text


REASONS = [
    # body, run, the reason that is shown (none: no line for it)
    ('exit HLT because "it has to stop"', "exit CPUID", "it has to stop"),
    ('exit CPUID because "a"\nexit HLT because "b"', "exit CPUID", "b"),
    ('exit CPUID because "a"\nexit HLT', "exit CPUID", None),
    ('exit CPUID\nnext exit HLT because "at once"', "exit CPUID; exit RDTSC; exit HLT", "at once"),
    ('never exit HLT because "it must go on"\nexit CPUID because "b"', "exit HLT", "it must go on"),
    ('at most 1 exit HLT because "once is enough"', "exit HLT; exit HLT", "once is enough"),
    ('exactly 2 exits HLT because "both halt"', "exit HLT", "both halt"),
    ('at least 1 exit HLT until exit CPUID because "first"', "exit CPUID; exit HLT", "first"),
    ('section {\nexactly 1 exit CPUID because "one each"\nexit HLT\n}', "exit HLT", "one each"),
    ('section until exit HLT {\nexit CPUID because "within"\n}', "exit HLT", "within"),
    ('section until exit HLT {\nexit CPUID because "within"\n}', "exit CPUID", None),
    ('console contains "ok" because "it must be told"', 'console "no"', "it must be told"),
    ('console lacks "bad" because "all is well"\nconsole is "x" because "b"', 'console "bad"', "all is well"),
    ('any order {\nexit CPUID because "a"\nexit HLT because "b"\n}', "exit CPUID", "b"),
    ('any order {\nexit CPUID because "a"\nexit HLT because "b"\n}', "exit RDTSC", "a"),
    ('any order {\nnext exit CPUID rip=1 because "a"\nnext exit HLT rip=1 because "b"\n}', "exit HLT rip=2", "b"),
    ('either { exit CPUID because "a"\n} or { exit HLT because "b"\n}', "exit RDTSC", "a"),
    ('either { exit CPUID; exit HLT because "a"\n} or { exit RDTSC because "b"\n}', "exit CPUID", "a"),
]


@pytest.mark.parametrize(("body", "run", "reason"), REASONS, ids=range(len(REASONS)))
def test_the_reason_of_the_statement_that_failed_stands_below_the_headline(body, run, reason):
    divergence = verdict(body, run).divergence
    _, below, *_ = divergence.render().split("\n")
    assert divergence.because == (reason or "")
    assert below == (f"because: {reason}" if reason else "")


def test_an_action_that_cannot_be_done_shows_the_reason_of_its_line():
    body = 'exit CPUID leaf as $v -> inject vector=$v because "the guest asked for it"'
    divergence = verdict(body, "exit CPUID leaf=0x100", actions=RecordedActions()).divergence
    assert "the action cannot be done at #1" in divergence.what
    assert divergence.because == "the guest asked for it"


def test_a_reason_is_one_line_and_reaches_no_terminal_raw():
    divergence = verdict(r'exit HLT because "a\nb\x1b[2J"', "").divergence
    assert "because: a\\nb\\x1b[2J\n\n" in divergence.render()
    assert divergence.because == "a\nb\x1b[2J"
    assert "\x1b[33mbecause: a\\nb\\x1b[2J\x1b[0m\n" in divergence.render(color=True)


def test_other_lines_that_were_possible_are_named():
    text = report("any order {\nexit CPUID\nexit HLT\n}", "exit RDTSC")
    assert "also possible here: line 4" in text


def test_the_console_is_shown_where_it_matters():
    text = report('console contains "ok"', 'console "pan"; console "ic\\x1b[2J\\n"')
    assert 'the console output does not contain "ok"' in text
    assert 'the console shows "panic\\x1b[2J\\n"' in text


def test_nothing_from_the_guest_reaches_the_terminal_raw():
    run = [{"kind": "end", "reason": "\x1b]0;x\x07", "rip": 5, "spare": "\x9b1m"}, {"kind": "\x1b[2J"}]
    plain = verdict("next end port", run).divergence
    assert "\x1b" not in plain.render()
    assert "\x9b" not in plain.render()
    assert "\x07" not in plain.render(color=True)


def test_colour_adds_only_escapes():
    divergence = verdict(BODY, RUN).divergence
    coloured = divergence.render(color=True)
    for code in ("1", "2", "31", "32", "33", "0"):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == divergence.render()
    assert divergence.render(color=True) != coloured


def test_numbers_of_any_size_can_be_reported():
    huge = 10**4299
    run = [{"kind": "exit", "reason": "HLT", "rip": huge}, {"kind": "exit", "reason": "HLT", "rip": 5}]
    for wanted in (
        "$r + $r + $r + $r + $r + $r + $r + $r + $r + $r",
        "0 - $r - $r - $r - $r - $r - $r - $r - $r - $r - $r",
    ):
        assert "but it is 5" in report(f"exit HLT rip as $r\nexit HLT rip={wanted}", run)


def test_long_records_are_cut():
    run = [{"kind": "modification", "gpa": 1, "aliases": list(range(100_000))}]
    assert max(map(len, verdict("modification gpa=2", run).divergence.render().splitlines())) < 160


class Tracked(dict):
    """A record whose life can be watched."""


def test_memory_does_not_grow_with_the_run():
    import weakref

    alive = weakref.WeakSet()
    Tracked.__hash__ = object.__hash__
    matcher = Matcher(
        script("repeat 1000000 { modification gpa=1 gpa as $g; exit HLT rip=5 }\nexactly 5 exit CPUID leaf=3")
    )
    for number in range(3000):
        for kind, more in (
            ("modification", {"gpa": number & 1}),
            ("exit", {"reason": "HLT", "rip": number % 7}),
        ):
            record = Tracked(kind=kind, **more)
            alive.add(record)
            matcher.feed(record)
    del record
    gc.collect()
    assert len(alive) < 40
    assert not matcher.finish().ok


def test_a_record_that_matches_nothing_costs_little():
    # 5 µs is the aim; the factor leaves room for slow and busy machines.
    body = "exit 48 gpa=patch_site qualification has 2\nnever exit CPUID\nnever modification gpa in 1..5"
    matcher = Matcher(script(body))
    run = (
        records(
            "exit EPT_VIOLATION gpa=1 qualification=2 rip=5; exit MTF rip=6; modification gpa=0x1003 rip=5"
        )
        * 5000
    )
    begin = time.perf_counter()
    for record in run:
        matcher.feed(record)
    assert (time.perf_counter() - begin) / len(run) < 5 * 5e-6
    assert not matcher.failed


def test_of_several_next_lines_the_one_is_named_that_came_closest():
    body = "any order {\nnext modification gpa=1 new=90\nnext modification gpa=2 new=91\n}"
    assert verdict(body, "modification gpa=2 new=92").divergence.line == 4
    assert verdict(body, "modification gpa=1 new=92").divergence.line == 3
    assert verdict(body, "exit HLT").divergence.line == 3
