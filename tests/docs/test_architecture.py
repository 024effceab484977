"""`docs/architecture.md` names every room of the house, and none that is not there."""

import re

from pages import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`(vmm/[\w/.]*)`", TEXT))


def test_every_module_has_a_room():
    rooms = {f"vmm/{path.name}/" for path in (ROOT / "vmm").iterdir() if (path / "__init__.py").exists()}
    rooms |= {f"vmm/{path.name}" for path in (ROOT / "vmm").glob("*.py") if not path.name.startswith("__")}
    assert rooms - NAMED == set()


def test_every_room_is_there():
    assert {name for name in NAMED if not (ROOT / name).exists()} == set()
