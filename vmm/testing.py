r"""A pytest plugin: the fixture ``run_guest`` runs a guest and holds it against a script.

.. code-block:: python

    def test_the_patch_is_seen(run_guest):
        result = run_guest(
            "alias-patch",
            script='''
                vmm-script/1
                exactly 100 modifications rip=writer
                end port value=0x82
            ''',
        )
        assert result.console.endswith("0x82\n")

If the script does not hold, the test fails with the first divergence and the lines around it on both sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from vmm.guest_run import GuestRun
    from vmm.machine import RunOptions


class RunGuest(Protocol):
    """What the fixture ``run_guest`` is."""

    def __call__(
        self,
        target: str | Path,
        *,
        expect: str | Path | None = None,
        script: str | None = None,
        hashes: Iterable[str] = (),
        options: RunOptions | None = None,
    ) -> GuestRun:
        """Run ``target`` (see ``vmm run``) and hold it against a script.

        ``expect`` is a script's file, ``script`` a script's text, whose indentation is taken away; give at most
        one. ``hashes`` are like those of ``vmm run --hash``. Without ``options`` the auditor and the checks of
        the trap's rules are on. Raises ``InputError`` for what cannot be run and ``GuestError`` where the VMM
        gives up; fails the test if the script does not hold.
        """


@pytest.fixture
def run_guest() -> RunGuest:
    """Runs a guest and holds it against a script: see ``vmm.testing.RunGuest``."""
    return _run_guest


def _run_guest(
    target: str | Path,
    *,
    expect: str | Path | None = None,
    script: str | None = None,
    hashes: Iterable[str] = (),
    options: RunOptions | None = None,
) -> GuestRun:
    __tracebackhide__ = True
    from vmm.guest_run import run  # noqa: PLC0415 - loads the engine, which a plugin must not do at start-up

    result = run(target, expect=expect, script=script, hashes=hashes, options=options)
    if result.divergence is not None:
        pytest.fail(f"{target} does not run as its script says\n\n{result.divergence.render()}")
    return result
