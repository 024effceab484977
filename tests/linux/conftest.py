"""The kernel, the initrd and one boot, which the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import debian
import pytest
from boots import Boot, boot


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """(bzImage, initrd)."""
    folder = tmp_path_factory.mktemp("debian")
    kernel, busybox = debian.fetch(folder)
    initrd = folder / "initrd"
    initrd.write_bytes(debian.initrd(busybox, debian.extras(folder)))
    return kernel, initrd


@pytest.fixture(scope="session")
def booted(files) -> Boot:
    return boot(*files, prepare=Boot.keep)
