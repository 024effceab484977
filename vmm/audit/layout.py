"""Rules about segments together: no byte and no page of memory belongs to two, and the file holds what they map.

Where a rule is about pairs, each segment is reported with the first partner that it has, so that a file with a
thousand segments on top of each other does not make a million findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final

from vmm.audit.finding import Finding, Rule, Severity
from vmm.audit.model import Image, Segment

_AMBIGUOUS: Final = (
    "which of the two wins depends on the loader and on its order, so the permissions of these bytes are not known; "
    "link the file again with segments that do not overlap"
)
_SHARED: Final = (
    "a page has one set of permissions: either code is writable there or data executable; align the segments to "
    "pages (not -n or -N, a -z max-page-size of at least 0x1000)"
)
_TWICE: Final = (
    "a loader that maps the file shared makes the writable view change the code; with private mappings, as Linux "
    "makes them, the two part at the first store; see that the linker script gives each section one place"
)
_ORDER: Final = (
    "the ELF specification wants them in ascending order; loaders that reserve memory by the first and the last one "
    "map this file over something else; sort them"
)
_FILE_SIZE: Final = "Linux refuses such a file, other loaders write past the end of the segment; build the file again"
_BEYOND: Final = (
    "what is mapped there is not in the file that was audited, and an access to it fails; the file is truncated, "
    "or its bytes are elsewhere, as those of a file with debug information only"
)
_WRAPS: Final = "a loader that does not notice maps it somewhere else; build the file again"


def overlapping(image: Image) -> Iterator[Finding]:
    """Segments with bytes of memory in common."""
    for first, second in _pairs(image, _overlap):
        start, end = max(first.start, second.start), min(first.end, second.end)
        what = f"segments {_both(first, second)} overlap"
        yield _pair_finding(Rule.SEGMENTS_OVERLAP, Severity.ERROR, what, _AMBIGUOUS, first, second, start, end)


def shared_pages(image: Image) -> Iterator[Finding]:
    """A page with bytes of two segments, of which one is writable and the other executable."""
    for first, second in _pairs(image, _share_page):
        start = max(first.pages[0], second.pages[0])
        end = min(first.pages[1], second.pages[1])
        what = f"segments {_both(first, second)} share a page, which becomes writable and executable"
        rule = Rule.PAGE_WRITABLE_AND_EXECUTABLE
        yield _pair_finding(rule, Severity.ERROR, what, _SHARED, first, second, start, end)


def mapped_twice(image: Image) -> Iterator[Finding]:
    """Bytes of the file that a writable segment and an executable one both map."""
    for first, second in _pairs(image, _same_bytes):
        offset = max(first.offset, second.offset)
        size = min(first.offset + first.file_size, second.offset + second.file_size) - offset
        code = first if first.executable else second
        what = f"segments {_both(first, second)} map the same {size:#x} bytes of the file, from {offset:#x} on"
        start = code.start + offset - code.offset
        rule = Rule.FILE_BYTES_MAPPED_TWICE
        yield _pair_finding(rule, Severity.NOTE, what, _TWICE, first, second, start, start + size)


def out_of_order(image: Image) -> Iterator[Finding]:
    """Segments that do not ascend by p_vaddr; the first such place is reported."""
    for before, after in pairwise(image.segments):
        if after.start < before.start:
            what = f"segment {after.number} lies below segment {before.number}, which comes before it"
            rule = Rule.SEGMENTS_OUT_OF_ORDER
            yield _pair_finding(rule, Severity.NOTE, what, _ORDER, before, after, after.start, after.end)
            return


def damaged(image: Image) -> Iterator[Finding]:
    """Segments that are smaller than their part of the file, or reach beyond the file or the address space."""
    for segment in image.segments:
        if segment.file_size > segment.size:
            what = f"segment {segment.number} has {segment.file_size:#x} bytes of file for {segment.size:#x} of memory"
            yield _finding(Rule.SEGMENT_SMALLER_THAN_FILE_BYTES, what, _FILE_SIZE, segment)
        if segment.file_size and segment.offset + segment.file_size > image.file_size:
            end = segment.offset + segment.file_size
            what = f"segment {segment.number} ends at {end:#x} of the file, which has {image.file_size:#x} bytes"
            yield _finding(Rule.SEGMENT_BEYOND_FILE, what, _BEYOND, segment)
        if segment.end > 1 << image.bits:
            what = f"segment {segment.number} reaches beyond the {image.bits}-bit address space"
            yield _finding(Rule.SEGMENT_BEYOND_ADDRESS_SPACE, what, _WRAPS, segment)


def _overlap(one: Segment, other: Segment) -> bool:
    return one.start < other.end and other.start < one.end


def _share_page(one: Segment, other: Segment) -> bool:
    if not _split_write_and_execute(one, other) or _overlap(one, other):
        return False
    return one.pages[0] < other.pages[1] and other.pages[0] < one.pages[1]


def _same_bytes(one: Segment, other: Segment) -> bool:
    start = max(one.offset, other.offset)
    common = start < min(one.offset + one.file_size, other.offset + other.file_size)
    return common and _split_write_and_execute(one, other)


def _split_write_and_execute(one: Segment, other: Segment) -> bool:
    return (one.writable and other.executable) or (one.executable and other.writable)


def _pairs(image: Image, related: Callable[[Segment, Segment], bool]) -> Iterator[tuple[Segment, Segment]]:
    for index, second in enumerate(image.segments):
        first = next((earlier for earlier in image.segments[:index] if related(earlier, second)), None)
        if first is not None:
            yield first, second


def _both(first: Segment, second: Segment) -> str:
    return f"{first.number} ({first.access}) and {second.number} ({second.access})"


def _pair_finding(
    rule: Rule, severity: Severity, what: str, why: str, first: Segment, second: Segment, start: int, end: int
) -> Finding:
    return Finding(rule, severity, what, why, headers=(first.number, second.number), start=start, end=end)


def _finding(rule: Rule, what: str, why: str, segment: Segment) -> Finding:
    return Finding(
        rule, Severity.ERROR, what, why, headers=(segment.number,), start=segment.start, end=segment.end
    )
