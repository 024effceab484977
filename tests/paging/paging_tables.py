"""Memory for page tables, and tables that map one address, for the tests of the walk."""

import pytest

from vmm.paging import Access, EntryChanged, PageFault, PagingMode, walk

P, RW, US, A, D, PS, G, XD = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
FULL = P | RW | US

PG, WP = 1 << 31, 1 << 16
PSE, PAE, PGE, LA57, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 7, 1 << 12, 1 << 20, 1 << 21
LME, NXE = 1 << 8, 1 << 11

#: What selects each mode: CR0, CR4, EFER; execute-disable is on where there is such a thing.
MODES = {
    "32-bit": (PG | WP, 0, 0),
    "32-bit PSE": (PG | WP, PSE, 0),
    "PAE": (PG | WP, PAE, NXE),
    "4-level": (PG | WP, PAE, LME | NXE),
    "5-level": (PG | WP, PAE | LA57, LME | NXE),
}

#: The levels of each mode that have entries with rights, from the top, and the size of an entry.
LEVELS = {
    "32-bit": ("PDE", "PTE"),
    "32-bit PSE": ("PDE", "PTE"),
    "PAE": ("PDE", "PTE"),
    "4-level": ("PML4E", "PDPTE", "PDE", "PTE"),
    "5-level": ("PML5E", "PML4E", "PDPTE", "PDE", "PTE"),
}

ROOT = 0x1000
PAGE = 0x3FF000
#: Index 1 at every level of every mode, and an offset of 0xABC.
GVA = {
    "32-bit": 1 << 22 | 1 << 12 | 0xABC,
    "32-bit PSE": 1 << 22 | 1 << 12 | 0xABC,
    "PAE": 1 << 30 | 1 << 21 | 1 << 12 | 0xABC,
    "4-level": 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12 | 0xABC,
    "5-level": 1 << 48 | 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12 | 0xABC,
}


class Memory:
    """Guest-physical memory in a bytearray; counts what the walk does to it."""

    def __init__(self, size=0x10000):
        self.bytes = bytearray(size)
        self.loads = []
        self.stores = []

    def load(self, gpa, size):
        assert gpa % size == 0
        assert gpa + size <= len(self.bytes), f"load at {gpa:#x}"
        self.loads.append(gpa)
        return int.from_bytes(self.bytes[gpa : gpa + size], "little")

    def compare_and_store(self, gpa, size, old, new):
        if int.from_bytes(self.bytes[gpa : gpa + size], "little") != old:
            raise EntryChanged("somebody else was here")
        self.stores.append((gpa, old, new))
        self.poke(gpa, size, new)

    def poke(self, gpa, size, value):
        self.bytes[gpa : gpa + size] = value.to_bytes(size, "little")


class Tables:
    """The tables that map ``GVA[mode]`` to ``PAGE``, every right granted; then bend them entry by entry."""

    def __init__(
        self, mode, *, leaf="PTE", cr0=0, cr4=0, efer=0, no_cr0=0, no_efer=0, maxphyaddr=40, gib=True
    ):
        base_cr0, base_cr4, base_efer = MODES[mode]
        self.mode = PagingMode.of(
            (base_cr0 | cr0) & ~no_cr0,
            base_cr4 | cr4,
            (base_efer | efer) & ~no_efer,
            maxphyaddr=maxphyaddr,
            gib_pages=gib,
        )
        self.gva = GVA[mode]
        self.cr3 = ROOT
        self.memory = Memory()
        self.size = 4 if mode.startswith("32") else 8
        self.where = {}
        table = ROOT
        if mode == "PAE":
            self.where["PAE PDPTE"] = ROOT + 8
            self.memory.poke(ROOT + 8, 8, (ROOT + 0x1000) | P)
            table = ROOT + 0x1000
        for name in LEVELS[mode]:
            self.where[name] = table + self.size
            table += 0x1000
            if name == leaf:
                self[name] = (PAGE if leaf == "PTE" else PS) | FULL
                break
            self[name] = table | FULL

    def __getitem__(self, name):
        return int.from_bytes(self.memory.bytes[self.where[name] :][: self._size(name)], "little")

    def __setitem__(self, name, value):
        self.memory.poke(self.where[name], self._size(name), value)

    def _size(self, name):
        return 8 if name == "PAE PDPTE" else self.size

    def walk(self, access, **how):
        how.setdefault("user", True)
        return walk(self.memory, self.mode, self.cr3, self.gva, access, **how)

    def fault(self, access, **how):
        """The error code of the fault that this access must raise; checks CR2 and that nothing was stored."""
        before = bytes(self.memory.bytes)
        with pytest.raises(PageFault) as fault:
            self.walk(access, **how)
        assert fault.value.address == self.gva
        assert self.memory.bytes == before
        return fault.value.error_code

    def allowed(self, **how):
        """The rights as a word such as "rw-": which accesses walk through, one by one, on a copy each."""
        saved = bytes(self.memory.bytes)
        letters = ""
        for access, letter in zip(Access, "rwx", strict=True):
            try:
                self.walk(access, **how)
                letters += letter
            except PageFault:
                letters += "-"
            self.memory.bytes[:] = saved
        return letters
