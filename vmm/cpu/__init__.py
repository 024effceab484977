"""The processor: the only package that imports Unicorn.

A vCPU is a pair of engines over one guest memory. The *free-running* engine (``free.py``) executes translated
blocks at full speed until something is refused; the *stepping* engine (``stepping.py``) executes exactly one
instruction. Their common state lives in a saved context (``context.py``), which plays the part of the VMCS
guest-state area.
"""
