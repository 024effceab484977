"""Each wrong version of a bundled guest fails against the script of the right one, and the report names the cause."""

from __future__ import annotations

import pytest

from vmm.guest.loader import bundled_guests
from vmm.guest_run import run

WRONG = {guest.name: guest for guest in bundled_guests() if guest.wrong_of}
#: What the report must say of each.
CAUSES: dict[str, str] = {
    "cross-modify-torn": "vCPU 1 has executed a mixture of two versions",
    "cross-modify-unsynchronised": "vCPU 1 has executed a version that was gone: it had not serialised since the patch",
    "contract-clock": "a contract may read nothing but its transactions",
    "hidden-hook-visible": "because: an integrity check must read the guest's own bytes where a hook is executed",
    "lazy-binding-open": "after a patch the page of the call site must be read-only again",
    "lazy-binding-torn": "a call site must be patched in one store",
    "shrink-wrap-clobber": "the cold path must save what the prologue no longer saves",
    "shrink-wrap-unwind": "the unwind table must say what the prologue saves now",
    "cow-fork-stale": "because: fork has shared this frame: who writes to it must fault first, and get a copy",
    "dual-mapping-rwx": "because: the compiler writes by the view that runs: that page is writable and executable",
    "translator-by-address": "because: the STORE went through the other address of the same frame",
    "toolpath-unsynchronised": "the controller must synchronise after it",
    "vmfunc-views-open": "a VMFUNC of its own would let it in",
    "unmap-stale": "because: the kernel has cleared the entry and not invalidated it",
    "w-xor-x-rwx": "the page that the compiler writes its code to must not be executable while it is written",
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
