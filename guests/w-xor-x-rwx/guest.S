# The wrong w-xor-x: one page for its code that is writable and executable all the time, and no monitor.
        .set    WRONG, 1
        .include "w-xor-x/guest.S"
