"""All rules, applied to one image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from vmm.audit import layout, relocations, segments, stack
from vmm.audit.finding import Finding, Rule, Severity
from vmm.audit.model import Image

_UNREADABLE: Final = (
    "loaders do not need section headers, so everything else was checked, but for the relocations of a static "
    "executable, which only sections tell of; build the file again, or strip the headers off"
)


def sections_unreadable(image: Image) -> Iterator[Finding]:
    """Section headers that are claimed and cannot be read."""
    if image.sections_unread is not None:
        what = f"the section headers were not read: {image.sections_unread}"
        yield Finding(Rule.SECTIONS_UNREADABLE, Severity.NOTE, what, _UNREADABLE)


_CHECKS: Final[tuple[Callable[[Image], Iterator[Finding]], ...]] = (
    segments.writable_and_executable,
    segments.starts_in_data,
    relocations.declared,
    relocations.into_text,
    stack.executable,
    stack.not_declared,
    layout.overlapping,
    layout.shared_pages,
    layout.mapped_twice,
    layout.out_of_order,
    layout.damaged,
    sections_unreadable,
)


def findings(image: Image) -> tuple[Finding, ...]:
    """Everything that the rules find, errors first, otherwise in the order of the rules."""
    found = [finding for check in _CHECKS for finding in check(image)]
    return tuple(sorted(found, key=lambda finding: finding.severity is Severity.NOTE))
