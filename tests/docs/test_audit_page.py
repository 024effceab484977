"""`docs/audit.md` names all rules, and none that is not there."""

import re

from pages import ROOT

from vmm.audit import Rule

PAGE = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")


def test_every_rule_has_a_row():
    table = PAGE[PAGE.index("| Rule |") :]
    assert re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE) == [str(rule) for rule in Rule]
