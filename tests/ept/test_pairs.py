"""Features of the second stage together: views with the page-modification log, sub-page permissions, hidden patches."""

from __future__ import annotations

from typing import ClassVar

import pytest
import tiny
from attrs import evolve
from tiny import CODE, DATA, END, PAGE, map_page

from vmm.ept import Capabilities, EptProfile, Permission
from vmm.errors import OptionError
from vmm.exits import EptViolation, PageModificationLogFull, SppEvent, Vmcall
from vmm.machine import RunOptions

NONE, R, RW, X = Permission.NONE, Permission.R, Permission.R | Permission.W, Permission.X
OTHER, FUNCTION = DATA + PAGE, 0x12000
MAPS = (map_page(OTHER, OTHER, "rw"), map_page(FUNCTION, FUNCTION, pages=2))
ALL = EptProfile(
    accessed_dirty=True, vm_functions=True, page_modification_log=True, sub_page_write=True,
    capabilities=Capabilities(pages_2m=False, pages_1g=False),
)
VMCALL = "vmcall\n"


@pytest.fixture(params=[False, True], ids=["free", "stepped"])
def options(request):
    return RunOptions(check=True, audit=True, ept=ALL, single_step=request.param)


def vmfunc(view: int) -> str:
    return f"mov eax, 0\nmov ecx, {view}\n.byte 0x0f, 0x01, 0xd4\n"


def store(gpa: int, value: int = 1) -> str:
    return f"mov byte ptr [{gpa:#x}], {value}\n"


def build(source, options, *acts, views=2, **rest):
    """A guest with some views; at its VMCALLs the host does what is given, in order."""
    made = tiny.build(source, options=options, maps=MAPS, **rest)
    for _ in range(1, views):
        made.machine.views.add()
    made.machine.views.set_eptp_list([made.machine.views.ept(number).eptp for number in range(views)])
    todo = list(acts)
    made.machine.on(Vmcall)(lambda _: todo.pop(0)(made.machine) and None)
    return made


def run(made):
    assert made.run().reason == "port"
    return made


class TestDirtyFlagsAndViews:
    def logged(self, made, *gpas):
        return [gpa for gpa in made.machine.ept.log.pages if gpa in gpas]

    def test_each_view_has_flags_of_its_own_and_one_log_has_them_all(self, options):
        """Flags are in EPT entries; the log is one of the VMCS, whichever EPTP it selects."""
        source = store(DATA) + store(DATA) + vmfunc(1) + store(DATA) + store(OTHER) + vmfunc(0) + store(DATA) + END
        made = run(build(source, options))
        assert self.logged(made, DATA, OTHER) == [DATA, DATA, OTHER]
        views = made.machine.views
        dirty = [[views.ept(view).entry(gpa).dirty for gpa in (DATA, OTHER)] for view in (0, 1)]
        assert dirty == [[True, False], [True, True]]

    def test_the_log_has_the_address_and_not_what_it_leads_to(self, options):
        made = build(vmfunc(1) + store(DATA) + END, options)
        made.machine.views.remap(1, DATA, OTHER, PAGE)
        run(made)
        assert self.logged(made, DATA, OTHER) == [DATA]
        assert made.machine.read(OTHER, 1) == b"\1"

    def test_a_restriction_keeps_the_flags_and_a_remapped_page_is_clean(self, options):
        made = build(
            store(DATA) + store(OTHER) + vmfunc(1) + store(DATA) + store(OTHER) + VMCALL + END,
            options,
            lambda machine: (machine.views.restrict(1, DATA, PAGE, R), machine.views.remap(1, OTHER, DATA, PAGE)),
        )
        run(made)
        entries = [made.machine.views.ept(1).entry(gpa) for gpa in (DATA, OTHER)]
        assert [(entry.accessed, entry.dirty) for entry in entries] == [(True, True), (False, False)]
        assert made.machine.ept.entry(OTHER).dirty

    def test_drained_and_cleaned_a_page_is_logged_again_in_each_view(self, options):
        write_both = store(DATA) + vmfunc(1) + store(DATA) + vmfunc(0)
        made = build(write_both + VMCALL + write_both + END, options, lambda machine: machine.drain_log(clean=True))
        run(made)
        assert self.logged(made, DATA) == [DATA, DATA]

    def test_a_full_log_is_full_in_all_views(self, options):
        made = build(vmfunc(1) + VMCALL + store(DATA) + END, options, lambda m: setattr(m.ept.log, "index", 0xFFFF))
        seen = []
        made.machine.on(PageModificationLogFull)(lambda _: seen.append(made.machine.read(DATA, 1)))
        run(made)
        assert seen == [b"\0"]
        assert self.logged(made, DATA) == [DATA]

    def test_what_a_view_forbids_sets_no_dirty_flag(self, options):
        made = build(store(DATA) + END, options)
        made.machine.views.restrict(0, DATA, PAGE, R)
        assert made.run().reason == "EPT violation"
        entry = made.machine.ept.entry(DATA)
        assert (entry.accessed, entry.dirty) == (True, False)
        assert self.logged(made, DATA) == []


