"""Which function made a patch and which of the kernel's mechanisms it belongs to, as far as symbols tell.

The storing instruction is in a routine that copies or fills memory, most of the time. Its callers are candidates, the
innermost first (``vmm.trap.callers``). The function is the innermost that belongs to a mechanism, or if there is none
the innermost that is no such routine.
"""

from __future__ import annotations

import enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from attrs import define, field, frozen

from vmm.patches.mapping import Mapping, is_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.patches.joined import Patch
    from vmm.patches.symbols import KernelSymbols


class Mechanism(enum.Enum):
    """What for; the value is what people read."""

    ALTERNATIVES = "alternatives"
    RETPOLINES = "retpolines"
    RETURNS = "returns"
    PARAVIRT = "paravirt"
    SMP_LOCKS = "SMP locks"
    ENDBR = "ENDBR"
    CALL_THUNKS = "call thunks"
    JUMP_LABELS = "jump labels"
    STATIC_CALLS = "static calls"
    FTRACE = "ftrace"
    KPROBES = "kprobes"
    BPF = "BPF"
    LIVE_PATCHES = "live patches"
    MODULES = "modules"
    TEXT_POKE = "text_poke, for whom is not known"
    BEFORE_KERNEL = "before a kernel"
    REUSE = "reuse of memory"
    USER_MEMORY = "the kernel in user memory"
    USER_CODE = "user code"
    WINDOW = "by a window"
    OUTSIDE = "not by an instruction"
    OTHER = "other"
    NO_SYMBOLS = "not known without symbols"


#: Names of functions by mechanism; ``*`` stands for anything.
_FUNCTIONS: Final = {
    Mechanism.ALTERNATIVES: ("apply_alternatives", "optimize_nops*", "add_nops", "recompute_jump", "__optimize_nops"),
    Mechanism.RETPOLINES: ("apply_retpolines", "patch_retpoline", "emit_indirect*", "emit_call_track_retpoline"),
    Mechanism.RETURNS: ("apply_returns", "patch_return"),
    Mechanism.PARAVIRT: ("apply_paravirt", "paravirt_patch*", "native_patch"),
    Mechanism.SMP_LOCKS: ("alternatives_smp_*", "alternatives_enable_smp"),
    Mechanism.ENDBR: ("apply_ibt_endbr", "apply_seal_endbr", "poison_endbr", "poison_cfi", "apply_fineibt", "cfi_*"),
    Mechanism.CALL_THUNKS: ("callthunks_*", "patch_call", "patch_call_sites", "patch_paravirt_call_sites"),
    Mechanism.JUMP_LABELS: ("arch_jump_label_*", "jump_label_transform", "__jump_label_*", "jump_label_*"),
    Mechanism.STATIC_CALLS: ("__static_call_*", "arch_static_call_*", "static_call_*"),
    Mechanism.FTRACE: ("ftrace_*", "arch_ftrace_*", "prepare_ftrace_return", "create_trampoline"),
    Mechanism.KPROBES: ("arch_*arm_kprobe", "arch_*optimize_kprobe*", "arch_prepare_*kprobe", "arch_copy_kprobe"),
    Mechanism.BPF: ("bpf_arch_text_*", "__bpf_arch_text_*", "bpf_int_jit_*", "bpf_jit_*", "arch_prepare_bpf_*"),
    Mechanism.LIVE_PATCHES: ("klp_*",),
    Mechanism.MODULES: ("apply_relocate_add", "__apply_relocate_add", "__write_relocate_add", "clear_relocate_add",
                        "load_module", "layout_and_allocate", "move_module", "module_finalize"),
}  # fmt: skip
#: Routines that store for somebody else.
_HELPERS: Final = (
    "memcpy*", "__memcpy*", "memset*", "__memset*", "memmove*", "__memmove*", "clear_page*", "copy_page*",
    "copy_user_*", "__copy_user*", "rep_movs_alternative", "rep_stos_alternative", "copy_from_kernel_nofault*",
    "copy_to_kernel_nofault*", "clear_user_*", "__put_user*", "text_poke*", "__text_poke*", "smp_text_poke*",
)  # fmt: skip
#: Mappings that the kernel patches its code through; memory is reused through any.
_OF_PATCHERS: Final = frozenset({Mapping.OWN, Mapping.POKE, Mapping.OTHER})
_TEXT_POKE: Final = ("text_poke*", "__text_poke*", "smp_text_poke*")
#: How close to the patch itself an address on the stack is what a patcher works with, in bytes.
_NEAR: Final = 16


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@frozen(slots=True)
class Attribution:
    """The function that made a patch, None if nobody knows, and what for."""

    function: str | None
    mechanism: Mechanism


@frozen(slots=True)
class _Role:
    """A function: the mechanism that it belongs to, whether it stores for others, whether that is to poke text."""

    function: str
    mechanism: Mechanism | None
    is_helper: bool
    pokes: bool


@define(slots=True)
class Attributor:
    """Says who made patches; ``symbols`` are None where none were given."""

    symbols: KernelSymbols | None
    _roles: dict[str, _Role] = field(factory=dict)

    def of(self, patch: Patch) -> Attribution:
        """Who made a patch."""
        store = patch.first
        if store.rip is None:
            window = store.cause == "window"
            return Attribution(None, Mechanism.WINDOW if window else Mechanism.OUTSIDE)
        if not is_kernel(store.rip):
            return Attribution(None, Mechanism.BEFORE_KERNEL if store.is_early else Mechanism.USER_CODE)
        if self.symbols is None:
            return Attribution(None, _by_mapping(patch.mapping) or Mechanism.NO_SYMBOLS)
        return self._by_name(patch, list(self._chain(patch)))

    def _by_name(self, patch: Patch, names: list[str]) -> Attribution:
        roles = [self._role(name) for name in names]
        function = next((role.function for role in roles if not role.is_helper), None)
        if patch.mapping in _OF_PATCHERS:
            for role in roles:
                if role.mechanism is not None:
                    return Attribution(role.function, role.mechanism)
            if any(role.pokes for role in roles):
                return Attribution(function, Mechanism.TEXT_POKE)
        return Attribution(function or next(iter(names), None), _by_mapping(patch.mapping) or Mechanism.OTHER)

    def _chain(self, patch: Patch) -> Iterator[str]:
        """The functions at work, innermost first, without what the compiler adds to their names."""
        assert self.symbols is not None
        store = patch.first
        assert store.rip is not None
        own = store.executed_at
        near = _NEAR + len(patch.new)
        callers = [caller - 1 for caller in store.callers if own is None or abs(caller - own) > near]
        for place in (store.rip, *callers):
            name = self.symbols.function(place)
            if name is not None:
                yield name.partition(".")[0] or name

    def _role(self, name: str) -> _Role:
        role = self._roles.get(name)
        if role is None:
            mechanism = next((each for each, patterns in _FUNCTIONS.items() if _matches(name, patterns)), None)
            role = _Role(name, mechanism, is_helper=_matches(name, _HELPERS), pokes=_matches(name, _TEXT_POKE))
            self._roles[name] = role
        return role


def _by_mapping(mapping: Mapping) -> Mechanism | None:
    """What the mapping alone tells. Nobody patches text through the direct map, but memory is reused through it."""
    return {
        Mapping.DIRECT: Mechanism.REUSE,
        Mapping.USER: Mechanism.USER_MEMORY,
        Mapping.USER_OWN: Mechanism.USER_MEMORY,
        Mapping.POKE: Mechanism.TEXT_POKE,
    }.get(mapping)
