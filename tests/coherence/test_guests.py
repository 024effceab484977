"""Bundled guests that synchronise after each change of code run in every coherence model, and nothing stale runs."""

import pytest

from vmm.coherence import Coherence
from vmm.machine import Machine, RunOptions
from vmm.records import StaleExecution

SYNCHRONISED = ("lazy-binding", "shrink-wrap")


@pytest.mark.parametrize("model", Coherence)
@pytest.mark.parametrize("name", SYNCHRONISED)
def test_no_stale_code_runs(name, model):
    machine = Machine.from_manifest(name, RunOptions(coherence=model))
    stale = []
    machine.observe(lambda record: isinstance(record, StaleExecution) and stale.append(record))
    end = machine.run()
    assert stale == []
    assert end.detail["value"] == machine.guest.manifest.end.value