class TestSubPagesAndViews:
    INSIDE, OUTSIDE = store(DATA + 0x80), store(DATA)

    def refused(self, made):
        return [(each.view, each.gpa) for each in made.violations if each.gpa & -PAGE in (DATA, OTHER)]

    def test_they_hold_in_every_view_that_lets_the_page_be_written(self, options):
        made = build(self.INSIDE + vmfunc(1) + self.INSIDE + vmfunc(2) + self.INSIDE + END, options, views=3)
        made.machine.protect_sub_pages(DATA, 1 << 1)
        made.machine.views.restrict(2, DATA, PAGE, R)
        assert made.run().reason == "EPT violation"
        assert self.refused(made) == [(2, DATA + 0x80)]
        bits = [made.machine.views.ept(view).entry(DATA).sub_page_write for view in range(3)]
        assert bits == [True, True, False]

    def test_lifting_a_restriction_gives_them_back(self, options):
        made = build(self.INSIDE + self.OUTSIDE + END, options)
        views = made.machine.views
        views.restrict(0, DATA, PAGE, R)
        made.machine.protect_sub_pages(DATA, 1 << 1)
        views.restrict(0, DATA, PAGE, RW)
        run(made)
        assert self.refused(made) == [(0, DATA)]

    @pytest.mark.parametrize("first", ["guard", "lead"])
    @pytest.mark.parametrize("way", ["remap", "alias"])
    def test_an_address_that_leads_to_a_guarded_page_has_its_sub_pages(self, options, way, first):
        """The table goes by guest-physical address, so that it needs an entry for each."""
        made = build(vmfunc(1) + store(OTHER + 0x80) + store(OTHER) + END, options)
        machine = made.machine

        def lead():
            if way == "remap":
                machine.views.remap(1, OTHER, DATA, PAGE)
            else:
                machine.alias(OTHER, DATA, PAGE)

        def guard():
            machine.protect_sub_pages(DATA, 1 << 1)

        for act in (guard, lead) if first == "guard" else (lead, guard):
            act()
        run(made)
        assert self.refused(made) == [(1, OTHER)]
        assert made.of(SppEvent) == []
        assert machine.read(DATA + 0x80, 1) == b"\1"

    def test_a_page_that_is_led_elsewhere_has_none(self, options):
        made = build(vmfunc(1) + self.OUTSIDE + vmfunc(0) + self.OUTSIDE + END, options)
        made.machine.protect_sub_pages(DATA, 1 << 1)
        made.machine.views.remap(1, DATA, OTHER, PAGE)
        run(made)
        assert self.refused(made) == [(0, DATA)]
        assert made.machine.read(OTHER, 1) == b"\1"

    @pytest.mark.parametrize("last", ["remap", "guard", "alias"])
    def test_one_address_cannot_have_different_ones_in_two_views(self, options, last):
        """The sub-page permission table is one of the VMCS, for all EPTs."""
        machine = build(END, options).machine
        if last == "remap":
            machine.protect_sub_pages(DATA, 1 << 1)
            machine.protect_sub_pages(OTHER, 1 << 2)
            act = lambda: machine.views.remap(1, DATA, OTHER, PAGE)  # noqa: E731 - one of three acts
        elif last == "guard":
            machine.protect_sub_pages(DATA, 1 << 1)
            machine.views.remap(1, DATA, OTHER, PAGE)
            act = lambda: machine.protect_sub_pages(OTHER, 1 << 2)  # noqa: E731 - one of three acts
        else:
            machine.views.remap(1, DATA, OTHER, PAGE)
            machine.protect_sub_pages(OTHER, 1 << 2)
            machine.protect_sub_pages(FUNCTION, 1 << 1)
            act = lambda: machine.alias(DATA, FUNCTION, PAGE)  # noqa: E731 - one of three acts
        before = [machine.views.ept(view).read_entry(DATA, 1) for view in (0, 1)]
        with pytest.raises(OptionError, match=f"GPA {DATA:#x} has sub-page permissions in another view"):
            act()
        assert [machine.views.ept(view).read_entry(DATA, 1) for view in (0, 1)] == before

    def test_the_same_ones_are_fine(self, options):
        machine = build(END, options).machine
        machine.protect_sub_pages(DATA, 1 << 1)
        machine.protect_sub_pages(OTHER, 1 << 1)
        machine.views.remap(1, DATA, OTHER, PAGE)

    def test_a_store_to_code_is_trapped_whatever_they_say(self):
        """Also where code may be read, so that its entry is one that the table could decide about."""
        profile = EptProfile(capabilities=Capabilities(execute_only=False), sub_page_write=True)
        made = tiny.build(store(CODE + 0x880) + END, options=evolve(tiny.STRICT, ept=profile))
        made.machine.protect_sub_pages(CODE, 1 << 17)
        run(made)
        assert [each.gpa for each in made.violations if each.qualification & 2] == [CODE + 0x880]

    def test_a_store_that_is_let_through_is_logged_once(self, options):
        made = build(self.INSIDE + self.INSIDE + END, options)
        made.machine.protect_sub_pages(DATA, 1 << 1)
        run(made)
        assert [gpa for gpa in made.machine.ept.log.pages if gpa == DATA] == [DATA]
        assert self.refused(made) == []


