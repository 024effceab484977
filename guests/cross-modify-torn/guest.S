# The wrong version of cross-modify: the instruction is overwritten by two stores, as memcpy does it.

        .set    TORN, 1
        .include "cross-modify/guest.S"
