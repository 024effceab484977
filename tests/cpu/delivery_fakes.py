"""A CPU state and a linear memory that are nothing but their records, and builders for the guest's tables."""

from attrs import asdict, define, field

from vmm.cpu.state import Segment
from vmm.paging.access import PageFault

PAGE = 4096

CODE64 = 0xA09B
CODE32 = 0xC09B
CODE16 = 0x009B
DATA32 = 0xC093
DATA16 = 0x0093
DPL3 = 3 << 5
ACCESSED = 1
CONFORMING = 4
PRESENT = 0x80
TSS32 = 0x8B
TSS16 = 0x83
LDT = 0x82

IF, TF, NT, RF, VM, AC = 1 << 9, 1 << 8, 1 << 14, 1 << 16, 1 << 17, 1 << 18
IOPL3 = 3 << 12
PE, LMA = 1, 1 << 10


@define
class FakeState:
    rcx: int = 0
    r11: int = 0
    rip: int = 0x40_1000
    rsp: int = 0x8000
    rflags: int = IF | 2
    cr0: int = PE
    cr2: int = 0
    cr4: int = 0
    efer: int = 0
    dr6: int = 0xFFFF_0FF0
    dr7: int = 0x400
    gdtr: tuple[int, int] = (0x1000, 0xFFF)
    idtr: tuple[int, int] = (0x2000, 0xFFF)
    segments: dict[str, Segment] = field(factory=dict)

    @property
    def cpl(self) -> int:
        if not self.cr0 & PE:
            return 0
        if self.rflags & VM and not self.efer & LMA:
            return 3
        return self.segments["ss"].dpl

    def segment(self, name: str) -> Segment:
        return self.segments.get(name, Segment(0, 0, 0, 0))

    def set_segment(self, name: str, segment: Segment) -> None:
        self.segments[name] = segment

    def snapshot(self) -> dict:
        return asdict(self, recurse=False) | {"segments": dict(self.segments)}


@define
class FakeMemory:
    """Identity-mapped bytes, with the pages beyond them wrapped on; some pages are not there or read-only."""

    data: bytearray = field(factory=lambda: bytearray(0x20000), repr=False)
    absent: set[int] = field(factory=set)
    read_only: set[int] = field(factory=set)
    supervisor: set[int] = field(factory=set)
    accesses: list[tuple[str, int, int, bool]] = field(factory=list)

    def read(self, address: int, size: int, *, user: bool) -> bytes:
        self._check(address, size, user=user, write=False)
        self.accesses.append(("read", address, size, user))
        return bytes(self.data[i % len(self.data)] for i in range(address, address + size))

    def check_write(self, address: int, size: int, *, user: bool) -> None:
        self._check(address, size, user=user, write=True)

    def write(self, address: int, data: bytes, *, user: bool) -> None:
        self._check(address, len(data), user=user, write=True)
        self.accesses.append(("write", address, len(data), user))
        for i, byte in enumerate(data):
            self.data[(address + i) % len(self.data)] = byte

    def _check(self, address: int, size: int, *, user: bool, write: bool) -> None:
        assert 0 <= address < address + size <= 1 << 64
        for page in range(address // PAGE, (address + size - 1) // PAGE + 1):
            number = page % (len(self.data) // PAGE)
            absent = number in self.absent
            protected = write and number in self.read_only
            if absent or protected or (user and number in self.supervisor):
                code = (not absent) | write << 1 | user << 2
                raise PageFault(max(address, page * PAGE), code)

    def put(self, address: int, data: bytes) -> None:
        self.data[address : address + len(data)] = data

    def put_word(self, address: int, value: int, size: int = 8) -> None:
        self.put(address, value.to_bytes(size, "little"))

    def words(self, address: int, count: int, size: int = 8) -> list[int]:
        return [
            int.from_bytes(self.data[i : i + size], "little")
            for i in range(address, address + count * size, size)
        ]


def descriptor(access_rights: int, base: int = 0, limit: int = 0xFFFFF) -> bytes:
    """``limit`` as in the descriptor: 20 bits, in the unit that G says."""
    raw = limit & 0xFFFF | (base & 0xFFFFFF) << 16 | (access_rights & 0xFF) << 40
    raw |= (limit >> 16) << 48 | (access_rights >> 12 & 0xF) << 52 | (base >> 24) << 56
    return raw.to_bytes(8, "little")


def gate64(
    offset: int, selector: int = 8, *, kind: int = 0xE, dpl: int = 0, ist: int = 0, p: int = 1
) -> bytes:
    high = (offset >> 32).to_bytes(4, "little") + bytes(4)
    return gate32(offset & 0xFFFF_FFFF, selector, kind=kind, dpl=dpl, p=p, reserved=ist) + high


def gate32(
    offset: int, selector: int = 8, *, kind: int = 0xE, dpl: int = 0, p: int = 1, reserved: int = 0
) -> bytes:
    raw = offset & 0xFFFF | selector << 16 | reserved << 32 | kind << 40 | dpl << 45 | p << 47
    return (raw | (offset >> 16) << 48).to_bytes(8, "little")
