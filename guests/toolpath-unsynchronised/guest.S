# The controller of toolpath, which here forgets to synchronise with what it has patched.

        .set    WRONG, 1
        .include "toolpath/guest.S"
