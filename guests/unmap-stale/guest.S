.set WRONG, 1
.include "unmap/guest.S"
