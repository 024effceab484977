"""The bytes behind a guest: one mapping that all engines share.

Host-physical addresses (HPA) are offsets into this mapping. The guest's RAM starts at HPA 0; the *system area*
(page tables, GDT and TSS that the VMM builds for guests that bring none) follows. What a GPA means is the EPT's
business. Behind them there may be *twins* of both, of the same size: places for what vCPUs fetch instead (see
``vmm.coherence``). Last come *spare* pages, of which some stand for others when these are fetched
(``vmm.monitors.hidden``). They take no memory until they are written.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

from vmm.errors import OptionError

PAGE: Final = 4096
MAX_SIZE: Final = 1 << 32
#: Spare pages behind everything.
SPARE: Final = 64


class GuestMemory:
    """``size`` bytes of zeroed memory and as many in each of ``twins``, shared by every engine of a machine.

    ``words`` is the same memory as 64-bit little-endian words, for page walks. Raises ``OptionError`` if ``size``
    is not a multiple of 4096, or all of it is not in 4 KiB ... 4 GiB.
    """

    def __init__(self, size: int, *, twins: int = 0) -> None:
        whole = size * (1 + twins)
        if size % PAGE or not PAGE <= whole <= MAX_SIZE:
            raise OptionError(
                f"{whole:#x} bytes of guest memory", where="memory", fix="give a multiple of 4096 up to 4 GiB"
            )
        #: Bytes, those of twins and spare pages included.
        self.size: Final = whole + SPARE * PAGE
        self._area: Final = size
        self._spare_at: Final = whole
        self._spare = list(range(self.size - PAGE, whole - PAGE, -PAGE))
        self._stands_for: dict[int, int] = {}
        #: The same as a mapping, which can be searched.
        self.mapping: Final = mmap.mmap(-1, self.size)
        self.bytes: Final = memoryview(self.mapping)
        self.words: Final = self.bytes.cast("Q")
        self._anchor: Final = ctypes.c_char.from_buffer(self.mapping)
        self.address: Final = ctypes.addressof(self._anchor)

    def twin(self, hpa: int, number: int) -> int:
        """The HPA of the same place in a twin, counted from 0."""
        return hpa + (number + 1) * self._area

    def home(self, hpa: int) -> int:
        """The HPA that a place in a twin or in a spare page stands for; others stand for themselves."""
        if hpa >= self._spare_at:
            return self._stands_for.get(hpa & -PAGE, hpa & -PAGE) | hpa & PAGE - 1
        return hpa % self._area

    @property
    def spare_pages(self) -> int:
        """Spare pages that are free."""
        return len(self._spare)

    def take_spare(self, page: int) -> int:
        """The HPA of a spare page, which stands for the page at an HPA until it is given back."""
        spare = self._spare.pop()
        self._stands_for[spare] = page
        return spare

    def give_back(self, spare: int) -> None:
        """Nothing is fetched from a spare page any more."""
        del self._stands_for[spare]
        self._spare.append(spare)

    def read(self, hpa: int, size: int) -> bytes:
        """``size`` bytes from an HPA."""
        return self.mapping[hpa : hpa + size]

    def write(self, hpa: int, data: bytes) -> None:
        """Put bytes at an HPA. The caller answers for translations (see ``Machine.invalidate``)."""
        self.bytes[hpa : hpa + len(data)] = data
