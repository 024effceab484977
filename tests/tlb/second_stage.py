"""SDM vol. 3, 29.3 and 29.4, once more, for data pages of one logical processor, with nothing of ``vmm`` in it.

That is views, permissions, sub-pages, accessed and dirty flags with their log, and cached mappings that last until the
architecture drops them.

Guest-physical pages and frames are numbers; page ``n`` leads to frame ``n`` where nobody has it lead elsewhere.
"""

from __future__ import annotations

from attrs import define, field

R, W = 1, 2
SUB_PAGE = 128
LOG_ENTRIES = 512


@define
class Entry:
    """The EPT entry of a page in one view."""

    frame: int
    allows: int = R | W
    sub_pages: bool = False
    accessed: bool = False
    dirty: bool = False


@define
class SecondStage:
    """A guest-physical mapping (29.4.1): what an entry said."""

    frame: int
    allows: int
    dirty: bool


@define
class Combined:
    """A combined mapping; ``below`` is None where the EPT has to be asked again."""

    page: int
    dirty: bool
    below: SecondStage | None
    #: Kinds of access that were reported to rest on stale entries: of the guest, of the EPT.
    by_guest: int = 0
    by_ept: int = 0


@define
class Processor:
    """``events`` is all that can be seen of what happens, in order. One that does not cache walks for each access."""

    pages: int
    views: int
    lines: int
    caches: bool = True
    view: int = 0
    events: list = field(factory=list)
    index: int = LOG_ENTRIES - 1
    log: list = field(factory=list)
    #: Of each linear page: the page that its PTE has, and whether D is set there.
    ptes: list = field(init=False)
    entries: list = field(init=False)
    limits: list = field(init=False)
    elsewhere: list = field(init=False)
    #: By frame, the sub-pages that may be written; None where there is no guard. By page, the permission table.
    guards: list = field(init=False)
    table: list = field(init=False)
    memory: list = field(init=False)
    below: dict = field(factory=dict)
    combined: dict = field(factory=dict)

    def __attrs_post_init__(self):
        pages = range(self.pages)
        self.ptes = [[line, False] for line in range(self.lines)]
        self.entries = [[Entry(page) for page in pages] for _ in range(self.views)]
        self.limits = [[R | W] * self.pages for _ in range(self.views)]
        self.elsewhere = [set() for _ in range(self.views)]
        self.guards, self.table = [None] * self.pages, [0] * self.pages
        self.memory = [{} for _ in pages]

    # What the guest does

    def load(self, line: int, offset: int) -> None:
        frame = self.access(line, offset, R)
        if frame is not None:
            self.events.append(("loaded", self.memory[frame].get(offset, 0)))

    def store(self, line: int, offset: int, value: int) -> None:
        frame = self.access(line, offset, W)
        if frame is not None:
            self.memory[frame][offset] = value

    def map(self, line: int, page: int) -> None:
        self.ptes[line] = [page, False]

    def invlpg(self, line: int) -> None:
        """For all EPTRTAs (29.4.3.1)."""
        self._drop(lambda key: key[1] == line)

    def reload(self) -> None:
        self.combined.clear()

    def vmfunc(self, view: int) -> None:
        """Invalidates nothing: mappings are tagged."""
        self.view = view

    # What the host does

    def restrict(self, view: int, page: int, limit: int) -> None:
        self.limits[view][page] = limit
        entry = self.entries[view][page]
        entry.allows = self._state(entry.frame) & limit
        self._mark(view, page)
        self._invept_page(view, page)

    def remap(self, view: int, page: int, target: int) -> bool:
        """False, with nothing changed, where the sub-page permission table would have to say two things."""
        guard = self.guards[target]
        others = [self.entries[each][page].frame for each in range(self.views) if each != view]
        if guard is not None and any(self._guarded_otherwise(each, target, guard) for each in others):
            return False
        (self.elsewhere[view].discard if page == target else self.elsewhere[view].add)(page)
        self.entries[view][page] = Entry(target, self._state(target) & self.limits[view][page])
        self._mark(view, page)
        self._invept_page(view, page)
        return True

    def protect(self, page: int, allows: int, invalidate: bool) -> None:
        """In every view that has the page lead where view 0 does; sub-page permissions of the frame are over."""
        self.guards[page] = None
        for view, each in self._places(page):
            self.entries[view][each].sub_pages = False
        for view in range(self.views):
            if page not in self.elsewhere[view]:
                self.entries[view][page].allows = allows & self.limits[view][page]
                if invalidate:
                    self._invept_page(view, page)

    def guard(self, frame: int, writable: int) -> bool:
        """Sub-page permissions for a frame; False as for ``remap``."""
        places = self._places(frame)
        leads = [self.entries[view][page].frame for _, page in places for view in range(self.views)]
        if any(self._guarded_otherwise(other, frame, writable) for other in leads):
            return False
        self.guards[frame] = writable
        self._reset(frame)
        for view, page in places:
            self._mark(view, page)
        return True

    def switch(self, view: int) -> None:
        self.view = view

    def invept(self, view: int | None) -> None:
        for key in [key for key in self.below if view in (None, key[0])]:
            del self.below[key]
        self._drop(lambda key: view in (None, key[0]))

    def invvpid(self) -> None:
        """Combined mappings only."""
        self.combined.clear()

    def drain(self, clean: bool) -> None:
        self.events += [("logged", page) for page in self.log]
        pages, self.log, self.index = self.log, [], LOG_ENTRIES - 1
        for page in pages if clean else ():
            for view in range(self.views):
                self.entries[view][page].dirty = False
                self._invept_page(view, page)

    def room(self, entries: int) -> None:
        """The host empties the log and sets its index, so that so many entries are left."""
        self.drain(False)
        self.index = entries - 1 & 0xFFFF

    # One access

    def access(self, line: int, offset: int, kind: int) -> int | None:
        """The frame that it reaches; None if an EPT violation comes of it."""
        while True:
            found = self._attempt(line, offset, kind)
            if found != "again":
                return found

    def _attempt(self, line: int, offset: int, kind: int) -> int | str | None:
        if not self.caches:
            self.below.clear()
            self.combined.clear()
        view, mapping = self.view, self.combined.get((self.view, line))
        if mapping is None or (kind == W and not mapping.dirty):
            page = self.ptes[line][0]
            self.ptes[line][1] |= kind == W
            mapping = Combined(page, self.ptes[line][1], None)
        held = self._use_entry(view, mapping.page)
        if mapping.below is None or not mapping.below.allows & kind or (kind == W and not mapping.below.dirty):
            below = self._second_stage(view, mapping.page, kind)
            if below is None:
                return self._violation(line, offset, mapping.page, kind)
            mapping.below, mapping.by_ept = below, 0
        if self.combined.get((view, line)) is not mapping:
            self.combined[view, line] = mapping
        if not self._rests_on_the_tables(view, line, mapping, kind):
            return "again"
        return self._set_flags(view, mapping, kind, held)

    def _use_entry(self, view: int, page: int) -> bool:
        """29.3.5: A is set when the entry is used; True if it cannot be, because the log is full (29.3.6)."""
        entry = self.entries[view][page]
        if entry.allows and not entry.accessed:
            if self.index >= LOG_ENTRIES:
                return True
            entry.accessed = True
        return False

    def _second_stage(self, view: int, page: int, kind: int) -> SecondStage | None:
        known = self.below.get((view, page))
        if known is not None and known.allows & kind and (kind == R or known.dirty):
            return known
        entry = self.entries[view][page]
        if not entry.allows & kind:
            self._drop_below(view, page)  # an EPT violation invalidates
            return None
        made = self.below[view, page] = SecondStage(entry.frame, entry.allows, entry.dirty)
        return made

    def _rests_on_the_tables(self, view: int, line: int, mapping: Combined, kind: int) -> bool:
        """Whether a walk would allow the access and take it there, or its staleness has been reported already."""
        page = self.ptes[line][0]
        entry, below = self.entries[view][mapping.page], mapping.below
        stale_guest = page != mapping.page
        if not stale_guest and (entry.frame, entry.allows) == (below.frame, below.allows):
            return True
        now = self.entries[view][page]
        same = not stale_guest and now.frame == below.frame
        if (now.allows if same else 0) & kind or (mapping.by_guest | mapping.by_ept) & kind:
            return True
        if stale_guest:
            mapping.by_guest |= kind
        else:
            mapping.by_ept |= kind
        self.events.append(("stale", view, line, kind, "INVLPG" if stale_guest else "INVEPT"))
        return False

    def _set_flags(self, view: int, mapping: Combined, kind: int, held: bool) -> int | str:
        below, entry = mapping.below, self.entries[view][mapping.page]
        sets_dirty = kind == W and not below.dirty
        if (sets_dirty or held) and self.index >= LOG_ENTRIES and (held or not entry.dirty):
            self.events.append(("full",))
            self.drain(False)
            return "again"
        if sets_dirty:
            if not entry.dirty:
                entry.dirty = True
                self.log.append(mapping.page)
                self.index = self.index - 1 & 0xFFFF
            mapping.below = self.below[view, mapping.page] = SecondStage(below.frame, below.allows, True)
        return below.frame

    def _violation(self, line: int, offset: int, page: int, kind: int) -> int | str | None:
        entry = self.entries[self.view][page]
        if kind == W and entry.allows == R and entry.sub_pages and self.table[page] >> offset // SUB_PAGE & 1:
            return self._let_through(line, offset, page)
        qualification = kind | entry.allows << 3 | 0x180
        self.events.append(("violation", self.view, page, offset, qualification))
        return None

    def _let_through(self, line: int, offset: int, page: int) -> int | str:
        """A store that the sub-page permission table allows: the VMM opens the frame for it, and closes it."""
        frame = self.entries[self.view][page].frame
        for view, each in self._places(frame):
            self.entries[view][each].allows = (R | W) & self.limits[view][each]
            self._forget_everywhere(each)
        found = self._attempt(line, offset, W)
        self._reset(frame)
        return found

    # Helpers

    def _state(self, frame: int) -> int:
        """What the state of a frame allows: all of them are data."""
        return R | W if self.guards[frame] is None else R

    def _places(self, frame: int) -> list[tuple[int, int]]:
        own = [(view, frame) for view in range(self.views) if frame not in self.elsewhere[view]]
        led = [
            (view, page)
            for view in range(self.views)
            for page in self.elsewhere[view]
            if self.entries[view][page].frame == frame
        ]
        return own + led

    def _guarded_otherwise(self, other: int, frame: int, writable: int) -> bool:
        return other != frame and self.guards[other] not in (None, writable)

    def _mark(self, view: int, page: int) -> None:
        entry = self.entries[view][page]
        if self.guards[entry.frame] is not None:
            entry.sub_pages = bool(self.limits[view][page] & W)
            self.table[page] = self.guards[entry.frame]

    def _reset(self, frame: int) -> None:
        """The VMM gives every way to a frame what its state allows, and invalidates."""
        for view, page in self._places(frame):
            self.entries[view][page].allows = self._state(frame) & self.limits[view][page]
            self._forget_everywhere(page)

    def _forget_everywhere(self, page: int) -> None:
        for view in range(self.views):
            self._drop_below(view, page)

    def _invept_page(self, view: int, page: int) -> None:
        self._drop_below(view, page)

    def _drop_below(self, view: int, page: int) -> None:
        self.below.pop((view, page), None)
        for (tag, _), mapping in self.combined.items():
            if tag == view and mapping.page == page:
                mapping.below = None

    def _drop(self, wanted) -> None:
        for key in [key for key in self.combined if wanted(key)]:
            del self.combined[key]
