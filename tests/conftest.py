"""Fixtures that all tests share; ``tiny.py`` next to this file is importable from every test."""

from __future__ import annotations

import pytest
import tiny


@pytest.fixture
def tiny_machine():
    """Builds a machine from assembly text and mappings; see ``tiny.build``."""
    return tiny.build
