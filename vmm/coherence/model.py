"""The coherence models, and the instructions that synchronise in each.

==============  ======================================================  =========================================
model           a change of code bytes is fetched                       for instance
==============  ======================================================  =========================================
coherent        by the very next instruction                            x86, a processor that patches itself
                                                                        (SDM vol. 3, 9.1.3)
serialised      by a vCPU when it has executed a serialising            x86 cross-modifying code (SDM vol. 3,
                instruction; until then it may fetch the old bytes      9.1.3); prefetch queues of old processors
explicit        when a guest has flushed the range; until then every    machines whose instruction caches software
                vCPU may fetch the old bytes                            keeps coherent
==============  ======================================================  =========================================

A weaker model is deterministic: it shows the oldest bytes that it permits. In the model *explicit* CLFLUSH and
CLFLUSHOPT flush the 64-byte line that they name from the fetch side of all vCPUs, WBINVD and INVD flush everything.
"""

from __future__ import annotations

import enum
from functools import lru_cache
from typing import Final

from iced_x86 import Code, Decoder, Instruction, Mnemonic, Register

#: Bytes that CLFLUSH flushes.
LINE: Final = 64

#: Serialising instructions (SDM vol. 3, 9.3), besides moves to control and debug registers.
_SERIALISING: Final = frozenset(
    {
        *(Mnemonic.CPUID, Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ, Mnemonic.RSM, Mnemonic.SERIALIZE),
        *(Mnemonic.INVD, Mnemonic.INVEPT, Mnemonic.INVLPG, Mnemonic.INVVPID, Mnemonic.LGDT, Mnemonic.LIDT),
        *(Mnemonic.LLDT, Mnemonic.LTR, Mnemonic.WBINVD, Mnemonic.WRMSR),
    }
)
_FLUSHES_LINE: Final = frozenset({Mnemonic.CLFLUSH, Mnemonic.CLFLUSHOPT})
_FLUSHES_ALL: Final = frozenset({Mnemonic.WBINVD, Mnemonic.INVD})


class Coherence(enum.Enum):
    """A model; the value is its name in manifests."""

    COHERENT = "coherent"
    SERIALISED = "serialised"
    EXPLICIT = "explicit"


class Synchronises(enum.Enum):
    """What an instruction makes the fetch side see."""

    NOTHING = enum.auto()
    EVERYTHING = enum.auto()
    ITS_LINE = enum.auto()


def synchronises(mnemonic: int, *, moves_to_system_register: bool, model: Coherence) -> Synchronises:
    """What an instruction with this mnemonic synchronises in a model."""
    if model is Coherence.SERIALISED and (mnemonic in _SERIALISING or moves_to_system_register):
        return Synchronises.EVERYTHING
    if model is Coherence.EXPLICIT and mnemonic in _FLUSHES_LINE:
        return Synchronises.ITS_LINE
    if model is Coherence.EXPLICIT and mnemonic in _FLUSHES_ALL:
        return Synchronises.EVERYTHING
    return Synchronises.NOTHING


@lru_cache(maxsize=16384)
def synchronisation_of(code: bytes, bits: int, model: Coherence) -> Synchronises:
    """What the first instruction in ``code`` synchronises."""
    instruction = Decoder(bits, code, ip=0).decode()
    if instruction.code == Code.INVALID:
        return Synchronises.NOTHING
    moves = _moves_to_system_register(instruction)
    return synchronises(instruction.mnemonic, moves_to_system_register=moves, model=model)


@lru_cache(maxsize=16384)
def has_synchronisation(code: bytes, bits: int, model: Coherence) -> bool:
    """Whether any instruction of a block synchronises, so that the block has to be stepped."""
    return any(
        synchronises(
            instruction.mnemonic, moves_to_system_register=_moves_to_system_register(instruction), model=model
        )
        is not Synchronises.NOTHING
        for instruction in Decoder(bits, code, ip=0)
    )


def _moves_to_system_register(instruction: Instruction) -> bool:
    """MOV to a control register other than CR8, or to a debug register."""
    if instruction.mnemonic != Mnemonic.MOV or not instruction.op_count:
        return False
    target = instruction.op0_register
    control = Register.CR0 <= target <= Register.CR15 and target != Register.CR8
    return control or Register.DR0 <= target <= Register.DR15
