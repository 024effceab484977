"""``vmm guests``: the guests that come with the VMM."""

from __future__ import annotations

import json

from vmm.commands.screen import standard_output
from vmm.guest.files import one_line
from vmm.guest.loader import BundledGuest, bundled_guests
from vmm.trace.painter import Style


def list_guests(*, as_json: bool) -> None:
    """Write the list to standard output."""
    guests = bundled_guests()
    screen = standard_output()
    if as_json:
        screen.write(json.dumps([_object(guest) for guest in guests], indent=2) + "\n")
    else:
        width = max((len(guest.name) for guest in guests), default=0)
        for guest in guests:
            if not guest.wrong_of:
                screen.painter.line(f"{guest.name:<{width}}  {one_line(guest.summary)}")
        screen.painter.line()
        screen.painter.line("Run one with `vmm run NAME --expect own`.", Style.QUIET)
        wrong = [guest for guest in guests if guest.wrong_of]
        if wrong:
            screen.painter.line()
            screen.painter.line("Wrong versions, which do not hold against the script of the right one:", Style.QUIET)
            for guest in wrong:
                screen.painter.line(f"{guest.name:<{width}}  {one_line(guest.summary)}")
    screen.flush()


def _object(guest: BundledGuest) -> dict[str, str]:
    fields = {"name": guest.name, "summary": guest.summary, "path": str(guest.path)}
    if guest.wrong_of:
        fields["wrong_of"] = guest.wrong_of
    return {**fields, "expect": str(guest.script)} if guest.script.is_file() else fields
