.set DUAL, 1
.include "cow-fork/guest.S"
