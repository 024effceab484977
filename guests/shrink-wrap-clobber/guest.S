        .set    NO_FALLBACK, 1
        .include "shrink-wrap/guest.S"