class TestHiddenPatchesAndViews:
    """A hidden patch is a frame's, so that it is executed in every view, by whatever address leads there."""

    CODE_OF: ClassVar = {FUNCTION: "mov al, 1\nret", FUNCTION + PAGE: "mov al, 2\nret"}
    CALL = f"mov esi, {FUNCTION}\ncall rsi\nmov ebx, eax\n"
    AGAIN = f"mov esi, {FUNCTION}\ncall rsi\nshl ebx, 4\nor eax, ebx\n"

    def build(self, source, options, *acts, views=2):
        return build({CODE: source, **self.CODE_OF}, options, *acts, views=views, code=(CODE, *self.CODE_OF))

    def test_is_executed_in_every_view_and_read_in_none(self, options):
        source = self.CALL + vmfunc(1) + self.AGAIN + f"mov cl, [{FUNCTION + 1:#x}]\n" + END
        made = self.build(source, options)
        made.machine.patch_hidden(FUNCTION + 1, b"\7")
        assert run(made).end.detail["value"] == 0x77
        assert made.machine.register("rcx") & 0xFF == 1

    def test_a_page_that_leads_to_the_frame_in_one_view_has_it_there(self, options):
        made = self.build(self.CALL + vmfunc(1) + self.AGAIN + END, options)
        made.machine.patch_hidden(FUNCTION + PAGE + 1, b"\7")
        made.machine.views.remap(1, FUNCTION, FUNCTION + PAGE, PAGE)
        assert run(made).end.detail["value"] == 0x17

    def test_goes_in_every_view_when_it_is_removed(self, options):
        patches = []
        made = self.build(
            self.CALL + vmfunc(1) + VMCALL + self.AGAIN + END, options, lambda _: patches.pop().remove()
        )
        patches.append(made.machine.patch_hidden(FUNCTION + 1, b"\7"))
        assert run(made).end.detail["value"] == 0x71

    def test_what_another_view_writes_is_executed_behind_it(self, options):
        source = self.CALL + vmfunc(1) + store(FUNCTION + 1, 3) + vmfunc(0) + self.AGAIN + END
        made = self.build(source, options)
        patch = made.machine.patch_hidden(FUNCTION + 1, b"\7")
        assert run(made).end.detail["value"] == 0x77
        assert made.machine.read(FUNCTION + 1, 1) == b"\3"
        patch.remove()

    def test_a_view_that_forbids_fetches_forbids_them_all_the_same(self, options):
        made = self.build(vmfunc(1) + self.CALL + END, options)
        made.machine.patch_hidden(FUNCTION + 1, b"\7")
        made.machine.views.restrict(1, FUNCTION, PAGE, R)
        seen = []

        @made.machine.on(EptViolation)
        def fetched(exit_):
            if exit_.view == 1 and exit_.qualification & 4:
                seen.append(exit_.gpa)
                made.machine.views.switch(0)
                return True
            return None

        assert run(made).end.detail["value"] == 7
        assert seen == [FUNCTION]
