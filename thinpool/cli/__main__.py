"""``python -m thinpool.cli`` is ``thinpool``."""

from . import main

main()
