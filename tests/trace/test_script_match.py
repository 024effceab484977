"""The matching rules of `docs/scripts.md`, one by one."""

import pytest
from script_runs import RecordedActions, failed_after, holds, records, script, verdict

from vmm.trace.matcher import Matcher


def test_expected_records_come_in_order_and_others_may_pass_between():
    body = "exit CPUID\nexit HLT"
    assert holds(body, "exit RDTSC; exit CPUID; exit RDTSC; exit HLT; exit RDTSC")
    assert not holds(body, "exit HLT; exit CPUID")


def test_one_record_meets_one_line():
    assert not holds("exit\nexit", "exit HLT")
    assert holds("exit\nexit", "exit HLT; exit HLT")


def test_the_first_record_that_fits_is_taken_and_never_given_back():
    body = "exit CPUID leaf as $leaf\nexit HLT rip=$leaf"
    assert not holds(body, "exit CPUID leaf=1; exit CPUID leaf=2; exit HLT rip=2")
    assert holds(body, "exit CPUID leaf=2; exit CPUID leaf=1; exit HLT rip=2")


def test_an_empty_script_holds_for_every_run():
    assert holds("", "")
    assert holds("# nothing", "exit HLT; end port")


@pytest.mark.parametrize(
    ("condition", "good", "bad"),
    [
        ("gpa=0x1003", 0x1003, 0x1004),
        ("gpa=patch_site", 0x1003, 0x1004),
        ("gpa=patch_site+1", 0x1004, 0x1003),
        ("gpa=patch_site-3", 0x1000, 0x1003),
        ("gpa=patch_site&0xff0|5", None, None),
        ("gpa=(patch_site & 0xff0) | 5", 5, 0x1005),
        ("gpa=handler - (patch_site - start)", 0x1FFD, 0x2003),
        ("gpa=writer.loop", 0x1800, 0x1801),
        ('gpa="writer.loop"', 0x1800, 0x1801),
        ("gpa=0b101", 5, 4),
        ("gpa=4_096", 0x1000, 0x1001),
        ("gpa!=5", 6, 5),
        ("gpa<5", 4, 5),
        ("gpa<=5", 5, 6),
        ("gpa>5", 6, 5),
        ("gpa>=5", 5, 4),
        ("gpa has 6", 7, 5),
        ("gpa lacks 6", 9, 10),
        ("gpa in 5..7", 7, 8),
        ("gpa in 5..7", 5, 4),
        ("gpa in patch_site..patch_site+1", 0x1004, 0x1005),
    ],
)
def test_conditions_on_numbers(condition, good, bad):
    if good is None:
        with pytest.raises(Exception, match="parentheses"):
            script(f"modification {condition}")
        return
    assert holds(f"modification {condition}", [{"kind": "modification", "gpa": good}])
    assert not holds(f"modification {condition}", [{"kind": "modification", "gpa": bad}])


@pytest.mark.parametrize(
    ("condition", "good", "bad"),
    [
        ("new=b8020000", "b8020000", "b8030000"),
        ("new=b8 02 00 00", "b8020000", "b80200"),
        ('new="B8 02"', "b802", "b803"),
        ("new!=90", "91", "90"),
        ("new starts b8 02", "b8020000", "b903"),
        ("new=02", "02", "2"),
        ('new=""', "", "00"),
    ],
)
def test_conditions_on_bytes(condition, good, bad):
    assert holds(f"modification {condition}", [{"kind": "modification", "new": good}])
    assert not holds(f"modification {condition}", [{"kind": "modification", "new": bad}])


def test_bytes_in_groups_end_where_the_next_field_begins():
    assert holds("modification new=b8 02 old=90 90 gpa=1", "modification new=b802 old=9090 gpa=1")


@pytest.mark.parametrize(
    ("condition", "good", "bad"),
    [
        ("aliases=[]", [], [1]),
        ("aliases!=[]", [1], []),
        ("aliases=[1, start]", [1, 0x1000], [0x1000, 1]),
        ("aliases has 2", [1, 2], [1, 3]),
        ("aliases has [3, 1]", [1, 2, 3], [1, 2]),
        ("aliases lacks 2", [1], [2]),
        ("aliases lacks [2, 3]", [1], [1, 3]),
    ],
)
def test_conditions_on_lists(condition, good, bad):
    assert holds(f"modification {condition}", [{"kind": "modification", "aliases": good}])
    assert not holds(f"modification {condition}", [{"kind": "modification", "aliases": bad}])


