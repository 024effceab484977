"""Guest memory: the bytes, the frames that they lie in and the addresses that reach a frame."""

from vmm.memory.ram import PAGE, GuestMemory

__all__ = ["PAGE", "GuestMemory"]
