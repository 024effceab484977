"""The extended page tables: second-stage translation and its permissions (SDM vol. 3, 29.3).

The rooms inside: ``bits`` says where the fields of an entry are, ``entry`` decodes one, ``capabilities`` is what a
processor can do, ``rules`` says which entries are present and which misconfigured, ``structures`` holds the tables,
``tables`` translates by them, ``qualification`` is what an EPT violation reports, ``log`` the
page-modification log, ``sub_pages`` the sub-page permission table.

Section numbers are those of the editions in which VMX support for address translation is chapter 29 (and VM exits
chapter 28); earlier ones have the same sections in chapter 28 (27).
"""

from vmm.ept.capabilities import PROFILES, Capabilities, EptProfile
from vmm.ept.entry import EptEntry, MemoryType, Permission
from vmm.ept.log import PageModificationLog
from vmm.ept.qualification import Qualification
from vmm.ept.rules import EntryRules, Misconfigured
from vmm.ept.tables import CLEAN, HELD, MISCONFIGURED, ExtendedPageTables, Leaf

__all__ = [
    "CLEAN",
    "HELD",
    "MISCONFIGURED",
    "PROFILES",
    "Capabilities",
    "EntryRules",
    "EptEntry",
    "EptProfile",
    "ExtendedPageTables",
    "Leaf",
    "MemoryType",
    "Misconfigured",
    "PageModificationLog",
    "Permission",
    "Qualification",
]