def test_conditions_on_words():
    run = [{"kind": "injection", "type": "hardware exception", "vector": 14}]
    assert holds('injection "hardware exception"', run)
    assert holds('injection type="hardware exception" vector=14', run)
    assert holds("injection type starts hardware", run)
    assert not holds('injection "external interrupt"', run)
    assert holds("exit IO_INSTRUCTION direction=in", "exit IO_INSTRUCTION direction=in")
    assert not holds("exit IO_INSTRUCTION direction=in", "exit IO_INSTRUCTION direction=out")
    assert holds("frame from=code to=stepping", "frame from=code to=stepping")


def test_none_is_a_field_that_is_null_or_absent():
    null, absent, five = (
        [{"kind": "modification", "gva": None}],
        [{"kind": "modification"}],
        "modification gva=5",
    )
    for run in (null, absent):
        assert holds("modification gva=none", run)
        assert not holds("modification gva!=none", run)
        assert holds("modification gva!=6", run)
        assert not holds("modification gva<6", run)
        assert not holds("modification gva lacks 6", run)
    assert holds("modification gva!=none", five)


@pytest.mark.parametrize("operator", ["= 5", "< 5", "<= 5", ">= 5", "> 5", "has 5", "lacks 5", "in 0..5"])
@pytest.mark.parametrize("value", ["text", {"a": 5}, 5.5, True])
def test_a_value_of_the_wrong_type_meets_no_condition(operator, value):
    assert not holds(f"modification gpa {operator}", [{"kind": "modification", "gpa": value}])


def test_an_exit_reason_may_be_given_by_number():
    assert holds("exit 48 gpa=1", "exit EPT_VIOLATION gpa=1")
    assert not holds("exit 48", "exit HLT")


def test_fields_of_the_record_itself_are_written_with_a_dot():
    assert holds("modification old=.new", "modification old=90 new=90")
    assert not holds("modification old=.new", "modification old=90 new=91")
    assert holds("modification gva=.gpa+0x1000", "modification gpa=1 gva=0x1001")


def test_kind_words_may_be_plural():
    assert holds("exactly 2 modifications gpa=1", "modification gpa=1; modification gpa=1")


# next and only


def test_next_lets_no_record_pass():
    body = "exit EPT_VIOLATION\nnext modification"
    assert holds(body, "exit HLT; exit EPT_VIOLATION; modification; exit HLT")
    assert not holds(body, "exit EPT_VIOLATION; exit HLT; modification")
    assert failed_after(body, "exit EPT_VIOLATION; exit HLT; modification") == 2


def test_next_on_the_first_line_wants_the_first_record():
    assert not holds("next exit HLT", "exit CPUID; exit HLT")
    assert failed_after("next exit HLT", "exit CPUID") == 1


def test_next_wants_the_conditions_to_hold_too():
    assert failed_after("next modification gpa=1", "modification gpa=2") == 1


def test_only_chooses_which_kinds_count_as_gaps():
    run = "exit EPT_VIOLATION; block created; frame from=code; modification"
    assert holds("only exits, modifications\nexit EPT_VIOLATION\nnext modification", run)
    assert not holds("only exits, frames\nexit EPT_VIOLATION\nnext modification", run)
    assert not holds("exit EPT_VIOLATION\nnext modification", run)


def test_a_kind_that_only_leaves_out_is_still_seen_by_the_lines_that_name_it():
    assert holds(
        "only exits\nexit HLT\nnext block created\nnext exit CPUID", "exit HLT; block created; exit CPUID"
    )
    assert not holds("only exits\nnever block evicted", "block evicted")


def test_a_next_line_beside_others_waits_for_one_of_them_after_a_gap():
    body = "any order { next exit CPUID; modification }"
    assert holds(body, "modification; exit CPUID")
    assert holds(body, "exit HLT; modification; exit CPUID")
    assert not holds(body, "exit HLT; exit CPUID; modification")
    after_open = "repeat at most 2 { modification }\nnext exit CPUID"
    assert holds(after_open, "exit HLT; modification; exit CPUID")
    assert not holds(after_open, "exit HLT; exit CPUID")


