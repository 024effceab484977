"""The page-modification log (SDM vol. 3, 29.3.6): a page of host memory that the processor fills from its end.

Each time a dirty flag of the EPT goes from 0 to 1, the guest-physical address of the access, its bits 11:0 clear, goes
to the entry that the PML index selects, and the index is decremented: from 511 down to 0, then to FFFFH. With an index
out of 0 to 511, an access that would first have to set an accessed or dirty flag does not happen: there is a
page-modification log-full event, a VM exit.
"""

from __future__ import annotations

from typing import Final

from vmm.errors import OptionError
from vmm.memory import PAGE

#: Entries of the log, 8 bytes each.
ENTRIES: Final = 512
FIRST_INDEX: Final = ENTRIES - 1
_INDEX_LIMIT: Final = 1 << 16


class PageModificationLog:
    """The log and its index, as two fields of the VMCS select them: for the VMM to read and to reset."""

    def __init__(self) -> None:
        #: By index, what the processor has put there; an entry keeps its value when the index is set back.
        self.entries: Final = [0] * ENTRIES
        self._index = FIRST_INDEX

    @property
    def index(self) -> int:
        """The PML index, 16 bits: where the next address goes, if it is 0 to 511."""
        return self._index

    @index.setter
    def index(self, value: int) -> None:
        if not 0 <= value < _INDEX_LIMIT:
            raise OptionError(f"a PML index of {value:#x}", where="page-modification log", fix="give 16 bits")
        self._index = value

    @property
    def is_full(self) -> bool:
        """Whether nothing can be logged."""
        return self._index >= ENTRIES

    @property
    def pages(self) -> tuple[int, ...]:
        """The guest-physical addresses that were logged since the index was 511, in order of time."""
        first = 0 if self._index == _INDEX_LIMIT - 1 else self._index + 1
        return tuple(reversed(self.entries[first:]))

    def add(self, gpa: int) -> None:
        """Log an access whose dirty flag has just been set; not to be called while the log is full."""
        self.entries[self._index] = gpa & -PAGE
        self._index = self._index - 1 & _INDEX_LIMIT - 1
