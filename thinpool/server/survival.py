"""The pool as a server holds it: kept by a keeper (:mod:`thinpool.exports.keeping`), so that the next process goes on where this one ends.

::

    killed, or SIGUSR1, or asked to leave by `serve --takeover`          SIGTERM, or nobody needs it
              |                                                               |
    the keeper has the FUSE connection, the sockets,               everything is taken down, the pool closed,
    the lock, the notes of what is not committed                   and the keeper ended
              |
    the next server claims all that, does the notes again, lets the kernel ask again what was not answered, and serves

It leaves as if it were killed, only that it ends its requests and commits before: there is one way to go on, and it is always in use.

A change of structure that a killed server had not committed is gone. So that a client's commit is not answered by a server that never had the change,
each has a random identity, which only one that committed hands on to the next.
"""

from __future__ import annotations

import ctypes
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..exports.keeping.link import KeeperLink
from ..pool import Pool

_LOG = logging.getLogger("thinpool.server")
_IDENTITY_BYTES = 32
_M_ARENA_MAX = -8  # glibc's malloc.h
_ARENAS_MAX = 2


@contextmanager
def kept_pool(path: Path, *, takeover: bool = False, verify_reads: bool = False) -> Iterator[tuple[Pool, KeeperLink]]:
    """The pool, open in this process, with all that an earlier one left to be gone on with.

    ``takeover``: also one that is still at work, which leaves. ``verify_reads``: as :meth:`Pool.open` has it. Raises what that raises.
    """
    _limit_arenas()
    run = os.path.join(os.path.realpath(path), "run")
    keeper = KeeperLink.claim(run, takeover=takeover)
    redo = keeper.kept("redo")[0] if keeper else os.memfd_create("thinpool-redo")
    with Pool.open(path, verify_reads=verify_reads, redo=redo, lock=keeper.kept("lock")[0] if keeper else -1) as pool:
        if keeper is None:
            keeper = KeeperLink(run)
            keeper.keep("lock", [pool.lock_fd])
            keeper.keep("redo", [redo])
        if not keeper.kept("identity"):
            keeper.keep("identity", [os.memfd_create("thinpool-identity")])
        try:
            pool.uses.survive(keeper)
        except Exception:
            _LOG.exception("cannot go on with what the last server left")
            os._exit(1)  # and let the keeper try again, rather than take down what works
        try:
            yield pool, keeper
        except Exception:
            if not pool.attachments():
                raise
            _LOG.exception("this server fails, and leaves what is attached to the next one")
            with suppress(Exception):
                pool.commit()
            os._exit(1)


def _limit_arenas() -> None:
    """glibc gives a process eight arenas for each processor, and each keeps as much as was ever needed from it at once: with a server's many threads,
    whose requests may be large, that grows for hours. The threads of an interpreter hardly need more than one.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS_MAX)


def identity_of(keeper: KeeperLink) -> str:
    """The name of this server, which is that of the one before if that has committed and left."""
    handed_on = keeper.kept("identity")[0]
    identity = os.pread(handed_on, _IDENTITY_BYTES, 0).decode()
    os.ftruncate(handed_on, 0)
    return identity or uuid.uuid4().hex


def leave(pool: Pool, keeper: KeeperLink, identity: str) -> None:
    """Ends this process without taking anything down: it is the next one's now."""
    pool.commit()
    os.pwrite(keeper.kept("identity")[0], identity.encode(), 0)
    os._exit(0)
