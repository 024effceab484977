"""What the VMM does when the EPT refuses an access: the trap itself.

``door.py`` is the one way by which code bytes change; ``frames.py`` moves frames between their states and checks
the rules; ``guard.py`` opens frames for one instruction, lets it execute, and closes them again; ``policy.py``
decides which refused access is answered how; ``wx.py`` judges by the rules of W^X, ``refusal.py`` refuses, on record,
what these or a seal are against.
"""
