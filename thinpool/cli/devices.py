"""Verbs that put layers to use: block devices, mounts, containers, and the server that keeps them up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LayerState
from . import options
from .exits import NOT_RUN, is_expected
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


def run(
    ctx: typer.Context,
    layer: options.Layer,
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="What to run in it.", show_default=False)],
    remove: Annotated[bool, typer.Option("--rm", help="Drop the container's layer when it ends.")] = False,
    name: Annotated[str | None, typer.Option(help="The container's name, and its layer's.", show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="A larger size for its layer.", show_default=False)] = None,
    pool: options.Pool = None,
) -> None:
    """Run a command in a container on a clone of a layer; its status is the command's. Needs root."""
    from ..containers.run import run_container
    from .app import report

    try:
        with opened(ctx, pool, server=True) as p:
            environment = {"TERM": os.environ["TERM"]} if "TERM" in os.environ else {}
            status = run_container(p, layer, command, name=name, remove=remove, size=size, environment=environment)
    except Exception as error:
        if not is_expected(error):
            raise
        report(error)
        raise typer.Exit(NOT_RUN) from None
    raise typer.Exit(status)


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
