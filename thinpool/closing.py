"""The safety net below pools that nobody closed: the core's threads must not call into an interpreter that is gone."""

from __future__ import annotations

import atexit
from contextlib import suppress
from typing import Protocol
from weakref import WeakSet

from .errors import ThinpoolError


class Closable(Protocol):
    """An open pool."""

    def close(self) -> None: ...


open_pools: WeakSet[Closable] = WeakSet()


@atexit.register
def _close_open_pools() -> None:
    for pool in list(open_pools):
        with suppress(ThinpoolError):
            pool.close()
