        .set    OPEN, 1
        .include "lazy-binding/guest.S"
