"""TLB fills that are answered without Python, because nothing that their answer depends on has changed.

The engine forgets translations all the time (a CR3 write, a change of a frame's state), and asks again for pages about
which nothing is different. What a fill is granted is a function of the paging mode, CR3, the linear page, the kind of
access, the privilege, the paging-structure entries that the walk reads, and of what the EPT says of the frames that
those lie in and of the page. A *slot* holds a walk of the past with all of that but the last, as (address in the VMM's
memory, what must be there); what the EPT says of the page is read when the slot is used. While each is as it was, a
walk would find the same; so nothing has to be invalidated, since nothing is believed. That takes some 20 ns, a fill in
Python a hundred times as long. A slot for a large page of the guest serves loads and stores to all that is in it.

The callback is host machine code (see ``vmm.cpu.machine_code``). What it finds no slot for, or what the EPT does not
simply allow, it hands on to Python.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vmm.cpu import binding as b
from vmm.cpu import layout as at
from vmm.cpu.machine_code import placed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.cpu.live import LiveState

#: (mask, masked value) of CR0, CR4 and EFER, which together are a paging mode; then the number of an EPT view.
Setting = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]

#: Bytes of a page that has a slot of its own, and of one that shares a slot with what is next to it.
PAGE: Final = 1 << 12
REGION: Final = 1 << 21

_SLOT: Final = 256
_SLOTS_LOG2: Final = 15
_MULTIPLIER: Final = 0x9E37_79B9_7F4A_7C15
_U64: Final = (1 << 64) - 1
#: Settings that have a number at a time: what bits 10:3 of a key have room for.
_MOST_SETTINGS: Final = 1 << 8
#: Bit 11 of the key of a region's slot.
_OF_REGION: Final = 1 << 11
#: A slot: key (linear page or region | bit 11 | number of the setting << 3 | user << 2 | access bits 1:0), CR3, where
#: the leaf of the region's first page is, the bits of a leaf of which one is needed, the permissions that are granted
#: if the leaf has them, address that gets the host page at each use or 0; then (address, value) pairs up to address 0.
_HEAD: Final = struct.Struct("<6Q")
#: Pairs that a slot has room for.
MOST_WATCHED: Final = (_SLOT - _HEAD.size - 8) // 16
_PACK: Final = [struct.Struct(f"<{6 + 2 * count + 1}Q").pack_into for count in range(MOST_WATCHED + 1)]
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000

# System V calling convention: engine in RDI, linear page in RSI, access (16 read, 17 write, 18 fetch) in EDX, the
# engine's entry in RCX, the cell in R8. R9 leads to hflags, from which CR0, CR4, EFER and CR3 have these distances.
# 0x38 are the bits of a leaf that want Python: it is misconfigured, or flags have to be set.
_CODE: Final = bytes.fromhex(
    "498338000f852c0100004d8b4810"      #          cmp qword ptr [r8], 0; jne python; mov r9, [r8 + 16]
    "498b81f800000049234018493b4020"    #          mov rax, [r9 + 248]; and rax, [r8 + 24]; cmp rax, [r8 + 32]
    "0f8513010000498b8118010000"        #          jne python; mov rax, [r9 + 280]
    "49234028493b40300f85fe000000"      #          and rax, [r8 + 40]; cmp rax, [r8 + 48]; jne python
    "498b81a001000049234038493b4040"    #          mov rax, [r9 + 416]; and rax, [r8 + 56]; cmp rax, [r8 + 64]
    "0f85e900000053418b0183e00383f803"  #          jne python; push rbx; mov eax, [r9]; and eax, 3; cmp eax, 3
    "0f94c00fb6c0c1e0024189d24183e203"  #          sete al; movzx eax, al; shl eax, 2; mov r10d, edx; and r10d, 3
    "4109c24909f24d0b5060"              #          or r10d, eax; or r10, rsi; or r10, [r8 + 96]
    "4d8b9910010000"                    #          mov r11, [r9 + 272]
    "4c89d04c31d8490faf404848c1e831"    # lookup:  mov rax, r10; xor rax, r11; imul rax, [r8 + 72]; shr rax, 49
    "48c1e008490340504c39107521"        #          shl rax, 8; add rax, [r8 + 80]; cmp [rax], r10; jne other
    "4c395808751b4c8d4830"              #          cmp [rax + 8], r11; jne other; lea r9, [rax + 48]
    "498b194885db7432488b1b"            # watched: mov rbx, [r9]; test rbx, rbx; je found; mov rbx, [rbx]
    "493b590875064983c110ebe9"          #          cmp rbx, [r9 + 8]; jne other; add r9, 16; jmp watched
    "41f7c20008000075774489d3"          # other:   test r10d, 0x800; jne undo; mov ebx, r10d
    "81e3ff0700004981e20000e0ff"        #          and ebx, 0x7ff; and r10, -0x200000
    "4d8d941a00080000eba0"              #          lea r10, [r10 + rbx + 0x800]; jmp lookup
    "4989f149c1e9094181e1f80f0000"      # found:   mov r9, rsi; shr r9, 9; and r9d, 0xff8
    "4c034810498b19f7c3380000007540"    #          add r9, [rax + 16]; mov rbx, [r9]; test ebx, 0x38; jne undo
    "48855818743a4189d14183e102"        #          test rbx, [rax + 24]; je undo; mov r9d, edx; and r9d, 2
    "4501c94189da442350204509ca"        #          add r9d, r9d; mov r10d, ebx; and r10d, [rax + 32]; or r10d, r9d
    "4c8951084d8b50684c21d3"            #          mov [rcx + 8], r10; mov r10, [r8 + 104]; and rbx, r10
    "4889194c8b48284d85c97403"          #          mov [rcx], rbx; mov r9, [rax + 40]; test r9, r9; je 1f
    "498919"                            #          mov [r9], rbx
    "49834058015bb801000000c3"          # 1:       add qword ptr [r8 + 88], 1; pop rbx; mov eax, 1; ret
    "5b"                                # undo:    pop rbx
    "41ff6008"                          # python:  jmp [r8 + 8]
)  # fmt: skip


class _Cell(ctypes.Structure):
    """What the callback needs to know."""

    _fields_ = (
        ("off", ctypes.c_uint64),
        ("python", ctypes.c_void_p),
        ("hflags", ctypes.c_void_p),
        ("cr0_mask", ctypes.c_uint64),
        ("cr0", ctypes.c_uint64),
        ("cr4_mask", ctypes.c_uint64),
        ("cr4", ctypes.c_uint64),
        ("efer_mask", ctypes.c_uint64),
        ("efer", ctypes.c_uint64),
        ("multiplier", ctypes.c_uint64),
        ("slots", ctypes.c_void_p),
        ("answered", ctypes.c_uint64),
        ("setting", ctypes.c_uint64),
        ("address_mask", ctypes.c_uint64),
    )


class Granted(NamedTuple):
    """What a fill was granted, and why.

    ``size`` is ``PAGE`` or ``REGION``. ``leaves`` is the address of the EPT's leaf for the first page of the region
    that ``page`` is in. An access takes a leaf with one of the bits ``needed``, and gets of it the permissions
    ``allowed``; a fetch gets X. ``fetched`` is the address of 8 bytes that get the host page at each use, or 0.
    ``watched`` are addresses of 8 bytes and their values, by turns.
    """

    page: int
    access: int
    cr3: int
    user: bool
    size: int
    leaves: int
    needed: int
    allowed: int
    fetched: int
    watched: Sequence[int]


class FillTable:
    """Remembers granted fills of one engine; the engine's fill callback is ``callback``.

    ``python`` is what the engine would call otherwise. Nothing is answered before ``connect``, nor while the table is
    ``suspended``. A fill that depends on anything that a slot cannot hold must not be kept.
    """

    def __init__(self, python: Any) -> None:
        code = placed(_CODE)
        self._python: Final = python  # ctypes callbacks must be held on to
        self._cell: Final = _Cell(
            off=1,
            python=ctypes.cast(python, ctypes.c_void_p).value,
            multiplier=_MULTIPLIER,
            address_mask=_ADDRESS,
        )
        #: For ``uc_hook_add``: the callback, and its user data.
        self.callback: Final[Any] = python if code is None else b.TlbFill(code)
        self.user_data: Final[Any] = ctypes.byref(self._cell)
        self._native = code is not None
        self._slots: mmap.mmap | None = None
        self._settings: dict[Setting, int] = {}
        self._setting = 0
        self._used = False

    def connect(self, live: LiveState) -> None:
        """Begin to answer, where there is machine code and the state of the running engine can be read in place."""
        if self._native and live.address is not None:
            slots = self._slots = mmap.mmap(-1, _SLOT << _SLOTS_LOG2)
            self._cell.slots = ctypes.addressof(ctypes.c_char.from_buffer(slots))
            self._cell.hflags = live.address + at.HFLAGS
            self.suspend(on=False)

    @property
    def remembers(self) -> bool:
        """Whether it is of use to keep fills."""
        return self._slots is not None

    def retire(self) -> None:
        """Leave all fills to Python, for good."""
        self._slots = None
        self._cell.off = 1

    def suspend(self, *, on: bool) -> None:
        """Leave all fills to Python for a while, or no longer."""
        self._cell.off = on or self._slots is None

    @property
    def answered(self) -> int:
        """Fills that were answered without Python; depends on the host."""
        return int(self._cell.answered)

    def select(self, setting: Setting) -> None:
        """The engine is in another paging mode, or uses another EPT: what is kept for another setting rests."""
        number = self._settings.get(setting)
        if number is None:
            if len(self._settings) == _MOST_SETTINGS:
                self.clear()
            number = self._settings[setting] = len(self._settings)
        cell = self._cell
        (cell.cr0_mask, cell.cr0), (cell.cr4_mask, cell.cr4), (cell.efer_mask, cell.efer) = setting[:3]
        cell.setting = self._setting = number << 3

    def clear(self) -> None:
        """Forget all fills, and all settings: ``select`` one before the next is kept."""
        self._settings.clear()
        if self._slots is not None and self._used:
            self._slots[:] = bytes(len(self._slots))
            self._used = False

    def keep(self, granted: Granted) -> None:
        """Remember what a fill was granted, unless it depends on more than a slot has room for."""
        page, access, cr3, user, size, leaves, needed, allowed, fetched, watched = granted
        if self._slots is None or len(watched) > 2 * MOST_WATCHED:
            return
        key = access & 3 | user << 2 | self._setting
        key |= page & -REGION | _OF_REGION if size == REGION else page
        slot = ((key ^ cr3) * _MULTIPLIER & _U64) >> 64 - _SLOTS_LOG2
        pack = _PACK[len(watched) >> 1]
        self._used = True
        pack(self._slots, slot * _SLOT, key, cr3, leaves, needed, allowed, fetched, *watched, 0)
