"""The guest's own page tables: Intel SDM vol. 3, chapter 4, in every mode.

One call answers one access::

    mode = PagingMode.of(cr0, cr4, efer)
    translation = walk(memory, mode, cr3, gva, Access.WRITE, user=True)   # or PageFault

``memory`` is whatever stands behind the page tables (an EPT, usually): see :class:`PhysicalMemory`.

The rooms inside: ``access`` has the words that everybody shares, ``mode`` says what a mode's entries look
like, ``rights`` says who may do what to a page, ``walker`` puts the three together, ``explain`` shows a walk
to people.

Not modelled, because the guest's processor does not have them: protection keys, shadow stacks, HLAT. Their
bits are ignored in entries and clear in error codes, as the manual has it for such a processor.
"""

from vmm.paging.access import (
    Access,
    EntryChanged,
    ErrorCode,
    PageFault,
    PhysicalMemory,
    Translation,
    is_canonical,
)
from vmm.paging.explain import Entry, entries
from vmm.paging.mode import PagingMode
from vmm.paging.walker import walk

__all__ = [
    "Access",
    "Entry",
    "EntryChanged",
    "ErrorCode",
    "PageFault",
    "PagingMode",
    "PhysicalMemory",
    "Translation",
    "entries",
    "is_canonical",
    "walk",
]
