"""VMFUNC: what a guest may do with its own virtualization without a VM exit (SDM vol. 3, 26.5.6).

==================================================================  =======================================
VMFUNC                                                              comes to
==================================================================  =======================================
with "enable VM functions" off, or EAX above 63                     #UD
with EAX other than 0: a function that is not enabled               a VM exit
EAX = 0, ECX above 511                                              a VM exit
EAX = 0, entry ECX of the EPTP list is no EPTP that VM entry takes  a VM exit
EAX = 0 else                                                        the EPT of that entry; no register changes
==================================================================  =======================================
"""

from __future__ import annotations

from typing import Final

from vmm.control_fields import EPTP_LIST_LENGTH, ControlFields
from vmm.ept.views import View, Views

#: The instruction; any prefix makes it another one.
VMFUNC: Final = b"\x0f\x01\xd4"
_EPTP_SWITCHING: Final = 0
_LAST_FUNCTION: Final = 63


def is_undefined(views: Views, function: int) -> bool:
    """Whether VMFUNC is #UD with ``function`` in EAX."""
    return not views.all[0].ept.profile.vm_functions or function > _LAST_FUNCTION


def chosen_view(views: Views, fields: ControlFields, function: int, index: int) -> View | None:
    """The view to use from now on, ``index`` being ECX; None for a VM exit."""
    if function != _EPTP_SWITCHING or index >= EPTP_LIST_LENGTH:
        return None
    eptp = fields.eptp(index)
    return views.of_eptp(eptp) if views.all[0].ept.profile.accepts_eptp(eptp) else None
