.set WRONG, 1
.include "hidden-hook/guest.S"
