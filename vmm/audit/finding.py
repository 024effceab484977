"""What an audit finds."""

from __future__ import annotations

import enum

from attrs import frozen


class Severity(enum.StrEnum):
    """What a finding is for: an error makes the audit fail, a note only informs."""

    ERROR = "error"
    NOTE = "note"


class Rule(enum.StrEnum):
    """The stable names of all rules, as they stand in reports; docs/audit.md explains each."""

    WRITABLE_EXECUTABLE_SEGMENT = "writable-executable-segment"
    START_NOT_EXECUTABLE = "start-not-executable"
    TEXT_RELOCATIONS_DECLARED = "text-relocations-declared"
    TEXT_RELOCATIONS = "text-relocations"
    RELOCATIONS_OUTSIDE = "relocations-outside"
    EXECUTABLE_STACK = "executable-stack"
    STACK_NOT_DECLARED = "stack-not-declared"
    SEGMENTS_OVERLAP = "segments-overlap"
    PAGE_WRITABLE_AND_EXECUTABLE = "page-writable-and-executable"
    FILE_BYTES_MAPPED_TWICE = "file-bytes-mapped-twice"
    SEGMENTS_OUT_OF_ORDER = "segments-out-of-order"
    SEGMENT_SMALLER_THAN_FILE_BYTES = "segment-smaller-than-file-bytes"
    SEGMENT_BEYOND_FILE = "segment-beyond-file"
    SEGMENT_BEYOND_ADDRESS_SPACE = "segment-beyond-address-space"
    SECTIONS_UNREADABLE = "sections-unreadable"


@frozen(slots=True)
class Detail:
    """One place that a finding is about; ``text`` says what is there."""

    address: int
    text: str


@frozen(slots=True)
class Finding:
    """Something that the file's reader should know.

    ``what`` is one sentence of fact; ``why`` says what it matters and what to do. ``headers`` are the numbers of the
    program headers concerned, ``start`` and ``end`` the addresses (None where it is about none). ``count`` is how
    many places there are, of which ``details`` gives the first few.
    """

    rule: Rule
    severity: Severity
    what: str
    why: str
    headers: tuple[int, ...] = ()
    start: int | None = None
    end: int | None = None
    count: int = 1
    details: tuple[Detail, ...] = ()
