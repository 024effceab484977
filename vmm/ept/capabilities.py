"""What a processor's EPT can do, and what of it is switched on (SDM vol. 3, A.10, A.3.3, 25.6.11).

``Capabilities`` are what the capability MSRs report; ``EptProfile`` adds what the VMM has enabled in the EPTP and in
the VM-execution controls. Bits of IA32_VMX_EPT_VPID_CAP (48CH) that have a field::

    0 execute-only translations     16 2 MiB pages      22 advanced VM-exit information for EPT violations
    6 page-walk length of 4         17 1 GiB pages      23 supervisor shadow-stack control
    8 paging structures UC          20 INVEPT           25 single-context INVEPT, 26 all-context
   14 paging structures WB          21 A and D flags    32 INVVPID, 40 to 43 its types

IA32_VMX_PROCBASED_CTLS2 (48BH) reports in bit 32 + n that bit n of the secondary processor-based controls may be 1::

   13 enable VM functions    18 EPT-violation #VE                      23 sub-page write permissions for EPT
   17 enable PML             22 mode-based execute control for EPT

The physical-address width M is CPUID.80000008H:EAX[7:0].
"""

from __future__ import annotations

from typing import Final

from attrs import asdict, frozen

from vmm.errors import OptionError
from vmm.memory import PAGE

_MSR_BITS: Final = {
    "execute_only": 0,
    "walk_length_4": 6,
    "tables_uncacheable": 8,
    "tables_write_back": 14,
    "pages_2m": 16,
    "pages_1g": 17,
    "invept": 20,
    "accessed_dirty": 21,
    "advanced_information": 22,
    "supervisor_shadow_stack": 23,
    "invept_single_context": 25,
    "invept_all_contexts": 26,
    "invvpid": 32,
    "invvpid_address": 40,
    "invvpid_single_context": 41,
    "invvpid_all_contexts": 42,
    "invvpid_retaining_globals": 43,
}
_CTLS2_BITS: Final = {
    "vm_functions": 45,
    "page_modification_log": 49,
    "virtualization_exceptions": 50,
    "mode_based_execute": 54,
    "sub_page_write": 55,
}


@frozen(slots=True, kw_only=True)
class Capabilities:
    """What a processor supports; the defaults are those of the machine that guests get.

    Raises ``OptionError`` for a physical-address width outside of 32 to 52 bits, and for a processor without
    4-level walks or without write-back paging structures, which this VMM cannot be.
    """

    execute_only: bool = True
    walk_length_4: bool = True
    tables_uncacheable: bool = True
    tables_write_back: bool = True
    pages_2m: bool = True
    pages_1g: bool = True
    accessed_dirty: bool = True
    advanced_information: bool = False
    mode_based_execute: bool = True
    vm_functions: bool = True
    virtualization_exceptions: bool = True
    page_modification_log: bool = True
    sub_page_write: bool = True
    supervisor_shadow_stack: bool = False
    invept: bool = False
    invept_single_context: bool = False
    invept_all_contexts: bool = False
    invvpid: bool = False
    invvpid_address: bool = False
    invvpid_single_context: bool = False
    invvpid_all_contexts: bool = False
    invvpid_retaining_globals: bool = False
    #: M, 32 to 52 bits.
    physical_address_width: int = 40

    def __attrs_post_init__(self) -> None:
        if not 32 <= self.physical_address_width <= 52:
            what = f"{self.physical_address_width} bits of physical address"
            raise OptionError(what, where="EPT capabilities", fix="choose 32 to 52")
        if not (self.walk_length_4 and self.tables_write_back):
            what = "no 4-level walk, or no write-back paging structures"
            raise OptionError(what, where="EPT capabilities", fix="set bits 6 and 14 of IA32_VMX_EPT_VPID_CAP")

    @classmethod
    def decode(cls, ept_vpid_cap: int, *, procbased_ctls2: int = 0, physical_address_width: int = 40) -> Capabilities:
        """From IA32_VMX_EPT_VPID_CAP and IA32_VMX_PROCBASED_CTLS2; bits without a field make no difference."""
        flags = {name: bool(ept_vpid_cap >> bit & 1) for name, bit in _MSR_BITS.items()}
        return cls(
            **flags,
            **{name: bool(procbased_ctls2 >> bit & 1) for name, bit in _CTLS2_BITS.items()},
            physical_address_width=physical_address_width,
        )

    def encode(self) -> int:
        """To IA32_VMX_EPT_VPID_CAP."""
        return sum(1 << bit for name, bit in _MSR_BITS.items() if getattr(self, name))

    def encode_procbased_ctls2(self) -> int:
        """To what IA32_VMX_PROCBASED_CTLS2 says of the controls that have a field."""
        return sum(1 << bit for name, bit in _CTLS2_BITS.items() if getattr(self, name))


