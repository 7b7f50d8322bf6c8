"""Verbs that make and change layers."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from ..catalog import TRASH_LABEL
from ..errors import LayerDeleted
from ..trash import KEEP_HOURS, take_back, throw_away, thrown_away
from ..units import format_size
from . import options
from .options import opened, parse_labels, pool_path
from .show import format_time, print_json, print_table, progress_bar

NewSize = Annotated[str, typer.Argument(metavar="SIZE", help="Like 4K, 10G or 1.5T.", show_default=False)]


def init(
    ctx: typer.Context,
    chunk_size: Annotated[str, typer.Option(help="The unit of allocation: a power of two, 4K to 4M.")] = "64K",
    capacity: Annotated[str, typer.Option(help="The most the pool may take; 0: no limit.")] = "0",
    pool: options.Pool = None,
) -> None:
    """Make an empty pool in a directory."""
    from ..pool import Pool

    path: Path = pool_path(ctx, pool)
    Pool.create(path, chunk_size=chunk_size, capacity=capacity).close()


def create(ctx: typer.Context, name: options.Name, size: NewSize, label: options.Labels = None, pool: options.Pool = None) -> None:
    """Make an empty writable layer."""
    with opened(ctx, pool) as p:
        p.create_layer(name, size, labels=parse_labels(label))


def snapshot(ctx: typer.Context, layer: options.Layer, name: options.Name, label: options.Labels = None, pool: options.Pool = None) -> None:
    """Keep a layer's present content as a sealed layer."""
    with opened(ctx, pool) as p:
        p.layer(layer).snapshot(name, labels=parse_labels(label))


def clone(
    ctx: typer.Context,
    layer: options.Layer,
    name: options.Name,
    size: Annotated[str | None, typer.Option(help="A larger size. Default: the layer's.", show_default=False)] = None,
    label: options.Labels = None,
    pool: options.Pool = None,
) -> None:
    """Make a writable layer that begins as a copy of another."""
    with opened(ctx, pool) as p:
        p.layer(layer).clone(name, size, labels=parse_labels(label))


def seal(ctx: typer.Context, layer: options.Layer, pool: options.Pool = None) -> None:
    """Make a writable layer never change again."""
    with opened(ctx, pool) as p:
        p.layer(layer).seal()


def reset(
    ctx: typer.Context,
    layer: options.Layer,
    to: Annotated[str | None, typer.Option(metavar="LAYER", help="Whose content. Default: the parent's.", show_default=False)] = None,
    pool: options.Pool = None,
) -> None:
    """Put a writable layer back to its parent's content, or to a snapshot's."""
    with opened(ctx, pool, gives_back=True) as p:
        p.layer(layer).reset(to)


def resize(
    ctx: typer.Context,
    layer: options.Layer,
    size: NewSize,
    shrink: Annotated[bool, typer.Option("--shrink", help="Allow a smaller size: what lies beyond it is lost.")] = False,
    pool: options.Pool = None,
) -> None:
    """Change a writable layer's size (not that of a file system on it)."""
    with opened(ctx, pool, gives_back=True) as p:
        p.layer(layer).resize(size, allow_shrink=shrink)


def rename(ctx: typer.Context, layer: options.Layer, name: options.Name, pool: options.Pool = None) -> None:
    """Give a layer another name."""
    with opened(ctx, pool) as p:
        p.layer(layer).rename(name)


def rm(
    ctx: typer.Context,
    layers: Annotated[list[str], typer.Argument(metavar="LAYER...", help="Layers' names.", show_default=False)],
    keep: Annotated[float, typer.Option(metavar="HOURS", min=0, help="How long undelete can bring them back, unless their space is needed.")] = KEEP_HOURS,
    pool: options.Pool = None,
) -> None:
    """Remove layers; what was cloned from them stays whole. --keep 0 deletes them for good at once."""
    with opened(ctx, pool, gives_back=True) as p:
        for name in layers:
            layer = p.layer(name)
            if keep and TRASH_LABEL not in layer.labels:
                throw_away(p, layer, keep)
            else:
                layer.delete()


def undelete(
    ctx: typer.Context,
    layer: Annotated[str | None, typer.Argument(metavar="[LAYER]", help="Its name. Default: list what is in the trash.", show_default=False)] = None,
    name: Annotated[str | None, typer.Option("--as", metavar="NAME", help="Another name for it.", show_default=False)] = None,
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Bring back a layer that rm has removed; or list them, with the time until which that is possible.

    JSON: of the list, an array of layer, exclusive (what it takes that no other layer has), until (seconds since 1970).
    """
    with opened(ctx, pool) as p:
        if layer is not None:
            take_back(p.layers(), layer, name)
            return
        rows = []
        for one in thrown_away(p.layers()):
            with suppress(LayerDeleted):
                rows.append((one.name, one.layer.usage().exclusive, one.until))
    if as_json:
        print_json([{"layer": name, "exclusive": size, "until": until} for name, size, until in rows])
        return
    print_table(["LAYER", ">EXCLUSIVE", "UNTIL"], [[name, format_size(size), format_time(until)] for name, size, until in rows])


def digest(ctx: typer.Context, pool: options.Pool = None) -> None:
    """Compute the content digests that sealed layers lack; layers found equal share all from then on."""
    with opened(ctx, pool, gives_back=True) as p, progress_bar("computing digests") as progress:
        p.compute_digests(progress)
        rows = []
        for layer in p.layers():
            with suppress(LayerDeleted):  # by somebody else, since they were listed
                rows += [(digest, layer.name) for kind, digest in layer.digests.items() if kind == "content"]
        print_table(("DIGEST", "LAYER"), rows)
