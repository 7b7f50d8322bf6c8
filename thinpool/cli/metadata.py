"""Verbs for a pool's metadata itself: ``dump``, ``restore``, ``pack``, ``rmap``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .options import pool_path
from .show import print_json, print_table
from .trust import print_repair

if TYPE_CHECKING:
    from ..recovery.check import Tables

Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Default: standard output.", show_default=False)]


def dump(ctx: typer.Context, output: Output = None, pool: options.Pool = None) -> None:
    """Write the metadata as JSON lines, shared parts of maps once; also of a pool in use."""
    from ..recovery.dump import dump as lines_of

    with ExitStack() as undo:
        out = undo.enter_context(open(output, "w", encoding="utf-8")) if output else sys.stdout
        out.writelines(lines_of(pool_path(ctx, pool)))


def pack(
    ctx: typer.Context,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="Compressed; restore takes it.", show_default=False)],
    pool: options.Pool = None,
) -> None:
    """Write the maps, without names, labels, documents and data, to show to somebody else; also of a damaged pool."""
    import gzip

    from ..recovery.dump import dump as lines_of

    with gzip.open(output, "wt", encoding="utf-8") as out:
        out.writelines(lines_of(pool_path(ctx, pool), anonymous=True))


def restore(
    ctx: typer.Context,
    dumped: Annotated[Path, typer.Argument(metavar="FILE", help="What dump or pack has written.", show_default=False)],
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Put what dump has written in the place of the metadata, which is kept.

    JSON: as repair has it.
    """
    from ..recovery.dump import restore as restore_dump

    with open(dumped, "rb") as source:
        done = restore_dump(pool_path(ctx, pool), source)
    if as_json:
        print_json(done.as_json())
        return
    print(f"restored {dumped}; the metadata that was there is kept in {done.kept}")
    print_repair(done)


def rmap(
    ctx: typer.Context,
    first: Annotated[int, typer.Argument(metavar="CHUNK", help="A chunk's number: its place in the data file.", show_default=False)],
    count: Annotated[int, typer.Argument(metavar="[COUNT]", help="How many, from there on.")] = 1,
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Show which layers have something in chunks of the data file, and at which offsets.

    JSON: an array of chunk, layer, offset, length.
    """
    from ..poolfiles import PoolFiles
    from ..recovery.check import places_of_chunks, read_tables
    from ..recovery.report import Report
    from ..recovery.stored import StoredState

    files = PoolFiles(pool_path(ctx, pool))
    files.require_pool()
    report = Report("full")
    with StoredState(files.meta, report.corrupt) as state:
        tables: Tables = read_tables(state, report)
        found = [
            (chunk, tables.names[layer_id], offset, length)
            for chunk, layer_id, offset, length in places_of_chunks(state, tables, lambda chunk: first <= chunk < first + count)
        ]
    found.sort()
    if as_json:
        print_json([{"chunk": chunk, "layer": layer, "offset": offset, "length": length} for chunk, layer, offset, length in found])
        return
    print_table([">CHUNK", "LAYER", ">OFFSET", ">LENGTH"], [[str(chunk), layer, str(offset), str(length)] for chunk, layer, offset, length in found])
