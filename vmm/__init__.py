"""A hypervisor emulator with EPT-style permission trapping, on the Unicorn CPU engine."""
