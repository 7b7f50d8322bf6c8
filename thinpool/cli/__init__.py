"""The command ``thinpool``: a verb per function, all of them thin over the library.

``app`` gathers the verbs and turns exceptions into exit codes (``exits``); ``options`` says which pool is meant and opens
it; ``show`` prints. The verbs are in ``layers``, ``listings``, ``transfer`` and ``devices``. What costs time to load is
loaded by the verb that needs it.
"""

from __future__ import annotations


def main() -> None:
    """The entry point of the command."""
    from .app import main as run

    run()
