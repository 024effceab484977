"""Each wrong version of a bundled guest fails against the script of the right one, and the report names the cause."""

from __future__ import annotations

import pytest

from vmm.guest.loader import bundled_guests
from vmm.guest_run import run

WRONG = {guest.name: guest for guest in bundled_guests() if guest.wrong_of}
#: What the report must say of each.
CAUSES: dict[str, str] = {
    "toolpath-unsynchronised": "the controller must synchronise after it",
}

each_wrong = pytest.mark.parametrize("name", WRONG)


def test_each_has_a_cause_to_be_named():
    assert WRONG.keys() == CAUSES.keys()


@each_wrong
def test_is_the_wrong_version_of_a_right_guest(name):
    right = {guest.name for guest in bundled_guests() if not guest.wrong_of}
    assert WRONG[name].wrong_of in right


@each_wrong
def test_fails_with_a_report_that_names_the_cause(name):
    divergence = run(WRONG[name].path, expect=WRONG[name].script).divergence
    assert divergence is not None
    assert CAUSES[name] in divergence.render()
