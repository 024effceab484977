"""Guest memory and its frames: sizes, sharing, the addresses that a frame remembers."""

from __future__ import annotations

import pytest

from vmm.errors import OptionError
from vmm.memory import PAGE, GuestMemory
from vmm.memory.frames import MAX_ALIASES, Frames, FrameState


class TestGuestMemory:
    @pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE - 1, PAGE + 1, (1 << 32) + PAGE])
    def test_sizes_out_of_range_are_refused(self, size):
        with pytest.raises(OptionError, match="bytes of guest memory"):
            GuestMemory(size)

    def test_starts_as_zeros(self):
        assert GuestMemory(2 * PAGE).read(0, 2 * PAGE) == bytes(2 * PAGE)

    def test_reads_what_was_written_across_pages(self):
        memory = GuestMemory(2 * PAGE)
        memory.write(PAGE - 2, b"\x01\x02\x03\x04")
        assert memory.read(PAGE - 3, 6) == b"\x00\x01\x02\x03\x04\x00"

    def test_words_are_the_same_memory_little_endian(self):
        memory = GuestMemory(PAGE)
        memory.write(8, bytes(range(1, 9)))
        assert memory.words[1] == 0x0807060504030201
        memory.words[0] = 0xFF
        assert memory.read(0, 2) == b"\xff\x00"

    def test_a_write_that_does_not_fit_changes_nothing(self):
        memory = GuestMemory(PAGE)
        with pytest.raises(ValueError, match=r"^"):
            memory.write(memory.size - 1, b"\x01\x02")
        assert memory.read(0, memory.size) == bytes(memory.size)

    def test_what_was_read_is_a_copy(self):
        memory = GuestMemory(PAGE)
        before = memory.read(0, 4)
        memory.write(0, b"\xff")
        assert before == bytes(4)


class TestFrames:
    def test_any_address_in_a_frame_gives_that_frame(self):
        frames = Frames(0, 0x100000)
        frame = frames.at(0x1FFF)
        assert frames.at(0x1000) is frame
        assert frames.at(0x2000) is not frame
        assert (frame.hpa, frame.gpas, frame.state) == (0x1000, [0x101000], FrameState.DATA)

    def test_only_what_was_asked_about_exists(self):
        frames = Frames(1 << 20, 1 << 20)
        assert list(frames) == []
        frames.at(5 * PAGE)
        assert [frame.hpa for frame in frames] == [5 * PAGE]

    def test_aliases_are_kept_by_address_space(self):
        frame = Frames(1 << 20, 1 << 20).at(0)
        for root, page in ((1, PAGE), (2, PAGE), (1, PAGE), (1, 2 * PAGE)):
            frame.learn(root, page)
        assert list(frame.linear) == [(1, PAGE), (2, PAGE), (1, 2 * PAGE)]

    def test_a_guest_with_endless_aliases_uses_no_endless_memory(self):
        frame = Frames(1 << 20, 1 << 20).at(0)
        for page in range(3 * MAX_ALIASES):
            frame.learn(0, page * PAGE)
        assert len(frame.linear) == MAX_ALIASES
        assert (0, (3 * MAX_ALIASES - 1) * PAGE) in frame.linear
        assert (0, 0) not in frame.linear
