"""Fields of the VM-execution controls of one vCPU that a host program sets (SDM vol. 3, 25.6)."""

from __future__ import annotations

from typing import Final

from attrs import define

#: How many EPTPs the list has: 4 KiB of 8 bytes each.
EPTP_LIST_LENGTH: Final = 512


@define(slots=True, eq=False)
class ControlFields:
    """What has to do with views of the EPT.

    ``eptp_list`` is what VMFUNC chooses from, 64 bits an entry; the entries after its end are 0. ``eptp_index``, 16
    bits, is what a #VE reports, ``ve_area`` the host page of its information area, None where there is none.
    """

    eptp_list: tuple[int, ...] = ()
    eptp_index: int = 0
    ve_area: int | None = None

    def eptp(self, index: int) -> int:
        """An entry of the list, 0 to 511."""
        return self.eptp_list[index] if index < len(self.eptp_list) else 0
