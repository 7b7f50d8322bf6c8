"""``top``: what a pool's server is doing, from two records of its metrics and the time between them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ServerError
from ..metrics import OPERATIONS, Histogram, Operations, PoolMetrics
from ..units import format_size
from . import options
from .options import pool_path
from .show import print_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..server.client import RemotePool

_COLUMNS = ("READS/S", "READ/S", "P50", "P99", "WRITES/S", "WRITTEN/S", "P50", "P99", "DISCARDS/S")
_INTERVAL_MIN = 0.1

Json = dict[str, Any]


def top(
    ctx: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Watch for one interval, print, and end.")] = False,
    interval: Annotated[float, typer.Option(min=_INTERVAL_MIN, metavar="SECONDS", help="How often the figures are taken.")] = 2.0,
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Watch what the pool's server does: layers by their traffic, latencies, space, commits. Ctrl-C ends it.

    JSON: an object per interval, on one line (with --once: one, indented): seconds, mode, capacity, allocated, free, nbd_clients,
    commits, flushes, operations (by kind), layers (an array of layer, operations). Of each: per_second, bytes_per_second, errors, p50, p99 (seconds,
    or null).
    """
    from ..server.client import RemotePool
    from ..server.connect import connect

    with closing(connect(pool_path(ctx, pool))) as p:
        if not isinstance(p, RemotePool):
            raise ServerError(f"no server has {p.path} open, so there is no traffic to watch: `thinpool serve` starts one")
        with suppress(KeyboardInterrupt):
            _show(p, interval, once=once, as_json=as_json)


def _show(pool: RemotePool, interval: float, *, once: bool, as_json: bool) -> None:
    figures = _watch(pool, interval)
    if once and as_json:
        print_json(next(figures))
    elif as_json:
        for one in figures:
            print(json.dumps(one), flush=True)
    else:
        _draw(str(pool.path), figures, once=once)


def _draw(path: str, figures: Iterator[Json], *, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    if once:
        Console(highlight=False, width=10_000).print(_screen(path, next(figures)))  # wider than any terminal, as all tables
        return
    console = Console(highlight=False)
    with Live(f"{path}: one moment …", console=console, screen=True, auto_refresh=False) as live:
        for one in figures:
            live.update(_screen(path, one, rows=max(console.height - 6, 1)), refresh=True)


# --- figures ---


def _watch(pool: RemotePool, interval: float) -> Iterator[Json]:
    """What happened, an interval at a time."""
    before, began = pool.metrics(), time.monotonic()
    while True:
        time.sleep(interval)
        now, ended = pool.metrics(), time.monotonic()
        yield between(before, now, ended - began)
        before, began = now, ended


def between(before: PoolMetrics, now: PoolMetrics, seconds: float) -> Json:
    """What the verb tells in JSON. Layers without traffic are left out, the busiest comes first."""
    known = {layer.id: layer.operations for layer in before.layers}
    layers = []
    for layer in now.layers:
        done = _done(known.get(layer.id, {}), layer.operations)
        if count := sum(operations.count for operations in done.values()):
            layers.append((count, {"layer": layer.layer, "operations": _all_rates(done, seconds)}))
    return {
        "seconds": seconds,
        **{name: getattr(now, name) for name in ("mode", "capacity", "allocated", "free", "nbd_clients")},
        "commits": _times(now.commits - before.commits, seconds),
        "flushes": _times(now.flushes - before.flushes, seconds),
        "operations": _all_rates(_done(before.operations, now.operations), seconds),
        "layers": [layer for _, layer in sorted(layers, key=lambda one: -one[0])],
    }


def _done(before: Mapping[str, Operations], now: Mapping[str, Operations]) -> dict[str, Operations]:
    return {kind: now[kind] - before.get(kind, Operations()) for kind in OPERATIONS}


def _times(times: Histogram, seconds: float) -> Json:
    return {"per_second": times.count / seconds, "p50": times.quantile(0.5), "p99": times.quantile(0.99)}


def _all_rates(done: Mapping[str, Operations], seconds: float) -> Json:
    return {
        kind: {
            **_times(one.latency, seconds),
            "per_second": one.count / seconds,
            "bytes_per_second": one.bytes / seconds,
            "errors": one.errors,
        }
        for kind, one in done.items()
    }


# --- for people ---


def _screen(path: str, figures: Json, rows: int | None = None) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    capacity = f" of {format_size(figures['capacity'])}" if figures["capacity"] else ""
    commits = figures["commits"]
    head = Text.assemble((path, "bold"), "  ", (figures["mode"], "bold red" if figures["mode"] == "failed" else "green"))
    space = f"{format_size(figures['allocated'])}{capacity} taken, {format_size(figures['free'])} free"
    clients = f", {figures['nbd_clients']} NBD clients" if figures["nbd_clients"] else ""
    pace = f"{commits['per_second']:.1f} commits/s ({_duration(commits['p50'])}, p99 {_duration(commits['p99'])}){clients}"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("LAYER", no_wrap=True, overflow="ellipsis")
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("all", *_cells(figures["operations"]), style="bold")
    for layer in figures["layers"][:rows]:
        table.add_row(Text(layer["layer"]), *_cells(layer["operations"]))
    return Group(head, Text(f"{space}; {pace}"), Text(), table)


def _cells(operations: Json) -> list[str]:
    cells = []
    for kind in ("read", "write"):
        one = operations[kind]
        cells += [_count(one["per_second"]), format_size(int(one["bytes_per_second"])), _duration(one["p50"]), _duration(one["p99"])]
    return [*cells, _count(operations["discard"]["per_second"])]


def _count(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 10 else f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    value, unit = next((seconds * factor, unit) for factor, unit in ((1e6, "us"), (1e3, "ms"), (1.0, "s")) if seconds * factor < 1000 or unit == "s")
    return f"{value:.{0 if value >= 10 else 1}f} {unit}"
