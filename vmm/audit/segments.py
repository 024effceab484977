"""Rules about what single segments may be: never writable and executable, and executable where execution starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vmm.audit.finding import Detail, Finding, Rule, Severity
from vmm.audit.model import Image, Segment

_SECTIONS_SHOWN: Final = 8
#: On these machines the address of a function in the headers is that of a descriptor, which is data.
_FUNCTION_DESCRIPTORS: Final = {"EM_IA_64", "EM_PARISC"}
_RWX: Final = (
    "the program can change this code while it runs, and so can whoever gets it to write there; give code and data "
    "segments of their own (link without -N; no section may be both SHF_WRITE and SHF_EXECINSTR)"
)
_NO_CODE: Final = (
    "either it fails, or something makes data executable first, as packers do; look at what the loader or the first "
    "instructions do with this memory, or link the function into an executable section"
)


def writable_and_executable(image: Image) -> Iterator[Finding]:
    """Segments with both PF_W and PF_X."""
    for segment in image.segments:
        if segment.writable and segment.executable:
            sections = [s for s in image.sections if segment.holds(s.start) and s.writable and s.executable]
            yield Finding(
                Rule.WRITABLE_EXECUTABLE_SEGMENT,
                Severity.ERROR,
                f"segment {segment.number} is writable and executable ({segment.access})",
                _RWX,
                headers=(segment.number,),
                start=segment.start,
                end=segment.end,
                details=tuple(Detail(s.start, f"section {s.name}, both") for s in sections[:_SECTIONS_SHOWN]),
            )


def starts_in_data(image: Image) -> Iterator[Finding]:
    """The entry point, DT_INIT and DT_FINI in a segment that is not executable."""
    if _has_descriptors(image):
        return
    starts = (("the entry point", image.entry), *(image.dynamic.starts if image.dynamic else ()))
    for name, address in starts:
        around = [segment for segment in image.segments if segment.holds(address)]
        if address and around and not any(segment.executable for segment in around):
            yield _start_finding(name, address, around[0])


def _start_finding(name: str, address: int, segment: Segment) -> Finding:
    return Finding(
        Rule.START_NOT_EXECUTABLE,
        Severity.ERROR,
        f"{name} lies in segment {segment.number}, which is not executable ({segment.access})",
        _NO_CODE,
        headers=(segment.number,),
        start=address,
        end=address + 1,
    )


def _has_descriptors(image: Image) -> bool:
    # The first ABI of 64-bit PowerPC has descriptors; it is big-endian, the second nearly always little-endian.
    return image.machine in _FUNCTION_DESCRIPTORS or (image.machine == "EM_PPC64" and image.order == "big")
