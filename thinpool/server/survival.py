"""The pool as a server holds it: kept by a keeper (:mod:`thinpool.exports.keeping`), so that the next process goes on where this one ends.

::

    killed, or SIGUSR1, or asked to leave by `serve --takeover`          SIGTERM, or nobody needs it
              |                                                               |
    the keeper has the FUSE connection, the sockets,               everything is taken down, the pool closed,
    the lock, the notes of what is not committed                   and the keeper ended
              |
    the next server claims all that, does the notes again, lets the kernel ask again what was not answered, and serves

It leaves as if it were killed, only that it ends its requests and commits before: there is one way to go on, and it is always in use.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..exports.keeping.link import KeeperLink
from ..pool import Pool

_LOG = logging.getLogger("thinpool.server")


@contextmanager
def kept_pool(path: Path, *, takeover: bool = False, verify_reads: bool = False) -> Iterator[tuple[Pool, KeeperLink]]:
    """The pool, open in this process, with all that an earlier one left to be gone on with.

    ``takeover``: also one that is still at work, which leaves. ``verify_reads``: as :meth:`Pool.open` has it. Raises what that raises.
    """
    run = os.path.join(os.path.realpath(path), "run")
    keeper = KeeperLink.claim(run, takeover=takeover)
    redo = keeper.kept("redo")[0] if keeper else os.memfd_create("thinpool-redo")
    with Pool.open(path, verify_reads=verify_reads, redo=redo, lock=keeper.kept("lock")[0] if keeper else -1) as pool:
        if keeper is None:
            keeper = KeeperLink(run)
            keeper.keep("lock", [pool.lock_fd])
            keeper.keep("redo", [redo])
        try:
            pool.uses.survive(keeper)
        except Exception:
            _LOG.exception("cannot go on with what the last server left")
            os._exit(1)  # and let the keeper try again, rather than take down what works
        yield pool, keeper


def leave(pool: Pool) -> None:
    """Ends this process without taking anything down: it is the next one's now."""
    pool.commit()
    os._exit(0)
