.set DUAL, 1
.set WRONG, 1
.include "cow-fork/guest.S"
