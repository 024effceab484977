"""``vmm guests``: the guests that come with the VMM."""

from __future__ import annotations

import json
from typing import Final

from vmm.commands.screen import standard_output
from vmm.guest.files import one_line
from vmm.guest.loader import BundledGuest, bundled_guests
from vmm.trace.painter import Style

#: The script that belongs to a bundled guest, beside its guest.toml.
SCRIPT_NAME: Final = "expect.script"


def list_guests(*, as_json: bool) -> None:
    """Write the list to standard output."""
    guests = bundled_guests()
    screen = standard_output()
    if as_json:
        screen.write(json.dumps([_object(guest) for guest in guests], indent=2) + "\n")
    else:
        width = max((len(guest.name) for guest in guests), default=0)
        for guest in guests:
            screen.painter.line(f"{guest.name:<{width}}  {one_line(guest.summary)}")
        screen.painter.line()
        screen.painter.line("Run one with `vmm run NAME`.", Style.QUIET)
    screen.flush()


def _object(guest: BundledGuest) -> dict[str, str]:
    fields = {"name": guest.name, "summary": guest.summary, "path": str(guest.path)}
    script = guest.path.with_name(SCRIPT_NAME)
    return {**fields, "expect": str(script)} if script.is_file() else fields
