"""The extended page tables: second-stage translation and its permissions (SDM vol. 3, 28.3)."""

from vmm.ept.entry import EptEntry, Permission
from vmm.ept.qualification import Qualification
from vmm.ept.tables import ExtendedPageTables, Leaf

__all__ = ["EptEntry", "ExtendedPageTables", "Leaf", "Permission", "Qualification"]
