        .set    NO_TABLE, 1
        .include "shrink-wrap/guest.S"