# Counts


@pytest.mark.parametrize(
    ("bound", "good"),
    [
        ("exactly 2", {2}),
        ("exactly 0", {0}),
        ("at least 2", {2, 3, 4}),
        ("at most 2", {0, 1, 2}),
        ("2..3", {2, 3}),
        ("never", {0}),
    ],
)
def test_counts_over_the_whole_run(bound, good):
    for count in range(5):
        run = "exit HLT;" + "exit CPUID;" * count + "exit HLT"
        assert holds(f"{bound} exit CPUID", run) == (count in good)


def test_counts_hold_wherever_they_are_written_in_their_block():
    assert holds("exactly 2 exit CPUID\nexit HLT", "exit CPUID; exit HLT; exit CPUID")
    assert holds("exit HLT\nexactly 2 exit CPUID", "exit CPUID; exit HLT; exit CPUID")


def test_counts_see_the_records_that_lines_take():
    assert holds("exit CPUID\nexactly 1 exit CPUID", "exit CPUID")


def test_too_many_is_certain_at_once_and_too_few_only_at_the_end():
    assert failed_after("never exit HLT", "exit CPUID; exit HLT; exit CPUID") == 2
    assert failed_after("at most 1 exit HLT", "exit HLT; exit HLT") == 2
    assert failed_after("exactly 3 exit HLT", "exit HLT; exit HLT") is None


def test_never_until_ends_before_the_record_that_it_names():
    body = "never modification until exit VMCALL"
    assert holds(body, "exit HLT; exit VMCALL; modification")
    assert not holds(body, "modification; exit VMCALL")
    assert holds("never exit until exit VMCALL", "exit VMCALL; exit HLT")
    assert holds(body, "exit HLT")


def test_counts_until_are_judged_when_that_record_comes():
    body = "exactly 2 modifications until exit VMCALL"
    assert holds(body, "modification; modification; exit VMCALL; modification")
    assert failed_after(body, "modification; exit VMCALL; modification") == 2


def test_a_watch_may_use_a_capture_of_a_later_line_and_waits_for_it():
    body = "never modification gpa=$page\nexit EPT_VIOLATION gpa as $page"
    assert holds(body, "modification gpa=5; exit EPT_VIOLATION gpa=5; modification gpa=6")
    assert failed_after(body, "exit EPT_VIOLATION gpa=5; modification gpa=5") == 2


# Sections


def test_a_section_ends_with_its_last_line_and_counts_inside_only():
    body = "exit CPUID\nsection {\n exactly 1 modification\n exit HLT\n}\n"
    assert holds(body, "modification; exit CPUID; modification; exit HLT; modification; modification")
    assert not holds(body, "exit CPUID; exit HLT; modification")
    assert not holds(body, "exit CPUID; modification; modification; exit HLT")


def test_the_record_that_the_last_line_takes_belongs_to_the_section():
    assert holds("section { exactly 1 exit HLT; exit HLT }", "exit HLT; exit HLT")


def test_the_record_before_a_section_does_not_belong_to_it():
    assert holds("exit HLT\nsection { never exit HLT; exit CPUID }", "exit HLT; exit CPUID; exit HLT")


def test_a_section_until_leaves_its_record_to_what_follows():
    body = (
        "section until exit VMCALL { exactly 2 modifications }\nnext exit VMCALL rax as $a\nexit HLT rip=$a"
    )
    assert holds(body, "modification; modification; exit VMCALL rax=7; exit HLT rip=7")
    assert not holds(body, "modification; exit VMCALL rax=7; modification; exit HLT rip=7")


def test_sections_until_the_same_record_divide_the_run():
    body = (
        "section until exit VMCALL { exactly 1 modification }\n"
        "section until exit VMCALL { exactly 2 modifications; exactly 1 exit VMCALL }"
    )
    assert holds(body, "modification; exit VMCALL; modification; modification; exit VMCALL")
    assert not holds(body, "modification; exit VMCALL; modification; exit VMCALL")
    assert not holds(body, "modification; exit VMCALL; modification; modification")


