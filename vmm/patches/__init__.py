"""What a trace says of the patches that a kernel makes to its own code: by which function, for what, through what.

A trace is read line by line (``stores.py``); the stores of one copy become one patch again (``joined.py``); each is
classified by the mapping that it was stored through (``mapping.py``) and, given the kernel's symbols (``symbols.py``),
by the function and the mechanism that made it (``mechanism.py``); the rest is for people (``summary.py``,
``listing.py``).
"""
