"""Strict staleness: a model of what a processor caches of address translation (SDM vol. 3, 29.4).

The engine's own TLB cannot be that model: it forgets by the host's clock. ``mappings`` is what one logical processor
caches, with every rule by which it is invalidated; ``mmu`` translates by it as long as it may; ``strict`` is what the
vCPUs of a machine share: which entries changed, by whom, and the reports.
"""

from vmm.tlb.mappings import CachedMappings, EntryRead, Mapping, pcid_of
from vmm.tlb.mmu import StrictMmu
from vmm.tlb.strict import StrictTlb

__all__ = ["CachedMappings", "EntryRead", "Mapping", "StrictMmu", "StrictTlb", "pcid_of"]
