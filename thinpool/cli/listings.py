"""Verbs that look and change nothing: ``ls``, ``df``, ``map``, ``diff``, ``delta``, ``ps``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from ..api import Attachment, PoolAPI
from ..catalog import PARTIAL_LABEL, TRASH_LABEL
from ..server.wire import LayerRecord, records_of
from ..units import format_size
from . import options
from .options import opened
from .show import print_json, print_ranges, print_table, short_id

# Of empty file systems, kept to be cloned by imports, of archives of image layers, and of layers in the trash.
_INNER_LABELS = {"thinpool.blank", "thinpool.blob", TRASH_LABEL}


def ls(
    ctx: typer.Context,
    show_all: Annotated[bool, typer.Option("--all", help="With the blank file systems kept for imports, the archives of image layers, and the trash.")] = False,
    no_trunc: options.NoTrunc = False,
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """List the layers as a tree, with what each takes.

    JSON: an array of id, name, size, sealed, created (seconds since 1970), labels, digests, parent (a name, or null), limits,
    virtual, mapped, exclusive, shared, used_by (an array).
    """
    from ..server.client import RemotePool

    with opened(ctx, pool) as p:
        records = p.records(with_usage=True) if isinstance(p, RemotePool) else records_of(p, with_usage=True)
        users = _users(p)
    shown = [record for record in records if show_all or not _INNER_LABELS & record.labels.keys()]
    if as_json:
        print_json([_record_json(record, users.get(record.name, [])) for record in shown])
        return
    rows = []
    for branch, record in _tree(shown):
        assert record.usage is not None
        sizes = (record.usage.virtual, record.usage.mapped, record.usage.exclusive, record.usage.shared)
        kind = "importing" if PARTIAL_LABEL in record.labels else "sealed" if record.sealed else "writable"
        rows.append([branch + short_id(record.name, whole=no_trunc), kind, *map(format_size, sizes), ", ".join(users.get(record.name, []))])
    print_table(["LAYER", "KIND", ">VIRTUAL", ">MAPPED", ">EXCLUSIVE", ">SHARED", "USED BY"], rows)


def df(ctx: typer.Context, as_json: options.AsJson = False, pool: options.Pool = None) -> None:
    """Show what the pool takes.

    JSON: capacity (0: no limit), allocated, host (what the data file really takes), metadata, layers (a count, without the trash),
    reclaimable (what the trash takes), held (what nothing but held metadata backups does), mode ("normal" or "error"), cause and way_out (of error mode).
    """
    with opened(ctx, pool) as p:
        usage = p.usage()
    if as_json:
        print_json(asdict(usage))
        return
    capacity = format_size(usage.capacity) if usage.capacity else "none"
    sizes = map(format_size, (usage.allocated, usage.reclaimable, usage.host, usage.metadata))
    print_table([">CAPACITY", ">ALLOCATED", ">RECLAIMABLE", ">ON HOST", ">METADATA", ">LAYERS"], [[capacity, *sizes, str(usage.layers)]])
    if usage.held:
        print(f"held by metadata backups: {format_size(usage.held)}")
    if usage.mode == "error":
        print(f"error mode, reads go on: {usage.cause}\nway out: {usage.way_out}")


def show_map(ctx: typer.Context, layer: options.Layer, as_json: options.AsJson = False, pool: options.Pool = None) -> None:
    """Show where a layer holds data and where holes.

    JSON: an array of offset, length, kind ("data" or "hole").
    """
    with opened(ctx, pool) as p:
        print_ranges(p.layer(layer).extents(), as_json=as_json)


def diff(
    ctx: typer.Context,
    from_layer: Annotated[str, typer.Argument(metavar="FROM", help="A layer's name.", show_default=False)],
    to_layer: Annotated[str, typer.Argument(metavar="TO", help="Another's.", show_default=False)],
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Show the ranges in which two layers may differ, and what TO holds there: what a copy of FROM lacks to be TO. Costs what differs.

    JSON: an array of offset, length, kind ("data" or "hole").
    """
    with opened(ctx, pool) as p:
        print_ranges(p.diff(from_layer, to_layer), as_json=as_json)


def delta(
    ctx: typer.Context,
    left: Annotated[str, typer.Argument(metavar="LEFT", help="A layer's name.", show_default=False)],
    right: Annotated[str, typer.Argument(metavar="RIGHT", help="Another's.", show_default=False)],
    same: Annotated[bool, typer.Option("--same", help="Also what the two share.")] = False,
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Show two layers side by side, as thin_delta does: what only one has, and what is different; by the maps, not by bytes.

    JSON: an array of offset, length, kind ("left_only", "right_only", "different", "same").
    """
    from ..deltas import delta as between

    kinds = {"left_only": "left only", "right_only": "right only", "different": "different", "same": "same"}
    if not same:
        del kinds["same"]
    with opened(ctx, pool) as p:
        print_ranges(between(p, left, right, same=same), kinds, as_json=as_json)


def ps(ctx: typer.Context, as_json: options.AsJson = False, pool: options.Pool = None) -> None:
    """List the layers in use: attached, mounted, running.

    JSON: an array of layer, device, mountpoint (or null), purpose ("attach", "mount", "run"), owner (a process id; 0: it
    stays until taken down), container (a name, or null).
    """
    with opened(ctx, pool) as p:
        attachments = p.attachments()
    if as_json:
        print_json([asdict(attachment) for attachment in attachments])
        return
    rows = [[one.layer, one.purpose, one.device, one.mountpoint or "", str(one.owner or ""), one.container or ""] for one in attachments]
    print_table(["LAYER", "PURPOSE", "DEVICE", "MOUNTED ON", ">OWNER", "CONTAINER"], rows)


def _users(pool: PoolAPI) -> dict[str, list[str]]:
    users: dict[str, list[str]] = {}
    for attachment in pool.attachments():
        users.setdefault(attachment.layer, []).append(_used_by(attachment))
    return users


def _used_by(attachment: Attachment) -> str:
    return attachment.container or attachment.mountpoint or attachment.device


def _record_json(record: LayerRecord, used_by: list[str]) -> dict[str, object]:
    data = record.to_json()
    del data["parent_id"]
    usage = data.pop("usage")
    return {**data, **usage, "used_by": used_by}


def _tree(records: list[LayerRecord]) -> Iterator[tuple[str, LayerRecord]]:
    """The records, each after its parent, with the lines of a tree to draw before its name."""
    ids = {record.id for record in records}
    children: dict[int | None, list[LayerRecord]] = {}
    for record in sorted(records, key=lambda record: record.id):
        children.setdefault(record.parent_id if record.parent_id in ids else None, []).append(record)
    # Depth first, without recursion: a chain of snapshots may be longer than Python's stack.
    waiting = [("", "", record) for record in reversed(children.get(None, []))]
    while waiting:
        branch, indent, record = waiting.pop()
        yield branch, record
        below = children.get(record.id, [])
        for number, child in enumerate(reversed(below)):
            last = number == 0
            waiting.append((indent + ("└─ " if last else "├─ "), indent + ("   " if last else "│  "), child))
