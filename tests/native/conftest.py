"""These tests want a processor of the right kind, and an operating system that lends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .tracee import UNAVAILABLE, Tracee


def _why_not() -> str | None:
    if UNAVAILABLE is not None:
        return UNAVAILABLE
    try:
        with Tracee():
            return None
    except OSError as problem:
        return f"no process can be traced here ({problem})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = _why_not() if here else None
    if reason is not None:
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))
