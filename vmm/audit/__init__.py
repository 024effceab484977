"""The audit: whether an ELF file holds code that could change itself, found out before anything runs.

::

    bytes ──reader.py──▶ Image (model.py) ──rules.py──▶ findings (finding.py)
           tables.py: what the dynamic table leads to     segments.py, stack.py: W^X of what is mapped
           packed.py, android.py: relocations             relocations.py: who writes to code at start-up
                                                          layout.py: segments that get into each other's way

The rules are pure functions of the model. They say what the file asks of a loader; what a program does to its own
memory once it runs (mprotect, a second mapping) is for a run under the VMM to show.
"""

from __future__ import annotations

from vmm.audit.finding import Detail, Finding, Rule, Severity
from vmm.audit.model import Image
from vmm.audit.reader import read_image
from vmm.audit.rules import findings

__all__ = ["Detail", "Finding", "Image", "Rule", "Severity", "findings", "read_image"]
