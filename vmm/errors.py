"""Everything that the VMM raises on purpose, in one tree.

::

    VmmError
    ├── InputError            something the user gave is wrong        exit status 2
    │   ├── ManifestError     a guest.toml
    │   ├── ImageError        an image (flat, ELF, Multiboot)
    │   ├── ScriptError       an expectation script
    │   └── OptionError       a command-line option or API argument
    ├── EngineError           this Unicorn cannot carry the VMM       exit status 2
    └── GuestError            the run cannot go on                    exit status 1
        ├── AuditError        a block was entered with stale bytes
        └── InvariantError    a rule of the trap was broken (a defect of the VMM)

What the rooms raise among themselves stands with them: ``TripleFault`` in ``vmm.cpu.events``, ``EntryChanged`` in
``vmm.paging``, ``UnmappedStructure`` in ``vmm.mmu``.
"""

from __future__ import annotations


class VmmError(Exception):
    """The root of all errors that the VMM raises on purpose."""


class InputError(VmmError):
    """Bad input: says in one line what is wrong, where, and what to do.

    ``where`` names a file (and a line or key if there is one), ``what`` says what is wrong with it, ``fix``
    what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(f"{where}: {what}; {fix}")


class ManifestError(InputError):
    """A guest manifest that cannot be used."""


class ImageError(InputError):
    """An image that cannot be loaded, or not be audited."""


class ScriptError(InputError):
    """An expectation script that cannot be parsed."""


class OptionError(InputError):
    """A command-line option or an API argument out of its range."""


class EngineError(VmmError):
    """The installed Unicorn is not one whose behaviour the VMM knows."""


class GuestError(VmmError):
    """The run cannot go on; the message carries the guest's context."""


class AuditError(GuestError):
    """A translated block was entered whose bytes are not the ones in memory."""


class InvariantError(GuestError):
    """A rule that must hold after every transition does not: a defect of the VMM, never of the guest."""
