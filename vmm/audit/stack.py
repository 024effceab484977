"""Rules about the stack: it is data, and the file must say so.

What a missing PT_GNU_STACK means is a matter of history. The kernel: Linux since 5.8 leaves the stack of a 64-bit
program not executable on x86-64 and arm64 (`elf_read_implies_exec` in the architecture's elf.h); before, and for
32-bit programs to this day, it makes all readable memory executable. The loader: glibc takes `DEFAULT_STACK_PERMS`
of its stackinfo.h, for an object that it loads as for the stacks of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vmm.audit.finding import Finding, Rule, Severity
from vmm.audit.model import Image

_SINCE_5_8: Final = "Linux before 5.8 made all readable memory of such a program executable, 5.8 and later do not"
#: What Linux does, on machines on which it leaves the stack of 64-bit programs alone.
_KERNEL_DATA_ONLY: Final = {
    "EM_X86_64": _SINCE_5_8,
    "EM_AARCH64": _SINCE_5_8,
    "EM_PPC64": "Linux does not make the stack of a 64-bit PowerPC program executable, but other systems may",
}
#: Machines on which glibc's loader leaves it alone as well.
_LOADER_DATA_ONLY: Final = {"EM_AARCH64", "EM_PPC64"}
_EXECUTABLE: Final = (
    "whatever can write to the stack can put code there; find the object that asks for it (assembly without a "
    ".note.GNU-stack section, or nested functions of GCC) and link with -z noexecstack"
)
_ADVICE: Final = "link with -z noexecstack, which writes one"


def executable(image: Image) -> Iterator[Finding]:
    """PT_GNU_STACK with PF_X. Loaders let the last of several decide; any that asks for it is reported."""
    for header in image.stack:
        if header.executable:
            what = "PT_GNU_STACK asks for an executable stack"
            yield Finding(Rule.EXECUTABLE_STACK, Severity.ERROR, what, _EXECUTABLE, headers=(header.number,))


def not_declared(image: Image) -> Iterator[Finding]:
    """No PT_GNU_STACK: whether the stack becomes executable is left to the kernel and the loader."""
    if image.stack:
        return
    severity, why = _without_header(image)
    yield Finding(Rule.STACK_NOT_DECLARED, severity, "no PT_GNU_STACK says that the stack is data", f"{why}; {_ADVICE}")


def _without_header(image: Image) -> tuple[Severity, str]:
    harmless = _KERNEL_DATA_ONLY.get(image.machine)
    if harmless is None or image.bits == 32:
        machine = image.machine.removeprefix("EM_")
        why = f"for a {image.bits}-bit {machine} file without one, Linux makes the stack executable, or may"
        return Severity.ERROR, f"{why}, and on some machines all other readable memory as well"
    if image.dynamic is not None and image.machine not in _LOADER_DATA_ONLY:
        return Severity.ERROR, "glibc's loader takes a dynamic object without one to need an executable stack"
    return Severity.NOTE, harmless
