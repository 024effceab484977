"""Random pairs of programs on two vCPUs that patch each other's code, made to order for comparing ways of running them.

Both programs call the functions of one ``RandomGuest``, through random aliases, and patch them in between; so do the
functions themselves, and the handlers of the interrupts that the programs send each other. Every patch is one
instruction and leaves whole units, so that neither vCPU ever executes garbage, whatever the interleaving.
"""

from __future__ import annotations

import tiny
from random_guests import BASE_REGISTERS, BASES, FRAMES, RandomGuest
from tiny import CODE, DATA, PAGE, STACK, map_page

from vmm.guest.manifest import CpuSpec, Policy, Schedule

OTHER = 0x18000
OTHER_STACK = 0x58000
IDT = 0x48000
HANDLER = CODE + 0xC00
VECTOR = 0x20
IPI = 0xB0
#: Where each program says that it is done.
DONE = DATA + 0x40
QUANTA = (1, 2, 3, 8, 64, 400)


def _gate(handler: int) -> bytes:
    return (handler & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48).to_bytes(16, "little")


class RandomPair(RandomGuest):
    """Two programs, decided by their seed; so is the length of their turns."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.schedule = Schedule(seed, self.rng.choice(QUANTA))

    def program(self, number: int) -> str:
        """What one vCPU executes."""
        rng = self.rng
        counter = f"dword ptr [{DATA + 0x50 + 8 * number}]"
        lines = [f"mov {register}, {base}" for register, base in zip(BASE_REGISTERS, BASES, strict=True)]
        lines += [f"mov r15d, {rng.getrandbits(31)}", f"mov {counter}, {rng.randint(3, 8)}", "round:"]
        for _ in range(rng.randint(3, 6)):
            lines.append(f"mov ebx, {rng.choice(BASES) + rng.choice(self.offsets)}; call rbx")
            if rng.random() < 0.6:
                lines.append(f"mov dword ptr [{rng.choice(BASE_REGISTERS)} + {self._site() + 3}], r15d")
            if rng.random() < 0.3:
                lines.append(f"mov eax, {(1 - number) << 8 | VECTOR + rng.randrange(2)}; mov dx, {IPI}; out dx, ax")
            if rng.random() < 0.2:
                lines.append(rng.choice(["cli", "sti", "sti; hlt" if number else "sti; nop"]))
        lines += [f"dec {counter}", "jnz round", f"lock inc dword ptr [{DONE}]"]
        return "\n".join(lines)

    def handler(self) -> str:
        """Patches an immediate, and leaves everything else as it was."""
        where = self.rng.choice(BASES) + self._site() + 3
        return f"push rbx; mov ebx, {where}; add dword ptr [rbx], {self.rng.getrandbits(31)}; pop rbx; iretq"

    def segments(self) -> dict[int, str | bytes]:
        # The other one may be halted: it is woken until it is done.
        wait = f"""
            mov dx, {IPI}; wait: mov eax, {1 << 8 | VECTOR}; out dx, ax; mov ecx, 40; pass: dec ecx; jnz pass
            cmp dword ptr [{DONE}], 2; jne wait; xor eax, eax; {tiny.END}
        """
        return {
            **super().segments(),
            CODE: f"{self.program(0)}\n{wait}",
            OTHER: f"{self.program(1)}\ncli; hlt",
            HANDLER: self.handler(),
            HANDLER + 0x100: self.handler(),
            IDT: bytes(16 * VECTOR) + _gate(HANDLER) + _gate(HANDLER + 0x100),
        }

    def build(self, segments: dict[int, str | bytes], *, options, policy: Policy) -> tiny.Tiny:
        maps = [map_page(base + i * PAGE, frame) for base in BASES for i, frame in enumerate(FRAMES)]
        stack = map_page(OTHER_STACK - PAGE, OTHER_STACK - PAGE, "rw")
        maps += [map_page(OTHER, OTHER), map_page(IDT, IDT, "rw"), stack]
        return tiny.build(
            segments,
            maps=maps,
            options=options,
            policy=policy,
            code=(CODE, HANDLER, HANDLER + 0x100, OTHER, *FRAMES),
            idt=IDT,
            registers={"rsp": STACK, "rflags": 0x202},
            others=[CpuSpec(OTHER, registers={"rsp": OTHER_STACK, "rflags": 0x202}, idt=IDT)],
            schedule=self.schedule,
            ipi=IPI,
        )
