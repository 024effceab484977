        .set    TORN, 1
        .include "lazy-binding/guest.S"