def test_a_section_that_is_ended_too_early_is_certain_at_once():
    body = "section until exit VMCALL { modification gpa=1 }"
    assert failed_after(body, "modification gpa=2; exit VMCALL; modification gpa=1") == 2


def test_a_run_that_ends_inside_of_a_section_fails():
    result = verdict("section until exit VMCALL { never exit HLT }", "exit CPUID")
    assert not result.ok
    assert "until exit VMCALL" in result.divergence.render()


def test_nested_sections_end_from_the_inside():
    body = "section until end { section until end { exactly 1 modification } }\nend port"
    assert holds(body, "modification; end port")
    assert not holds(body, "modification; modification; end port")


def test_sections_in_a_repeat_count_anew_each_time():
    body = "repeat 3 {\n section { exactly 1 modification; exit HLT }\n}"
    assert holds(body, "modification; exit HLT; " * 3)
    assert not holds(body, "modification; modification; exit HLT; exit HLT; modification; exit HLT")
    parts = "repeat 2 { section until exit VMCALL { exactly 1 modification } }"
    assert holds(parts, "modification; exit VMCALL; modification; exit VMCALL")
    assert not holds(parts, "modification; exit VMCALL; exit VMCALL; modification")


# Groups


def test_repeat_wants_its_body_that_many_times():
    body = "repeat 3 { exit CPUID; modification }\nexit HLT"
    assert holds(body, "exit CPUID; modification; " * 3 + "exit HLT")
    assert not holds(body, "exit CPUID; modification; " * 2 + "exit HLT")


def test_a_large_repeat_costs_no_memory_in_advance():
    assert holds("repeat 20_000 { modification }".replace("_", ""), [{"kind": "modification"}] * 20_000)
    assert not holds("repeat 999999999999999999 { modification }", [{"kind": "modification"}] * 10)


@pytest.mark.parametrize(
    ("bound", "good"), [("2..3", {2, 3}), ("at least 2", {2, 3, 4}), ("at most 2", {0, 1, 2})]
)
def test_open_repeats_are_greedy(bound, good):
    body = f"repeat {bound} {{ next exit CPUID; next modification }}\nnext exit HLT"
    for rounds in range(5):
        assert holds(body, "exit CPUID; modification; " * rounds + "exit HLT") == (rounds in good)


def test_an_open_repeat_asks_its_body_before_what_follows():
    body = "repeat 0..1 { exit CPUID }\nexit CPUID"
    assert holds(body, "exit CPUID; exit CPUID")
    assert not holds(body, "exit CPUID")


def test_a_round_that_has_begun_must_be_completed():
    assert not holds("repeat 0..1 { exit CPUID; modification }\nexit HLT", "exit CPUID; exit HLT")
    assert holds("repeat 0..1 { exit CPUID; modification }\nexit HLT", "exit HLT")


def test_open_repeats_in_open_repeats():
    body = "repeat 1..2 { next exit CPUID; repeat 0..2 { next modification } }\nnext exit HLT"
    for run in ("C H", "C M H", "C M M H", "C C H", "C M C M M H"):
        assert holds(body, _letters(run)), run
    for run in ("H", "M H", "C M M M H", "C C C H", "C M"):
        assert not holds(body, _letters(run)), run


def _letters(run):
    return "; ".join(
        {"C": "exit CPUID", "M": "modification", "H": "exit HLT"}[letter] for letter in run.split()
    )


def test_captures_in_a_repeat_hold_the_last_round():
    body = "exit CPUID leaf as $n\nrepeat 3 { exit CPUID leaf=$n+1 leaf as $n }"
    assert holds(body, "exit CPUID leaf=5; exit CPUID leaf=6; exit CPUID leaf=7; exit CPUID leaf=8")
    assert not holds(body, "exit CPUID leaf=5; exit CPUID leaf=6; exit CPUID leaf=7; exit CPUID leaf=7")


def test_any_order_takes_its_members_in_any_order():
    body = "any order {\n exit CPUID\n modification\n}\nexit HLT"
    assert holds(body, "modification; exit CPUID; exit HLT")
    assert holds(body, "exit CPUID; modification; exit HLT")
    assert not holds(body, "exit CPUID; exit HLT; modification")


