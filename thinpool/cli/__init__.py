"""The command ``thinpool``: a verb per function, all of them thin over the library.

``app`` gathers the verbs and turns exceptions into exit codes (``exits``); ``options`` says which pool is meant and opens
it; ``show`` prints. The verbs are in ``layers``, ``listings``, ``transfer`` and ``devices``. What costs time to load is
loaded by the verb that needs it.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """The entry point of the command."""
    _open_closed_streams()
    from .app import main as run

    run()


def _open_closed_streams() -> None:
    """Where standard input, output or error is closed, its number would go to the next file that is opened, perhaps one of the pool."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
