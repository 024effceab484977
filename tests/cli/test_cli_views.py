"""`vmm run --views`: where views of the EPT differ at the end of a run."""

from cli_guests import END_0X2A

VIEWS = """
[ept]
vm_functions = true
[views]
count = 3
[[views.restrict]]
view = 1
gpa = 0x20000
length = 0x3000
access = "r--"
[[views.restrict]]
view = 2
gpa = 0x24000
access = "rw-"
[[views.map]]
view = 2
gpa = 0x23000
target = 0x30000
"""


def shown(vmm, *args):
    result = vmm("run", "-q", "--views", *args)
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_pages_that_are_alike_are_one_line_and_what_does_not_differ_is_none(vmm, guest):
    assert [line.split() for line in shown(vmm, guest(END_0X2A, more=VIEWS))] == [
        ["views", "differ", "in", "view", "0", "view", "1", "view", "2"],
        ["0x20000-0x22fff", "rw-", "r--", "rw-"],
        ["0x23000", "rw-", "rw-", "rw-", "->", "0x30000"],
    ]


def test_it_is_the_end_of_the_run_that_is_shown(vmm):
    """The guest has switched views, and its code has been fetched: what is shown are permissions as they are then."""
    lines = shown(vmm, "vmfunc-views")
    assert lines[2].split() == ["0x12000", "---", "--x", "trusted"]


def test_views_that_do_not_differ(vmm, guest):
    assert shown(vmm, guest(END_0X2A)) == ["views     1"]
    same = "[ept]\nvm_functions = true\n[views]\ncount = 2"
    assert shown(vmm, guest(END_0X2A, name="same", more=same)) == ["views     2, which do not differ"]


def test_nothing_is_shown_that_nobody_asks_for(vmm):
    assert "views differ" not in vmm("run", "vmfunc-views").stdout