def test_any_order_with_next_means_the_next_records_in_any_order():
    body = "any order { next exit CPUID; next modification }"
    assert holds(body, "modification; exit CPUID")
    assert failed_after(body, "modification; exit HLT; exit CPUID") == 2


def test_members_of_any_order_keep_their_own_order():
    body = """any order {
        repeat 1 { exit CPUID leaf=1; exit CPUID leaf=2 }
        repeat 1 { modification gpa=1; modification gpa=2 }
    }"""
    assert holds(body, "modification gpa=1; exit CPUID leaf=1; modification gpa=2; exit CPUID leaf=2")
    assert not holds(body, "modification gpa=1; exit CPUID leaf=2; modification gpa=2; exit CPUID leaf=1")


def test_in_any_order_the_first_member_that_fits_takes_the_record():
    assert holds("any order { exit CPUID; exit CPUID leaf=2 }", "exit CPUID leaf=1; exit CPUID leaf=2")
    assert not holds("any order { exit CPUID; exit CPUID leaf=2 }", "exit CPUID leaf=2; exit CPUID leaf=1")


def test_either_stays_with_the_branch_that_took_the_first_record():
    body = "either { exit CPUID; exit HLT } or { exit RDTSC; modification }\nend port"
    assert holds(body, "exit CPUID; exit HLT; end port")
    assert holds(body, "exit RDTSC; modification; end port")
    assert not holds(body, "exit CPUID; modification; end port")
    assert not holds(body, "end port")


# Captures


def test_a_capture_is_used_again_with_arithmetic():
    body = "exit EPT_VIOLATION gpa as $page\nmodification gpa=($page & 0xff000) + 4 gva != $page"
    assert holds(body, "exit EPT_VIOLATION gpa=0x1003; modification gpa=0x1004")
    assert not holds(body, "exit EPT_VIOLATION gpa=0x2003; modification gpa=0x1004")


def test_conditions_are_judged_before_the_line_captures():
    body = "exit CPUID leaf as $n\nexit CPUID leaf!=$n leaf as $n\nexit CPUID leaf=$n"
    assert holds(body, "exit CPUID leaf=1; exit CPUID leaf=1; exit CPUID leaf=2; exit CPUID leaf=2")


def test_bytes_and_lists_are_captured_too():
    body = "modification new as $v aliases as $a\nmodification old=$v aliases=$a"
    assert holds(body, "modification new=b802 aliases=[1,2]; modification old=b802 aliases=[1,2]")
    assert not holds(body, "modification new=b802 aliases=[1,2]; modification old=b803 aliases=[1,2]")


def test_a_sum_with_a_capture_of_none_meets_nothing():
    body = "modification gva as $v\nmodification gva!=$v+1"
    assert not holds(body, "modification gva=none; modification gva=5")


def test_a_list_or_range_with_a_capture_not_made_meets_nothing():
    made = "either { exit CPUID leaf as $n } or { exit HLT }\n"
    for condition in ("aliases!=[$n]", "aliases lacks [1, $n]", "gpa in 0..$n", "gpa!=$n"):
        assert holds(made + f"modification {condition}", "exit CPUID leaf=9; modification gpa=5 aliases=[5]")
        assert not holds(made + f"modification {condition}", "exit HLT; modification gpa=5 aliases=[5]")


# Actions


def test_actions_are_done_at_the_record_that_the_line_takes():
    body = (
        "exit EPT_VIOLATION gpa as $page -> inject vector=14 error=2 -> write gpa=$page+1 bytes=90 90\n"
        "   -> protect gpa=.gpa & 0xff000 length=0x1000 access=r-x\n"
        "   -> stop\n"
        "exit IO_INSTRUCTION port=0x60 -> answer 0x41"
    )
    actions = RecordedActions()
    matcher = Matcher(script(body), actions)
    done = []
    for record in records(
        "exit HLT; exit EPT_VIOLATION gpa=0x1003; exit IO_INSTRUCTION port=1; exit IO_INSTRUCTION port=0x60"
    ):
        matcher.feed(record)
        done.append(len(actions.done))
    assert done == [0, 4, 4, 5]
    assert actions.done == [
        ("inject", 14, 2),
        ("write", 0x1004, b"\x90\x90"),
        ("protect", 0x1000, 0x1000, "r-x"),
        ("stop",),
        ("answer", 0x41),
    ]
    assert matcher.finish().ok


