"""Scripts made from runs: they hold for that run, and for no run that differs."""

import re

from hypothesis import given
from hypothesis import strategies as st
from script_runs import RecordedActions

from vmm import exits, records
from vmm.trace.matcher import Matcher
from vmm.trace.script import Script
from vmm.trace.wording import as_line, as_script

numbers = st.integers(0, 2**64 - 1) | st.integers(0, 20)
maybe = st.none() | numbers
words = st.sampled_from(
    ["store", "in", "none", "as", "because", "two words", 'q"\\\n', "has", "\x1b[0m", "é\u2028", "$v"]
) | st.text(max_size=5)
rows = st.lists(numbers, max_size=3).map(tuple)

RECORDS = st.one_of(
    st.builds(exits.Hlt, rip=numbers),
    st.builds(exits.Mtf, rip=numbers),
    st.builds(exits.ExceptionExit, rip=numbers, vector=numbers, error_code=maybe, address=maybe),
    st.builds(exits.EptViolation, rip=numbers, qualification=numbers, gpa=numbers, gva=maybe),
    st.builds(
        exits.IoInstruction,
        rip=numbers,
        port=numbers,
        size=numbers,
        direction=words,
        value=numbers,
        qualification=numbers,
    ),
    st.builds(
        records.Modification,
        gpa=numbers,
        gva=maybe,
        rip=maybe,
        old=st.binary(max_size=5),
        new=st.binary(max_size=5),
        cause=words,
        instruction=numbers,
        aliases=rows,
        blocks=rows,
    ),
    st.builds(
        records.BlockEvent,
        event=words,
        block=numbers,
        gpa=numbers,
        gva=numbers,
        size=numbers,
        mode=words,
        cause=words,
    ),
    st.builds(records.FrameEvent, gpa=numbers, before=words, after=words, cause=words),
    st.builds(records.Injection, vector=numbers, type=words, error_code=maybe, rip=numbers),
    st.builds(
        records.End,
        reason=words,
        rip=numbers,
        detail=st.fixed_dictionaries({"port": numbers, "value": numbers}),
    ),
).map(lambda record: record.to_json())

RUNS = st.lists(RECORDS, min_size=1, max_size=8)


def parse(text):
    return Script.parse(text, file="f", symbols={})


def fed(script, run):
    matcher = Matcher(script, RecordedActions())
    for record in run:
        matcher.feed(record)
    return matcher.finish()


@given(RUNS)
def test_a_script_made_from_a_run_holds_for_it(run):
    assert fed(parse(as_script(run)), run).ok


@given(RUNS, st.data())
def test_a_script_with_gaps_made_from_some_records_holds_for_the_run(run, data):
    chosen = [record for record in run if data.draw(st.booleans())]
    assert fed(parse("vmm-script/1\n" + "\n".join(map(as_line, chosen))), run).ok


@given(RUNS, st.data())
def test_a_run_without_one_of_the_records_fails(run, data):
    at = data.draw(st.integers(0, len(run) - 1))
    verdict = fed(parse(as_script(run)), run[:at] + run[at + 1 :])
    assert not verdict.ok
    assert verdict.divergence.line >= at + 2
    assert verdict.divergence.render(color=True)


@given(RUNS, st.data())
def test_a_run_with_one_number_changed_fails_at_that_line(run, data):
    at = data.draw(st.integers(0, len(run) - 1))
    changeable = [name for name, value in run[at].items() if type(value) is int and name != "number"]
    name = data.draw(st.sampled_from(changeable))
    changed = {**run[at], name: run[at][name] ^ (1 << data.draw(st.integers(0, 63)))}
    verdict = fed(parse(as_script(run)), [*run[:at], changed, *run[at + 1 :]])
    assert not verdict.ok
    assert verdict.divergence.line == at + 2
    assert verdict.divergence.record == at + 1
    assert f"wants {name} = " in verdict.divergence.render()


@given(RUNS, RECORDS, st.data())
def test_a_run_with_a_record_too_many_fails_where_next_forbids_it(run, extra, data):
    at = data.draw(st.integers(0, len(run) - 1))
    longer = [*run[:at], extra, *run[at:]]
    assert fed(parse(as_script(run)), longer).ok == (longer[: len(run)] == run)


@given(RUNS)
def test_counts_of_a_run_hold_and_one_less_does_not(run):
    lines = [line.removeprefix("next ") for line in as_script(run).splitlines()[1:]]
    counts = {line: sum(other == line for other in lines) for line in lines}
    exact = "".join(f"exactly {count} {line}\n" for line, count in counts.items())
    assert fed(parse("vmm-script/1\n" + exact), run).ok
    line = lines[0]
    assert not fed(parse(f"vmm-script/1\nat most {counts[line] - 1} {line}"), run).ok


@given(RUNS, st.permutations(range(8)))
def test_any_order_holds_for_every_order(run, order):
    shuffled = [run[at] for at in order if at < len(run)]
    lines = as_script(shuffled).removeprefix("vmm-script/1\n")
    assert fed(parse(f"vmm-script/1\nany order {{\n{lines}\n}}"), run).ok


@given(st.text("AB", max_size=8), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_an_open_repeat_agrees_with_a_possessive_regular_expression(run, least, more, tail):
    # `next` everywhere leaves no gaps, so that the script is a pattern over the whole run.
    most = least + more
    if most == 0:
        return
    records = [{"kind": "exit", "reason": {"A": "CPUID", "B": "HLT"}[letter]} for letter in run]
    records.append({"kind": "end", "reason": "port"})
    body = (
        f"repeat {least}..{most} {{ next exit CPUID }}\n" + ("next exit HLT\n" if tail else "") + "next end"
    )
    wanted = re.compile(f"A{{{least},{most}}}+{'B' if tail else ''}")
    assert fed(parse("vmm-script/1\n" + body), records).ok == bool(wanted.fullmatch(run))
