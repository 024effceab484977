# The wrong version of vmfunc-views: its trusted view leaves the program executable (see guest.toml), so that a VMFUNC
# outside of the gate is as good as one in it.

        .include "vmfunc-views/guest.S"
