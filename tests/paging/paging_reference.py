"""A second page walker, slow and as literal as can be (SDM vol. 3, chapter 4), to compare with.

It shares nothing with ``vmm.paging``: control registers go in raw, memory is bytes, an access is a word.
"""

from dataclasses import dataclass

READ, WRITE, FETCH = "read", "write", "fetch"


def bits(value, high, low):
    return (value >> low) & ((1 << (high - low + 1)) - 1)


def bit(value, number):
    return bits(value, number, number)


@dataclass(frozen=True)
class Processor:
    cr0: int
    cr3: int
    cr4: int
    efer: int
    maxphyaddr: int = 40
    gib_pages: bool = True

    @property
    def wp(self):
        return bit(self.cr0, 16)

    @property
    def nxe(self):
        return bit(self.efer, 11)

    @property
    def smep(self):
        return bit(self.cr4, 20)

    @property
    def smap(self):
        return bit(self.cr4, 21)

    @property
    def paging_mode(self):
        """4.1.1 Four paging modes."""
        if not bit(self.cr0, 31):
            return "none"
        if not bit(self.cr4, 5):
            return "32-bit"
        if not bit(self.efer, 8):
            return "PAE"
        return "5-level" if bit(self.cr4, 12) else "4-level"


@dataclass(frozen=True)
class Asker:
    """Who makes the access: 4.6, "supervisor-mode access", "explicit", "implicit"."""

    cpl3: bool
    ac: bool = False
    implicit: bool = False

    @property
    def user_mode(self):
        return self.cpl3 and not self.implicit


@dataclass(frozen=True)
class Fault:
    address: int
    error_code: int


@dataclass(frozen=True)
class Answer:
    page: int
    page_size: int
    user_page: bool
    global_page: bool
    execute_disable: bool
    readable: bool
    writable: bool
    executable: bool


class NoTranslation(Exception):
    def __init__(self, present):
        self.present = present


def translate(memory, cpu, gva, kind, asker):
    """One access: an Answer or a Fault. ``memory`` is changed by the accessed and dirty flags."""
    if cpu.paging_mode == "none":
        page = bits(gva, 31, 12) << 12
        return Answer(page, 4096, True, False, False, True, True, True)
    linear = gva if cpu.paging_mode in ("4-level", "5-level") else bits(gva, 31, 0)
    size = 4 if cpu.paging_mode == "32-bit" else 8
    try:
        used, page, page_size = WALKS[cpu.paging_mode](memory, cpu, linear)
    except NoTranslation as missing:
        return Fault(linear, error_code(cpu, kind, asker, p=missing.present, rsvd=missing.present))
    values = [load(memory, where, size) for where in used]
    if not permitted(cpu, values, kind, asker):
        return Fault(linear, error_code(cpu, kind, asker, p=1, rsvd=0))
    set_flags(memory, used, size, kind)
    leaf = load(memory, used[-1], size)
    return Answer(
        page=page,
        page_size=page_size,
        user_page=is_user(values),
        global_page=bool(bit(leaf, 8) and bit(cpu.cr4, 7)),
        execute_disable=size == 8 and any(bit(v, 63) for v in values),
        readable=permitted(cpu, values, READ, asker),
        writable=permitted(cpu, values, WRITE, asker) and bool(bit(leaf, 6)),
        executable=permitted(cpu, values, FETCH, asker),
    )


def load(memory, where, size):
    return int.from_bytes(memory[where : where + size], "little")


def present(entry):
    if not bit(entry, 0):
        raise NoTranslation(present=0)


def must_be_zero(entry, high, low):
    if high >= low and bits(entry, high, low):
        raise NoTranslation(present=1)


# 4.3 32-bit paging ----------------------------------------------------------------------------------------


def walk_32_bit(memory, cpu, linear):
    where_pde = bits(cpu.cr3, 31, 12) << 12 | bits(linear, 31, 22) << 2
    pde = load(memory, where_pde, 4)
    present(pde)
    if bit(cpu.cr4, 4) and bit(pde, 7):
        m = min(40, cpu.maxphyaddr)
        must_be_zero(pde, 21, m - 19)
        page = bits(pde, 31, 22) << 22 | bits(linear, 21, 12) << 12
        if m > 32:
            page |= bits(pde, m - 20, 13) << 32
        return [where_pde], page, 4 << 20
    where_pte = bits(pde, 31, 12) << 12 | bits(linear, 21, 12) << 2
    pte = load(memory, where_pte, 4)
    present(pte)
    return [where_pde, where_pte], bits(pte, 31, 12) << 12, 4096


# 4.4 PAE paging -------------------------------------------------------------------------------------------


