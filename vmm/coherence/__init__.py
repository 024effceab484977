"""Coherence models: how late a processor may see that its instructions have changed.

``model.py`` says which instructions make a model's fetch side catch up; ``sides.py`` keeps, for each vCPU, the bytes
that it may still fetch; ``sanitizer.py`` reports every execution of stale ones; ``view.py`` is all of it for one vCPU.
"""

from vmm.coherence.model import Coherence
from vmm.coherence.sanitizer import Sanitizer
from vmm.coherence.sides import FetchSides, Writer
from vmm.coherence.view import FetchView

__all__ = ["Coherence", "FetchSides", "FetchView", "Sanitizer", "Writer"]
