# Dual mapping: the program of cow-fork, without the copies.
#
# The frame of compiled code, and the heap that says what is compiled, are shared: fork hands them on as they
# are. Each process has the code twice, read-execute at `jit` and read-write at `view`. The compiler writes
# through the one, calls go to the other: what one process has compiled, the other runs.

.set DUAL, 1
.include "cow-fork/guest.S"
