"""Which fills may be answered without Python, and what they depend on (see ``vmm.cpu.fill_table``)."""

from __future__ import annotations

from typing import Final

from vmm.cpu.engine import FETCH, READ, WRITE, R, W, X
from vmm.cpu.fill_table import PAGE, REGION, FillTable, Granted
from vmm.ept.views import View
from vmm.memory import GuestMemory
from vmm.mmu.walk_cache import Read
from vmm.paging import Translation
from vmm.paging.mode import CR0_USED, CR4_USED, EFER_USED

_NEEDED: Final = {READ: R, WRITE: W, FETCH: X}


class QuickFills:
    """The fills of one vCPU that its engine can answer by itself; None can until ``attach``."""

    def __init__(self, memory: GuestMemory) -> None:
        self._base: Final = memory.address
        self._table: FillTable | None = None
        self._setting: tuple[tuple[int, int, int], View] | None = None

    @property
    def on(self) -> bool:
        """Whether it is of use to keep fills."""
        return self._table is not None

    def attach(self, table: FillTable) -> None:
        """Keep fills in a table from now on."""
        if table.remembers:
            self._table = table
            self._select()

    def detach(self) -> None:
        """From now on fills depend on more than a slot can hold."""
        if self._table is not None:
            self._table.retire()
            self._table = None

    def select(self, mode: tuple[int, int, int], view: View) -> None:
        """The vCPU uses a paging mode, as the bits of CR0, CR4 and EFER that select it, and a view of the EPT."""
        self._setting = mode, view
        self._select()

    def forget(self) -> None:
        """Forget all fills."""
        if self._table is not None:
            self._table.clear()
            self._select()

    def _select(self) -> None:
        if self._table is not None and self._setting is not None:
            (cr0, cr4, efer), view = self._setting
            self._table.select(((CR0_USED, cr0), (CR4_USED, cr4), (EFER_USED, efer), view.number))

    def keep(
        self,
        page: int,
        access: int,
        cr3: int,
        translation: Translation,
        reads: tuple[Read, ...],
        *,
        user: bool,
        user_fetch: int,
        cell: int,
    ) -> None:
        """Have a granted fill answered again as long as nothing is different that it depends on.

        ``user_fetch`` are the bits of a leaf that a fetch from a user-mode page takes, ``cell`` where its host page is
        put on record.
        """
        assert self._table is not None
        assert self._setting is not None
        address_of, base = self._setting[1].ept.leaves.address_of, self._base
        watched: list[int] = []
        for gpa, leaf, place, entry in reads:
            watched += (address_of(gpa >> 12), leaf, base + (place << 3), entry)
        leaf_at = address_of(translation.gpa >> 12)
        if not (leaf_at and all(watched[::2])):
            return
        fetches = access == FETCH
        readable, writable = R * translation.readable, W * translation.writable
        self._table.keep(
            Granted(
                page,
                access,
                cr3,
                user,
                REGION if translation.page_size >= REGION and not fetches else PAGE,
                leaf_at - 8 * (page >> 12 & 0x1FF),
                user_fetch if fetches and translation.user else _NEEDED[access],
                readable if fetches else readable | writable,
                cell,
                watched,
            )
        )
