"""The VMM's own translated-block cache, keyed by guest frame. It knows nothing of Unicorn."""

from vmm.translation.audit import Auditor
from vmm.translation.block import Block, Counters, Span
from vmm.translation.cache import BlockCache

__all__ = ["Auditor", "Block", "BlockCache", "Counters", "Span"]
