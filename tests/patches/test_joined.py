"""Stores become patches: no byte and no store is lost, and what belongs together comes together."""

from __future__ import annotations

from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from traces import DIRECT, POKE, at, physical, store

from vmm.memory import PAGE
from vmm.patches.joined import INT3, Patch, join
from vmm.patches.mapping import Mapping

PLACE = at("patched_function")


def poke(offset: int, old: bytes, new: bytes, *, step: int = 0, page: int = 0) -> object:
    """One store of text_poke_bp; each step is another call of the routine that copies."""
    callers = ("__text_poke", ("text_poke_bp_batch", "text_poke_finish", "_text")[step])
    place = PLACE + page * PAGE + offset
    return store(place, old, new, callers=callers, gva=POKE + offset)


class TestOneCopy:
    def test_words_that_overlap_are_one_patch(self):
        first = store(PLACE, b"\xe8\1\2\3", b"\x0f\x1f\x44\0", callers=["apply_returns"])
        second = store(PLACE + 1, b"\x1f\x44\0\4", b"\x1f\x44\0\0", callers=["apply_returns"])
        (patch,) = join([first, second])
        assert (patch.old, patch.new) == (b"\xe8\1\2\3\4", b"\x0f\x1f\x44\0\0")
        assert (patch.stores, patch.size, patch.start) == (2, 8, PLACE)

    @given(st.lists(st.integers(0, 0xCB), min_size=1, max_size=40).map(bytes), st.data())
    def test_however_a_copy_is_cut_up_it_is_one_patch(self, new, data):
        before = b"\x55" * len(new)
        memory, stores, done = bytearray(before), [], 0
        while done < len(new):
            start = data.draw(st.integers(max(0, done - 7), done))
            end = data.draw(st.integers(done + 1, min(len(new), done + 8)))
            stores.append(store(PLACE + start, bytes(memory[start:end]), new[start:end], callers=["apply_returns"]))
            memory[start:end] = new[start:end]
            done = end
        (patch,) = join(stores)
        assert (patch.start, patch.old, patch.new) == (PLACE, before, new)
        assert patch.stores == len(stores)

    def test_another_caller_is_another_patch(self):
        pieces = [store(PLACE, callers=["apply_returns"]), store(PLACE + 1, callers=["apply_alternatives"])]
        assert [patch.stores for patch in join(pieces)] == [1, 1]

    def test_the_same_address_of_another_frame_is_another_patch(self):
        pieces = [poke(0, b"\xf0", b"\x3e"), poke(1, b"\xf0", b"\x3e", page=3)]
        assert [patch.stores for patch in join(pieces)] == [1, 1]

    def test_a_patch_is_never_longer_than_a_page(self):
        pieces = [store(PLACE + 8 * i, bytes(8), bytes(8), gva=DIRECT + physical(PLACE) + 8 * i) for i in range(1024)]
        assert [(patch.stores, len(patch.new)) for patch in join(pieces)] == [(512, PAGE)] * 2

    def test_what_a_window_saw_stays_as_it_is(self):
        seen = evolve(store(PLACE, cause="window"), gva=None, rip=None)
        patches = list(join([seen, evolve(seen, gpa=seen.gpa + 1)]))
        assert [(patch.stores, patch.mapping, patch.gpa) for patch in patches] == [
            (1, Mapping.UNKNOWN, seen.gpa), (1, Mapping.UNKNOWN, seen.gpa + 1)
        ]


class TestBehindABreakpoint:
    OLD, NEW = b"\xe9\1\2\3\4", b"\x0f\x1f\x44\0\0"

    def steps(self, offset: int = 0) -> list:
        return [
            poke(offset, self.OLD[:1], INT3, step=0),
            poke(offset + 1, self.OLD[1:], self.NEW[1:], step=1),
            poke(offset, INT3, self.NEW[:1], step=2),
        ]

    def check(self, patch: Patch, offset: int = 0) -> None:
        assert (patch.old, patch.new) == (self.OLD, self.NEW)
        assert (patch.stores, patch.size, patch.behind_int3) == (3, 6, True)
        assert patch.executed_at == PLACE + offset
        assert patch.mapping is Mapping.POKE

    def test_three_steps_are_one_patch(self):
        (patch,) = join(self.steps())
        self.check(patch)

    def test_a_batch_takes_each_step_for_all(self):
        offsets = (0, 5, 0x40)
        patches = list(join([step for steps in zip(*map(self.steps, offsets), strict=True) for step in steps]))
        assert len(patches) == 3
        for patch, offset in zip(patches, offsets, strict=True):
            self.check(patch, offset)

    def test_one_that_is_not_finished_is_told_of_at_the_end(self):
        (patch,) = join(self.steps()[:1])
        assert (patch.new, patch.behind_int3) == (INT3, False)

    def test_a_breakpoint_that_stays_is_not_lost_when_there_is_another(self):
        patches = list(join([self.steps()[0], poke(9, b"\xf0", b"\x3e"), *self.steps()]))
        assert sum(patch.stores for patch in patches) == 5

    def test_breakpoints_without_end_take_no_memory_without_end(self):
        pokes = (poke(0, b"\x90", INT3, page=2 * page) for page in range(3000))
        patches = join(pokes)
        assert sum(1 for _ in zip(patches, range(1500), strict=False)) == 1500


@given(
    st.lists(
        st.tuples(
            st.integers(0, 60),
            st.binary(min_size=1, max_size=8),
            st.sampled_from(["apply_returns", "apply_alternatives"]),
            st.sampled_from(["own", "direct", "poke"]),
        ),
        max_size=30,
    )
)
def test_no_store_and_no_byte_is_lost(plan):
    """Whatever is stored where: patches count all stores, and put what the stores put, in their own order."""
    memory = bytearray(80)
    stores = []
    for offset, new, caller, how in plan:
        if how == "poke" and INT3 in (new, bytes(memory[offset : offset + len(new)])):
            continue  # the three steps of text_poke_bp come together when they are over
        place = PLACE + offset
        gva = {"own": place, "direct": DIRECT + physical(place), "poke": POKE + offset}[how]
        stores.append(store(place, bytes(memory[offset : offset + len(new)]), new, callers=[caller], gva=gva))
        memory[offset : offset + len(new)] = new
    again = bytearray(80)
    patches = list(join(stores))
    for patch in patches:
        at_byte = patch.gpa - physical(PLACE)
        assert again[at_byte : at_byte + len(patch.old)] == patch.old
        again[at_byte : at_byte + len(patch.new)] = patch.new
    assert again == memory
    assert sum(patch.stores for patch in patches) == len(stores)
    assert sum(patch.size for patch in patches) == sum(len(each.new) for each in stores)
