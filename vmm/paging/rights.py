"""Who may do what to a page: SDM vol. 3, section 4.6.1, tabulated once for a mode.

The walk combines the entries of one translation into an index: bit 0 (R/W) and bit 1 (U/S) are set if they
are set in every entry, bit 2 (XD) if it is set in any. ``table[who][index]`` is all that is then left of the
section.
"""

from __future__ import annotations

from typing import NamedTuple

from vmm.paging.access import Access

#: Who asks, as an index: user mode; supervisor mode; supervisor mode, explicitly, with RFLAGS.AC set.
USER, SUPERVISOR, SUPERVISOR_AC = range(3)


class Rights(NamedTuple):
    """The rights to one kind of page; ``allowed`` has bit ``1 << access`` set for what is permitted."""

    allowed: int
    readable: bool
    writable: bool
    executable: bool
    user: bool
    nx: bool
    ac_dependent: bool
    read_write: bool


RightsTable = tuple[tuple[Rights, ...], ...]


def tabulate(*, wp: bool, smep: bool, smap: bool) -> RightsTable:
    """Return the rights for each asker and each combination of R/W, U/S and XD."""
    return tuple(
        tuple(_rights(who, index, wp=wp, smep=smep, smap=smap) for index in range(8))
        for who in (USER, SUPERVISOR, SUPERVISOR_AC)
    )


def _rights(who: int, index: int, *, wp: bool, smep: bool, smap: bool) -> Rights:
    writable_page, user_page, nx = bool(index & 1), bool(index & 2), bool(index & 4)
    ac_dependent = False
    if who == USER:
        read = user_page
        write = user_page and writable_page
        execute = user_page and not nx
    else:
        guarded = user_page and smap
        ac_dependent = guarded and who == SUPERVISOR_AC
        read = not guarded or ac_dependent
        write = read and (writable_page or not wp)
        execute = not nx and not (user_page and smep)
    allowed = read << Access.READ | write << Access.WRITE | execute << Access.FETCH
    return Rights(allowed, read, write, execute, user_page, nx, ac_dependent, writable_page)
