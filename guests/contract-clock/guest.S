# The wrong version of contract: what a transfer costs depends on the time at which a node executes it.

        .set    WRONG, 1
        .include "contract/guest.S"
