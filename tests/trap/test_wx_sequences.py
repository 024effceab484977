"""Random sequences of mapping, storing, calling and approving against a plain model of the W^X policy.

The model knows nothing of TLBs, EPT or engines. Each run is done freely, with a cache of one block, and one instruction
at a time: the same is refused each time.
"""

from __future__ import annotations

import hypothesis.strategies as st
from attrs import define, field
from hypothesis import example, given, settings
from tiny import PAGE
from wx_machine import FIRST, FRAMES, NOP, PAGES, RET, SPACES, STORED, run

from vmm.machine import RunOptions
from vmm.records import RefusedAccess

WAYS = {
    "freely": RunOptions(check=True, audit=True),
    "one block": RunOptions(check=True, capacity=1),
    "stepped": RunOptions(check=True, single_step=True),
}

pages, frames, spaces = (st.integers(0, len(of) - 1) for of in (PAGES, range(FRAMES), SPACES))
accesses = st.sampled_from(["", "w", "x", "wx"])
operations = st.one_of(
    st.tuples(st.just("map"), spaces, pages, st.one_of(st.none(), frames, frames, frames), accesses),
    st.tuples(st.just("map"), st.just(0), pages, st.just(0), accesses),
    st.tuples(st.just("store"), pages, st.sampled_from([RET, NOP])),
    st.tuples(st.just("store"), pages, st.sampled_from([RET, NOP])),
    st.tuples(st.just("modify"), pages, st.sampled_from([RET, NOP])),
    st.tuples(st.just("load"), pages),
    st.tuples(st.just("call"), pages),
    st.tuples(st.just("call"), pages),
    st.tuples(st.just("switch"), spaces),
    st.tuples(st.just("approve"), frames),
    st.tuples(st.just("write"), frames),
)


@define
class Model:
    """What must come of each operation, and that no frame is ever written, then executed as written."""

    space: int = 0
    #: (space, page) -> (frame, access)
    mapped: dict = field(factory=lambda: {(s, p): (0, "") for s in range(len(SPACES)) for p in range(len(PAGES))})
    approved: set = field(factory=lambda: set(range(FRAMES)))
    used: dict = field(factory=lambda: {f: set() for f in range(FRAMES)})
    #: Uses of a permission since the frame was last approved or lost it.
    judged: dict = field(factory=lambda: {f: set() for f in range(FRAMES)})
    content: dict = field(factory=lambda: dict.fromkeys(range(FRAMES), RET))
    vouched: dict = field(factory=lambda: dict.fromkeys(range(FRAMES), RET))
    done: list = field(factory=list)

    def step(self, kind, *rest) -> None:
        self.done.append(getattr(self, kind)(*rest) or "done")

    def map(self, space, page, frame, access) -> None:
        self.mapped[space, page] = None if frame is None else (frame, access)

    def switch(self, space) -> None:
        self.space = space

    def approve(self, frame) -> None:
        if frame not in self.approved:
            self.approved.add(frame)
            self.judged[frame].clear()
        self.vouched[frame] = self.content[frame]

    def write(self, frame) -> None:
        self.disapprove(frame)
        self.content[frame] = NOP

    def disapprove(self, frame) -> None:
        if frame in self.approved:
            self.approved.discard(frame)
            self.judged[frame].clear()

    def having(self, frame, letter) -> set:
        """The aliases in use through which the page tables allow it now."""
        mappings = ((alias, self.mapped[alias]) for alias in self.used[frame])
        return {alias for alias, found in mappings if found and found[0] == frame and letter in found[1]}

    def access(self, page, letter) -> tuple[int, str]:
        """The frame, and what becomes of a store or fetch."""
        alias = (self.space, page)
        found = self.mapped[alias]
        if found is None or letter not in found[1]:
            return -1, "fault"
        frame = found[0]
        turn = letter == "w" and frame in self.approved
        if (alias, letter) not in self.judged[frame] or turn:
            self.used[frame].add(alias)
            if self.having(frame, "x" if letter == "w" else "w"):
                return frame, "mapping"
            if letter == "x" and frame not in self.approved:
                return frame, "approval"
            if turn:
                self.disapprove(frame)
            self.judged[frame].add((alias, letter))
        return frame, "done"

    def store(self, page, value) -> str:
        frame, outcome = self.access(page, "w")
        if outcome == "done":
            self.content[frame] = value
            assert frame not in self.approved
        return outcome

    modify = store

    def load(self, page) -> str:
        return "done" if self.mapped[self.space, page] else "fault"

    def call(self, page) -> str:
        frame, outcome = self.access(page, "x")
        if outcome == "done":
            assert self.content[frame] == self.vouched[frame]
        return outcome


def after(sequence) -> Model:
    model = Model()
    for operation in sequence:
        model.step(*operation)
    return model


def outcomes(sequence, way: str):
    done, made = run(sequence, WAYS[way])
    content = {frame: made.machine.read(FIRST + frame * PAGE + STORED, 1)[0] for frame in range(FRAMES)}
    return done, content, made.of(RefusedAccess)


#: What was allowed in one turn of a frame is judged anew in the next.
NEXT_TURN = [
    *(("map", 0, 0, 0, "x"), ("call", 0), ("map", 0, 0, None, ""), ("map", 0, 1, 0, "w"), ("store", 1, NOP)),
    *(("approve", 0), ("map", 0, 0, 0, "x"), ("call", 0)),
]

#: A load of data does not let the next store through the same page pass unseen.
LOAD_FIRST = [
    *(("map", 0, 0, 0, "x"), ("call", 0), ("write", 0)),
    *(("map", 0, 1, 0, "w"), ("load", 1), ("store", 1, NOP)),
]
#: An alias counts where it leads now.
MOVED_ON = [
    *(("map", 0, 0, 0, "w"), ("store", 0, NOP), ("map", 0, 0, 1, "w")),
    *(("map", 0, 1, 0, "x"), ("approve", 0), ("call", 1)),
]


@given(st.lists(operations, min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
@example([("map", 0, 0, 0, "wx"), ("call", 0)])
@example(NEXT_TURN)
@example(LOAD_FIRST)
@example(MOVED_ON)
@example([("map", 0, 0, 0, "w"), ("map", 0, 1, 0, "x"), ("store", 0, NOP), ("call", 1)])
@example([("map", 0, 0, 0, "w"), ("store", 0, NOP), ("map", 0, 0, 0, "x"), ("call", 0), ("approve", 0), ("call", 0)])
@example([("map", 0, 0, 0, "x"), ("call", 0), ("map", 0, 0, 0, "wx"), ("call", 0), ("store", 0, NOP)])
@example([("map", 0, 0, 0, "w"), ("approve", 0), ("load", 0), ("store", 0, NOP), ("load", 0), ("store", 0, RET)])
@example([("map", 0, 0, 1, "w"), ("write", 1), ("load", 0), ("map", 0, 1, 1, "x"), ("call", 1), ("modify", 0, RET)])
@example([("map", 0, 0, 0, "w"), ("store", 0, NOP), ("switch", 1), ("map", 1, 3, 0, "x"), ("approve", 0), ("call", 3)])
def test_what_is_refused_is_what_the_rules_refuse_in_every_way_of_running(sequence):
    model = after(sequence)
    reports = []
    for way in WAYS:
        done, content, refused = outcomes(sequence, way)
        assert done == model.done, way
        assert content == model.content, way
        reports.append(refused)
    assert reports == reports[:1] * len(WAYS)
    rules = [rule for rule in model.done if rule not in ("done", "fault")]
    assert [record.rule for record in reports[0]] == rules
