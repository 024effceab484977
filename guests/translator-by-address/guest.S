.set WRONG, 1
.include "translator/guest.S"