def walk_pae(memory, cpu, linear):
    m = cpu.maxphyaddr
    pdpte = load(memory, bits(cpu.cr3, 31, 5) << 5 | bits(linear, 31, 30) << 3, 8)
    present(pdpte)
    must_be_zero(pdpte, 2, 1)
    must_be_zero(pdpte, 8, 5)
    must_be_zero(pdpte, 63, m)
    where_pde = bits(pdpte, m - 1, 12) << 12 | bits(linear, 29, 21) << 3
    pde = load(memory, where_pde, 8)
    present(pde)
    must_be_zero(pde, 62, m)
    execute_disable(cpu, pde)
    if bit(pde, 7):
        must_be_zero(pde, 20, 13)
        return [where_pde], bits(pde, m - 1, 21) << 21 | bits(linear, 20, 12) << 12, 2 << 20
    where_pte = bits(pde, m - 1, 12) << 12 | bits(linear, 20, 12) << 3
    pte = load(memory, where_pte, 8)
    present(pte)
    must_be_zero(pte, 62, m)
    execute_disable(cpu, pte)
    return [where_pde, where_pte], bits(pte, m - 1, 12) << 12, 4096


def execute_disable(cpu, entry):
    if not cpu.nxe:
        must_be_zero(entry, 63, 63)


# 4.5 4-level and 5-level paging ---------------------------------------------------------------------------


def walk_5_level(memory, cpu, linear):
    where = bits(cpu.cr3, cpu.maxphyaddr - 1, 12) << 12 | bits(linear, 56, 48) << 3
    pml5e = load(memory, where, 8)
    present(pml5e)
    must_be_zero(pml5e, 51, cpu.maxphyaddr)
    must_be_zero(pml5e, 7, 7)
    execute_disable(cpu, pml5e)
    used, page, size = walk_pml4(memory, cpu, linear, bits(pml5e, cpu.maxphyaddr - 1, 12) << 12)
    return [where, *used], page, size


def walk_4_level(memory, cpu, linear):
    return walk_pml4(memory, cpu, linear, bits(cpu.cr3, cpu.maxphyaddr - 1, 12) << 12)


def walk_pml4(memory, cpu, linear, pml4):
    m = cpu.maxphyaddr
    where_pml4e = pml4 | bits(linear, 47, 39) << 3
    pml4e = load(memory, where_pml4e, 8)
    present(pml4e)
    must_be_zero(pml4e, 51, m)
    must_be_zero(pml4e, 7, 7)
    execute_disable(cpu, pml4e)
    where_pdpte = bits(pml4e, m - 1, 12) << 12 | bits(linear, 38, 30) << 3
    pdpte = load(memory, where_pdpte, 8)
    present(pdpte)
    must_be_zero(pdpte, 51, m)
    execute_disable(cpu, pdpte)
    if bit(pdpte, 7):
        if not cpu.gib_pages:
            must_be_zero(pdpte, 7, 7)
        must_be_zero(pdpte, 29, 13)
        page = bits(pdpte, m - 1, 30) << 30 | bits(linear, 29, 12) << 12
        return [where_pml4e, where_pdpte], page, 1 << 30
    where_pde = bits(pdpte, m - 1, 12) << 12 | bits(linear, 29, 21) << 3
    pde = load(memory, where_pde, 8)
    present(pde)
    must_be_zero(pde, 51, m)
    execute_disable(cpu, pde)
    if bit(pde, 7):
        must_be_zero(pde, 20, 13)
        page = bits(pde, m - 1, 21) << 21 | bits(linear, 20, 12) << 12
        return [where_pml4e, where_pdpte, where_pde], page, 2 << 20
    where_pte = bits(pde, m - 1, 12) << 12 | bits(linear, 20, 12) << 3
    pte = load(memory, where_pte, 8)
    present(pte)
    must_be_zero(pte, 51, m)
    execute_disable(cpu, pte)
    return [where_pml4e, where_pdpte, where_pde, where_pte], bits(pte, m - 1, 12) << 12, 4096


WALKS = {"32-bit": walk_32_bit, "PAE": walk_pae, "4-level": walk_4_level, "5-level": walk_5_level}


# 4.6 Access rights ----------------------------------------------------------------------------------------


def is_user(values):
    """4.6: "user-mode address" if U/S is 1 in every entry that controls the translation."""
    return all(bit(v, 2) for v in values)


def permitted(cpu, values, kind, asker):
    """4.6.1 Determination of access rights."""
    user_address = is_user(values)
    every_rw = all(bit(v, 1) for v in values)
    no_xd = cpu.paging_mode == "32-bit" or not cpu.nxe or not any(bit(v, 63) for v in values)
    if asker.user_mode:
        if not user_address:
            return False
        return {READ: True, WRITE: every_rw, FETCH: no_xd}[kind]
    if kind == FETCH:
        if user_address and cpu.smep:
            return False
        return no_xd
    if user_address and cpu.smap and (asker.implicit or not asker.ac):
        return False
    return kind == READ or every_rw or not cpu.wp


# 4.7 Page-fault exceptions --------------------------------------------------------------------------------


def error_code(cpu, kind, asker, *, p, rsvd):
    fetch_is_reported = cpu.smep or (bit(cpu.cr4, 5) and cpu.nxe)
    return (
        (1 if p else 0)
        | (2 if kind == WRITE else 0)
        | (4 if asker.user_mode else 0)
        | (8 if rsvd else 0)
        | (16 if kind == FETCH and fetch_is_reported else 0)
    )


# 4.8 Accessed and dirty flags -----------------------------------------------------------------------------


def set_flags(memory, used, size, kind):
    for where in used:
        memory[where] |= 1 << 5
    if kind == WRITE:
        memory[used[-1]] |= 1 << 6
