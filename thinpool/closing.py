"""The safety net below pools that nobody closed: the core's threads must not call into an interpreter that is gone, and a process that was forked
(``os.fork``, multiprocessing) has no part in its parent's pools: it would hand out the same chunks, and take down what is mounted when it ends."""

from __future__ import annotations

import atexit
import os
from contextlib import suppress
from typing import Protocol
from weakref import WeakSet

from .errors import ThinpoolError


class Closable(Protocol):
    """An open pool."""

    def close(self) -> None: ...
    def abandon(self) -> None: ...


open_pools: WeakSet[Closable] = WeakSet()


@atexit.register
def _close_open_pools() -> None:
    for pool in list(open_pools):
        with suppress(ThinpoolError):
            pool.close()


def _abandon_open_pools() -> None:
    for pool in list(open_pools):
        pool.abandon()
    open_pools.clear()


os.register_at_fork(after_in_child=_abandon_open_pools)
