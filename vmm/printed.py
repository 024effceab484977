"""What a guest prints, as text."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.machine import Machine


def hear_text(machine: Machine, listeners: list[Callable[[str], None]]) -> None:
    """Have the guest's printed bytes handed on as text; what is not UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def hear(data: bytes) -> None:
        text = decoder.decode(data)
        if text:
            for listener in listeners:
                listener(text)

    machine.on_output(hear)
