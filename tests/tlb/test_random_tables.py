"""Random changes of a page table and uses of its pages, against a processor in a dozen lines of Python."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tlb_machine import OTHER_PLACE, PAGE_UNDER_TEST, PLACE, PRESENT, WAYS, WRITABLE, entry, run, stale

PAGES = (PAGE_UNDER_TEST, PAGE_UNDER_TEST + 0x3000, PAGE_UNDER_TEST + 0x4000)
PLACES = (PLACE, OTHER_PLACE)
RELOAD = "mov eax, cr3; mov cr3, eax"

steps = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "map", "invlpg", "reload"]), st.sampled_from(PAGES), st.sampled_from(PLACES)
    ),
    max_size=24,
)


def assembly(index: int, step: tuple[str, int, int]) -> str:
    what, page, place = step
    return {
        "read": f"mov ebx, [{page:#x}]; imul ecx, ecx, 31; add ecx, ebx",
        "write": f"mov dword ptr [{page:#x}], {index + 2:#x}",
        "map": f"mov dword ptr [{entry(page):#x}], {place | PRESENT | WRITABLE:#x}",
        "invlpg": f"invlpg [{page:#x}]",
        "reload": RELOAD,
    }[what]


class Processor:
    """Caches what it uses until INVLPG or MOV to CR3; the first write to a page walks anew."""

    def __init__(self) -> None:
        self.table = dict.fromkeys(PAGES, PLACE)
        self.memory = {PLACE: 0x11111111, OTHER_PLACE: 0x22222222}
        self.dirty: dict[int, bool] = dict.fromkeys(PAGES, False)
        self.cached: dict[int, tuple[int, bool]] = {}
        self.relied: set[tuple[int, str]] = set()
        self.hash = 0
        self.reports: list[tuple[str, int]] = []

    def use(self, page: int, access: str) -> int:
        write = access == "write"
        if page not in self.cached or (write and not self.cached[page][1]):
            self.dirty[page] |= write
            self.cached[page] = self.table[page], self.dirty[page]
            self.relied -= {(page, "read"), (page, "write")}
        place = self.cached[page][0]
        if place != self.table[page] and (page, access) not in self.relied:
            self.relied.add((page, access))
            self.reports.append((access, page))
        return place

    def do(self, index: int, step: tuple[str, int, int]) -> None:
        what, page, place = step
        if what == "read":
            self.hash = self.hash * 31 + self.memory[self.use(page, "read")] & 0xFFFFFFFF
        elif what == "write":
            self.memory[self.use(page, "write")] = index + 2
        elif what == "map":
            self.table[page], self.dirty[page] = place, False
        else:
            for each in PAGES if what == "reload" else (page,):
                self.cached.pop(each, None)
                self.relied -= {(each, "read"), (each, "write")}


@settings(max_examples=8, deadline=None)
@given(steps)
def test_reads_and_reports_are_those_of_the_processor(program):
    wanted = Processor()
    for index, step in enumerate(program):
        wanted.do(index, step)
    prologue = "".join(f"mov dword ptr [{entry(page):#x}], {PLACE | PRESENT | WRITABLE:#x}\n" for page in PAGES)
    source = prologue + RELOAD + "\nmov ecx, 0\n" + "\n".join(assembly(*each) for each in enumerate(program))
    for way in ("audited", "stepped"):
        made = run(source, options=WAYS[way])
        assert made.machine.register("rcx") == wanted.hash
        assert [(record.access, record.gva) for record in stale(made)] == wanted.reports
