"""Verbs that put layers to use: block devices, mounts, and the server that keeps them up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LayerState
from . import options
from .options import attached, opened, pool_path
from .show import print_json

User = Annotated[str, typer.Argument(metavar="LAYER", help="A layer's name, its device or its mountpoint.", show_default=False)]


def attach(
    ctx: typer.Context,
    layer: options.Layer,
    sector_size: Annotated[int, typer.Option(help="The device's logical block size: 512 or 4096.")] = 512,
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Make a layer a block device, and print its path. Needs root."""
    with opened(ctx, pool, server=True) as p:
        attachment = p.layer(layer).attach(sector_size=sector_size)
    if as_json:
        print_json({"layer": attachment.layer, "device": attachment.device})
    else:
        print(attachment.device)


def detach(ctx: typer.Context, layer: User, pool: options.Pool = None) -> None:
    """Take a layer's block device away."""
    with opened(ctx, pool) as p:
        attached(p, layer)[0].detach()


def mount(
    ctx: typer.Context,
    layer: options.Layer,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to.", show_default=False)],
    read_only: Annotated[bool, typer.Option("--read-only", help="Also for a writable layer.")] = False,
    pool: options.Pool = None,
) -> None:
    """Mount a layer's file system. Needs root."""
    with opened(ctx, pool, server=True) as p:
        p.layer(layer).mount(directory, read_only=True if read_only else None)


def umount(ctx: typer.Context, layer: User, pool: options.Pool = None) -> None:
    """Unmount a layer's file system."""
    with opened(ctx, pool) as p:
        found, attachment = attached(p, layer)
        if attachment is None or attachment.mountpoint is None:
            raise LayerState(f"{layer} is not mounted")
        found.unmount()


def serve(
    ctx: typer.Context,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and serve until a signal comes.")] = False,
    pool: options.Pool = None,
) -> None:
    """Start the pool's server; it stops when nothing is attached and nobody connected.

    The verbs that need it start it by themselves. With --foreground it stays, as under systemd.
    """
    path = pool_path(ctx, pool)
    if not foreground:
        from ..server.connect import connect

        connect(path, server=True).close()
        return
    import logging

    from ..pool import Pool
    from ..server.daemon import serve as serve_pool

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with Pool.open(path) as opened_pool:
        serve_pool(opened_pool, stays=True)
