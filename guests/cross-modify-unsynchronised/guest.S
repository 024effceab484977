# The wrong version of cross-modify: the int3 is there, but no interprocessor interrupt makes vCPU 1 serialise.

        .set    UNSYNCHRONISED, 1
        .include "cross-modify/guest.S"