def test_an_injection_without_error_code():
    actions = RecordedActions()
    assert verdict("exit HLT -> inject vector=0x20", "exit HLT", actions=actions).ok
    assert actions.done == [("inject", 0x20, None)]


def test_whenever_acts_each_time():
    actions = RecordedActions()
    body = (
        "whenever exit IO_INSTRUCTION port=0x60 until exit HLT -> answer 7\nexit IO_INSTRUCTION -> answer 8"
    )
    port = "exit IO_INSTRUCTION port=0x60;"
    assert verdict(body, port * 2 + "exit HLT;" + port, actions=actions).ok
    assert actions.done == [("answer", 7), ("answer", 8), ("answer", 7)]


def test_an_action_without_a_usable_value_is_a_divergence():
    body = "modification gva as $v\nexit HLT -> write gpa=$v bytes=90"
    result = verdict(body, "modification gva=none; exit HLT", actions=RecordedActions())
    assert not result.ok
    assert "gpa=$v is not a number here" in result.divergence.what
    below = verdict(
        "exit HLT rip as $r -> write gpa=$r-1 bytes=90", "exit HLT rip=0", actions=RecordedActions()
    )
    assert "not in 0.." in below.divergence.what


def test_a_finished_trace_needs_no_actions():
    assert holds("exit HLT -> stop", "exit HLT")


# End and console


def test_the_end_of_the_run_is_a_record():
    assert holds("end port value=0x88", "exit HLT; end port port=0xf4 value=0x88")
    assert not holds("end port value=0x88", "end port port=0xf4 value=0x87")
    assert not holds("end port", 'end "triple fault"')
    assert holds(
        'end reason="triple fault" spare="x"', [{"kind": "end", "reason": "triple fault", "spare": "x"}]
    )


def test_next_end_lets_nothing_more_come():
    assert holds("exit HLT\nnext end port", "exit CPUID; exit HLT; end port")
    assert not holds("exit HLT\nnext end port", "exit HLT; exit CPUID; end port")


@pytest.mark.parametrize("pieces", [["all ok\n"], list("all ok\n"), ["all", " o", "k\n"]])
def test_console_output_may_come_in_any_pieces(pieces):
    run = [{"kind": "console", "text": piece} for piece in pieces]
    assert holds('console contains "ok"', run)
    assert holds('console is "all ok\\n"', run)
    assert holds('console lacks "panic"', run)
    assert not holds('console contains "panic"', run)
    assert not holds('console lacks "ok"', run)
    assert not holds('console is "all ok"', run)
    assert not holds('console is "all ok\\n\\n"', run)


def test_console_lines_fail_early_where_they_can():
    assert failed_after('console lacks "panic"', 'console "pa"; console "nic"; console "!"') == 2
    assert failed_after('console is "ok"', 'console "o"; console "x"') == 2
    assert failed_after('console contains "ok"', 'console "x"') is None


def test_console_output_is_not_a_record():
    assert holds("next exit HLT\nnext end port", 'console "a"; exit HLT; console "b"; end port')


def test_console_lines_judge_silence():
    assert not holds('console contains "x"', "exit HLT")
    assert holds('console contains ""', "exit HLT")
    assert holds('console is ""', "exit HLT")


# The matcher itself


def test_finish_says_the_same_again():
    matcher = Matcher(script("exit HLT"))
    assert matcher.finish() is matcher.finish()


def test_a_script_serves_many_runs():
    shared = script("exit CPUID leaf as $n\nexit HLT rip=$n")
    for leaf in (1, 2):
        matcher = Matcher(shared)
        for record in records(f"exit CPUID leaf={leaf}; exit HLT rip={leaf}"):
            matcher.feed(record)
        assert matcher.finish().ok


def test_unknown_kinds_of_records_are_gaps_and_nothing_else():
    assert holds("exit HLT", [{"kind": "novelty"}, {"kind": "exit", "reason": "HLT"}])
    assert not holds("next exit HLT", [{"kind": "novelty"}, {"kind": "exit", "reason": "HLT"}])
