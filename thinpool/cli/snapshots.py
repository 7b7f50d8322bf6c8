"""The verb that makes a pool containerd's snapshotter."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..api import PoolAPI
from ..errors import ServerError
from ..units import parse_size
from . import options, service
from .options import pool_path


@contextmanager
def snapshots_served(connect: Callable[[], AbstractContextManager[PoolAPI]], address: Path, *, filesystem: str = "ext4", size: str = "10G") -> Iterator[None]:
    """Answers containerd at ``address`` for as long as this is entered."""
    try:
        from ..containerd.service import Service
    except ImportError as error:
        raise ServerError(f"containerd's snapshotter needs {error.name}: pip install 'thinpool[containerd]'") from error
    snapshots = Service(connect, str(address), filesystem=filesystem, size=parse_size(size))
    try:
        yield
    finally:
        snapshots.close()


def snapshotter(
    ctx: typer.Context,
    address: Annotated[Path, typer.Option(metavar="SOCKET", help="Where containerd finds it: a Unix socket.", show_default=False)],
    fs: Annotated[str, typer.Option(help="Of images and containers: ext4 or xfs.")] = "ext4",
    size: Annotated[str, typer.Option(help="Of their file systems, where nothing else is said.")] = "10G",
    pool: options.Pool = None,
) -> None:
    """Be containerd's snapshotter, until a signal comes. Needs root.

    containerd finds it as a proxy plugin: type "snapshot", and the address. Devices stay up when this ends, and are found again.
    """
    import logging

    from ..server.connect import connect

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    path = pool_path(ctx, pool)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with snapshots_served(lambda: connect(path, server=True), address, filesystem=fs, size=size):
        print(address, flush=True)
        service.say_ready()
        while not ended.wait(1.0):  # a signal that another thread takes does not wake this one, which is to call its handler
            continue
