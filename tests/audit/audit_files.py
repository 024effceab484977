"""ELF files for the tests of the audit, in every class and byte order."""

import random

from guest.elf_builder import Elf, Load

from vmm.audit import findings, read_image

TEXT, DATA = 0x10000, 0x20000
R, W, X = 4, 2, 1
X86_64, I386, AARCH64, ARM, MIPS, PPC64, RISCV = 62, 3, 183, 40, 8, 21, 243
DYNAMIC_HEADER, STACK_HEADER, RELRO_HEADER = 2, 0x6474E551, 0x6474E552
FORMATS = [(64, "<"), (64, ">"), (32, "<"), (32, ">")]

NULL, PLTRELSZ, STRTAB, SYMTAB, RELA, RELASZ = 0, 2, 5, 6, 7, 8
INIT, FINI, REL, RELSZ, PLTREL, TEXTREL, JMPREL = 12, 13, 17, 18, 20, 22, 23
FLAGS, RELRSZ, RELR = 30, 35, 36
ANDROID_RELA, ANDROID_RELASZ = 0x60000011, 0x60000012

CODE = Load(TEXT, b"\x90" * 64, flags=R | X)
NO_EXECUTABLE_STACK = Load(type=STACK_HEADER, data=b"", paddr=0, flags=R | W)


def elf(*loads, stack=True, **options):
    """A file with code, these headers, and a stack that is data, so that nothing but ``loads`` can be found."""
    headers = [CODE, *loads, *([NO_EXECUTABLE_STACK] if stack else [])]
    return Elf(headers, **{"entry": TEXT, **options})


def dynamic(tags, blobs=None, *, loads=(), **options):
    """A file with a dynamic table in a writable segment at ``DATA``, and ``blobs`` behind it.

    The value of a tag is a number, the name of a blob (its address), or ``len NAME`` (its size in bytes).
    """
    blobs = blobs or {}
    file = elf(**options)
    size = (len(tags) + 1) * 2 * file.bits // 8
    values, address = {}, DATA + size
    for name, blob in blobs.items():
        values[name], values[f"len {name}"] = address, len(blob)
        address += len(blob)
    table = b"".join(file.words(tag, values.get(value, value)) for tag, value in tags) + file.words(NULL, 0)
    data = Load(DATA, table + b"".join(blobs.values()), flags=R | W)
    header = Load(type=DYNAMIC_HEADER, data=b"", paddr=DATA, flags=R | W, filesz=size, memsz=size)
    file = elf(data, *loads, header, **options)
    header.offset = file.layout("ehdr").size + len(file.loads) * file.layout("phdr").size + len(CODE.data)
    return file


def rel(file, *relocations, addend=None):
    """REL entries for (address, symbol, type), or RELA entries if there is an ``addend``."""
    rest = () if addend is None else (addend,)
    shift = 32 if file.bits == 64 else 8
    return b"".join(file.words(address, symbol << shift | kind, *rest) for address, symbol, kind in relocations)


def image_of(file):
    return read_image(file if isinstance(file, bytes) else file.build(), "image")


def found(file):
    """What an audit finds, by rule; a rule that found several things makes the test fail."""
    everything = findings(image_of(file))
    by_rule = {str(finding.rule): finding for finding in everything}
    assert len(by_rule) == len(everything)
    return by_rule


def rules(file):
    """The rules that find something, in order."""
    return [str(finding.rule) for finding in findings(image_of(file))]


def sleb128(value):
    """The shortest signed LEB128 encoding."""
    encoded = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        if (value == 0 and not byte & 0x40) or (value == -1 and byte & 0x40):
            return bytes([*encoded, byte])
        encoded.append(byte | 0x80)


def packed(relocations, seed, bits=64):
    """Android's packing of (address, r_info), in groups of any size and kind that may hold them."""
    choose = random.Random(seed)
    numbers = [len(relocations), 0]
    before = 0
    rest = list(relocations)
    while rest:
        same_info = next((i for i, r in enumerate(rest) if r[1] != rest[0][1]), len(rest))
        steps = [a[0] - b[0] for a, b in zip(rest, [(before, 0), *rest], strict=False)]
        same_step = next((i for i, step in enumerate(steps) if step != steps[0]), len(steps))
        flags = choose.randrange(16)
        size = min(same_info if flags & 1 else len(rest), same_step if flags & 2 else len(rest))
        size = choose.randint(1, size)
        numbers += [size, flags, *([steps[0]] if flags & 2 else []), *([rest[0][1]] if flags & 1 else [])]
        numbers += [choose.randint(-99, 99)] if flags & 12 == 12 else []
        for address, info in rest[:size]:
            numbers += [] if flags & 2 else [address - before]
            numbers += [] if flags & 1 else [info]
            numbers += [choose.randint(-99, 99)] if flags & 12 == 8 else []
            before = address
        rest = rest[size:]
    return b"APS2" + b"".join(map(sleb128, numbers))


def relr(addresses, word):
    """RELR words for ascending addresses that are multiples of ``word``."""
    words, rest = [], list(addresses)
    while rest:
        words.append(rest.pop(0))
        start = words[-1] + word
        span = (word * 8 - 1) * word
        while rest and rest[0] < start + span:
            inside = [address for address in rest if address < start + span]
            rest = rest[len(inside) :]
            words.append(1 | sum(1 << (1 + (address - start) // word) for address in inside))
            start += span
    return words