@frozen(slots=True, kw_only=True)
class EptProfile:
    """A processor's capabilities and what is enabled of them; the default is the machine that guests get.

    ``accessed_dirty`` is bit 6 of the EPTP, ``mode_based_execute`` the VM-execution control, ``page_modification_log``
    that which enables PML (without ``accessed_dirty`` nothing is ever logged), ``sub_page_write`` that for sub-page
    write permissions, ``vm_functions`` that for VMFUNC with EPTP switching (26.5.6), ``virtualization_exceptions`` that
    for EPT-violation #VE (26.5.7). Raises ``OptionError`` if one is on that the capabilities do not have (VM entry
    would fail, SDM vol. 3, 27.2.1.1).
    """

    capabilities: Capabilities = Capabilities()
    accessed_dirty: bool = False
    mode_based_execute: bool = False
    vm_functions: bool = False
    virtualization_exceptions: bool = False
    page_modification_log: bool = False
    sub_page_write: bool = False

    def __attrs_post_init__(self) -> None:
        for name in ("accessed_dirty", *_CTLS2_BITS):
            if getattr(self, name) and not getattr(self.capabilities, name):
                what = f"{name} is enabled on a processor without it"
                raise OptionError(what, where="EPT profile", fix=f"set {name} in its capabilities, too")

    def eptp(self, root: int) -> int:
        """The EPTP for a PML4 table at a host-physical address (SDM vol. 3, 25.6.11)."""
        write_back, walk_length_minus_1 = 6, 3
        return root | write_back | walk_length_minus_1 << 3 | self.accessed_dirty << 6

    def accepts_eptp(self, eptp: int) -> bool:
        """Whether VM entry would accept a 64-bit EPTP (SDM vol. 3, 27.2.1.1)."""
        has = self.capabilities
        uncacheable, write_back = 0, 6
        memory_type = eptp & 7
        known = (memory_type == write_back and has.tables_write_back) or (
            memory_type == uncacheable and has.tables_uncacheable
        )
        flags = has.accessed_dirty << 6 | has.supervisor_shadow_stack << 7
        address = (1 << has.physical_address_width) - PAGE
        return known and eptp >> 3 & 7 == 3 and not eptp & ~(0x3F | flags | address)


_LEAST: Final = {name: False for name, value in asdict(Capabilities()).items() if isinstance(value, bool)}

#: Profiles by name, for the command line.
PROFILES: Final = {
    "default": EptProfile(),
    "accessed-dirty": EptProfile(accessed_dirty=True),
    "mode-based-execute": EptProfile(mode_based_execute=True),
    "page-modification-log": EptProfile(
        capabilities=Capabilities(pages_2m=False, pages_1g=False), accessed_dirty=True, page_modification_log=True
    ),
    "sub-page-write": EptProfile(sub_page_write=True),
    "advanced": EptProfile(capabilities=Capabilities(advanced_information=True)),
    "minimal": EptProfile(
        capabilities=Capabilities(**{**_LEAST, "walk_length_4": True, "tables_write_back": True})
    ),
}
