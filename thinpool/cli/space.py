"""Verbs about space and speed: what layers may do, zeros that take space, what happens as the pool fills up, and a shorter data file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated

import typer

from ..api import Policy
from ..errors import DamagedError
from ..units import format_size, parse_size
from . import options
from .options import opened
from .show import print_json, print_table, progress_bar


def limit(
    ctx: typer.Context,
    layer: options.Layer,
    rbps: Annotated[str | None, typer.Option(metavar="SIZE", help="Bytes read a second.", show_default=False)] = None,
    wbps: Annotated[str | None, typer.Option(metavar="SIZE", help="Bytes written a second.", show_default=False)] = None,
    riops: Annotated[int | None, typer.Option(metavar="N", help="Reads a second.", show_default=False)] = None,
    wiops: Annotated[int | None, typer.Option(metavar="N", help="Writes a second.", show_default=False)] = None,
    quota: Annotated[str | None, typer.Option(metavar="SIZE", help="The most it may map.", show_default=False)] = None,
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Limit what a layer may do, from now on; 0 takes a limit away. Without options, show its limits.

    JSON: rbps, wbps, riops, wiops (a second), quota (bytes); 0: no limit.
    """
    sizes = {name: parse_size(value) for name, value in (("rbps", rbps), ("wbps", wbps), ("quota", quota)) if value is not None}
    counts = {name: value for name, value in (("riops", riops), ("wiops", wiops)) if value is not None}
    with opened(ctx, pool) as p:
        found = p.layer(layer)
        limits = found.limits
        if sizes or counts:
            found.set_limits(replace(limits, **sizes, **counts))
            return
    if as_json:
        print_json(asdict(limits))
        return
    shown = [format_size(limits.rbps), format_size(limits.wbps), str(limits.riops), str(limits.wiops), format_size(limits.quota)]
    print_table([">RBPS", ">WBPS", ">RIOPS", ">WIOPS", ">QUOTA"], [["none" if text == "0" else text for text in shown]])


def sparsify(ctx: typer.Context, layer: options.Layer, as_json: options.AsJson = False, pool: options.Pool = None) -> None:
    """Make holes of what reads as zeros in a writable layer, also while it is in use.

    JSON: zeros (bytes that became holes), freed (bytes of these that nobody else needs: they are given back).
    """
    with opened(ctx, pool, gives_back=True) as p, progress_bar("looking for zeros") as progress:
        done = p.layer(layer).sparsify(progress)
    if as_json:
        print_json(asdict(done))
        return
    print(f"{format_size(done.zeros)} of zeros became holes, {format_size(done.freed)} given back")


def policy(
    ctx: typer.Context,
    low_water: Annotated[int | None, typer.Option(metavar="PERCENT", help="In use: from there on the pool is low. 0: never.", show_default=False)] = None,
    extend_at: Annotated[int | None, typer.Option(metavar="PERCENT", help="In use: there the capacity is raised. 0: never.", show_default=False)] = None,
    extend_by: Annotated[int | None, typer.Option(metavar="PERCENT", help="Of the capacity: how much it is raised.", show_default=False)] = None,
    extend_max: Annotated[str | None, typer.Option(metavar="SIZE", help="The most it is raised to. 0: what the host's disk has.", show_default=False)] = None,
    wait: Annotated[int | None, typer.Option(metavar="SECONDS", help="Writers of devices wait so long for room. 0: not at all.", show_default=False)] = None,
    hook: Annotated[str | None, typer.Option(metavar="COMMAND", help="Run for each event, with it as JSON on its input. '': none.", show_default=False)] = None,
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Say what happens as the pool fills up: events, a hook, a larger capacity. Without options, show it.

    Options that are not given stay as they are; of a policy that is damaged, as in a new pool.

    JSON: low_water, extend_at, extend_by (percent), extend_max (bytes), wait (seconds), hook.
    """
    given = {"low_water": low_water, "extend_at": extend_at, "extend_by": extend_by, "wait": wait, "hook": hook}
    changes = {name: value for name, value in given.items() if value is not None}
    if extend_max is not None:
        changes["extend_max"] = parse_size(extend_max)
    with opened(ctx, pool) as p:
        try:
            current = p.policy()
        except DamagedError:
            if not changes:
                raise
            current = Policy()
        if changes:
            p.set_policy(replace(current, **changes))  # type: ignore[arg-type]
            return
    if as_json:
        print_json(asdict(current))
        return
    most = format_size(current.extend_max) if current.extend_max else "none"
    row = [f"{current.low_water}%", f"{current.extend_at}%", f"{current.extend_by}%", most, f"{current.wait}s", current.hook]
    print_table([">LOW WATER", ">EXTEND AT", ">BY", ">UP TO", ">WAIT", "HOOK"], [row])


def events(ctx: typer.Context, pool: options.Pool = None) -> None:
    """Print how the pool's space is, and then each event, as JSON lines, until interrupted.

    JSON: kind (normal, low-water, full, extended, not-extended), time (seconds since 1970), capacity, used, free.
    """
    with opened(ctx, pool, server=True) as p:
        for event in p.events():
            print(json.dumps(asdict(event)), flush=True)


def compact(ctx: typer.Context, as_json: options.AsJson = False, pool: options.Pool = None) -> None:
    """Make the data file as short as its content allows, while the pool is in use.

    JSON: moved (bytes copied to another place), merged (split entries that became one chunk's), file_before, file_after (length of the data
    file), host_before, host_after (what it takes on the host's disk).
    """
    with opened(ctx, pool) as p, progress_bar("compacting") as progress:
        done = p.compact(progress)
    if as_json:
        print_json(asdict(done))
        return
    print(f"{format_size(done.moved)} moved, {done.merged} split entries merged")
    print(f"data file: {format_size(done.file_before)}, now {format_size(done.file_after)}")
    print(f"on the host: {format_size(done.host_before)}, now {format_size(done.host_after)}")
