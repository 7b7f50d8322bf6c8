"""Verbs that look after a pool: ``check``, ``repair``, ``restore-metadata``, ``trim``."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..api import Healed, Range
from ..errors import BadReference, DamagedError, DiskError, PoolBusy, ThinpoolError
from ..units import format_size, parse_size
from . import options
from .exits import DAMAGED, FAILED, message_of
from .images import Insecure, docker_credentials
from .options import opened, pool_path
from .show import format_time, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from ..recovery.repair import Repair
    from ..recovery.report import Report

CORRUPT, LEAKS = 2, 3  # what qemu-img check exits with
_SHOWN_MAX = 50
_SCRUB_NICE = 10


class Check(options.UsageCode):
    """As ``qemu-img check`` has it: one that was asked for wrongly could not be done, and 2 is corruption."""

    usage_code = FAILED


def check(
    ctx: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the leaves of the maps and the counts of chunks.")] = False,
    scrub: Annotated[
        bool, typer.Option("--scrub", help="Also read all data: chunks against their checksums, sealed layers against their digests, free chunks for zeros.")
    ] = False,
    memory: Annotated[str, typer.Option(help="What the counts of chunks may take; less of it means more passes.")] = "256M",
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Check that a pool is whole, also while it is in use.

    Exit codes are those of qemu-img check: 0 nothing found, 1 the check could not be done, 2 corruption, 3 leaks only.

    JSON: mode, txn, layers, nodes, chunks, checksums (compared by a scrub), corruptions, leaks, leaked_chunks (counts), problems (kind, invariant, message),
    ranges (layer, offset, length, why), more_ranges (how many were left out).
    """
    from ..recovery.check import check as check_pool

    try:
        path = pool_path(ctx, pool)
        with progress_bar("checking") as progress:
            report = check_pool(path, quick=quick, memory_bytes=parse_size(memory), progress=progress)
        if scrub:
            _scrub(path, report)
    except (ThinpoolError, OSError) as error:
        print(f"thinpool: {message_of(error)}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    if as_json:
        print_json(report.as_json())
    else:
        _print(report)
    if report.corruptions or report.leaks:
        raise typer.Exit(CORRUPT if report.corruptions else LEAKS)


def repair(
    ctx: typer.Context,
    leaks: Annotated[bool, typer.Option("--leaks", help="Only if there are leaks and no corruption.")] = False,
    heal_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Then heal chunks, also of a pool in use, from another pool, a raw image of a layer, a device, or an image in a registry. May be given again.",
            show_default=False,
        ),
    ] = None,
    insecure: Insecure = False,
    chunk_size: Annotated[str, typer.Option(help="For a pool that has lost even that.", show_default=False)] = "0",
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Make counts and space anew from the maps, and keep what can be read of damaged maps. The old metadata is kept.

    Nobody else may have the pool open, unless there is nothing to do but to heal chunks.

    JSON: before (what check found), kept (where the old metadata is; empty: nothing was done), lost (ranges: layer, offset, length,
    why), renamed (old name to new), found (layers whose map, name or place was lost), dropped (names of layers of which nothing is left).
    With --heal-from, data: chunks (how many were not what their checksums say), healed and left (ranges), differ (layers that are not what their content
    digest says all the same).
    """
    sources, images = _parted(heal_from or [])
    done = _repaired(pool_path(ctx, pool), heals=bool(heal_from), leaks_only=leaks, chunk_size=parse_size(chunk_size))
    healed = None
    if heal_from:
        known = {image: docker_credentials(image) for image in images}
        with opened(ctx, pool) as p, progress_bar("healing") as progress:
            healed = p.heal(sources, images=images, credentials=known, insecure=insecure, progress=progress)
    if as_json:
        print_json(done.as_json() | ({} if healed is None else {"data": asdict(healed)}))
    else:
        _print_repaired(done)
        if healed is not None:
            _print_healed(healed)
    if healed is not None and (healed.left or healed.differ):
        raise typer.Exit(DAMAGED)


def _parted(given: list[str]) -> tuple[list[Path], list[str]]:
    """Paths, and the names of images: what is no file here."""
    from ..images.reference import Reference

    paths = [one for one in given if one.startswith(("/", ".")) or os.path.exists(one)]
    images = [one for one in given if one not in paths]
    for one in images:
        try:
            Reference.parse(one)
        except BadReference as error:
            raise BadReference(f"no file {one!r}, and no image: {error}") from None
    return [Path(one) for one in paths], images


def _repaired(path: Path, *, heals: bool, **how: Any) -> Repair:
    """A repair. Of a pool that somebody has open, where chunks are to be healed, that its metadata needs none."""
    from ..recovery.check import check as check_pool
    from ..recovery.repair import Repair
    from ..recovery.repair import repair as repair_pool

    with progress_bar("checking") as progress:
        try:
            return repair_pool(path, progress=progress, **how)
        except PoolBusy as busy:
            if not heals:
                raise
            found = Repair(check_pool(path, progress=progress))
            if found.before.corruptions or found.before.leaks:
                raise PoolBusy(f"{found.before.corruptions} corruptions and {found.before.leaks} leaks are to be repaired first: {busy}", busy.pid) from None
            return found


def _print_repaired(done: Repair) -> None:
    if not done.kept:
        print("nothing to repair")
        return
    print(f"repaired {done.before.corruptions} corruptions and {done.before.leaks} leaks; the old metadata is kept in {done.kept}")
    print_repair(done)


def _print_healed(done: Healed) -> None:
    if not done.chunks:
        print("nothing to heal")
        return
    rows = [[one.layer, str(one.offset), str(one.length), one.why] for one in (*done.healed, *done.left)]
    print_table(["LAYER", ">OFFSET", ">LENGTH", "DATA"], rows[:_SHOWN_MAX])
    if (more := len(rows) - _SHOWN_MAX) > 0:
        print(f"... and {more} more")
    for name in done.differ:
        print(f"layer {name} is not what its content digest says all the same")


def print_repair(done: Repair) -> None:
    """What came of it, for people."""
    for name in done.dropped:
        print(f"lost: layer {name}, all of it")
    for name in done.found:
        print(f"found: layer {name}, whose map, name or place was lost")
    for old, new in done.renamed.items():
        print(f"renamed: layer {old} to {new}, for it is not whole")
    if done.lost:
        print_table(["LOST IN LAYER", ">OFFSET", ">LENGTH", "WHY"], [[one.layer, str(one.offset), str(one.length), one.why] for one in done.lost])


def restore_metadata(
    ctx: typer.Context,
    backup: Annotated[str | None, typer.Argument(metavar="[BACKUP]", help="Which one: its name, or latest. Default: list them.", show_default=False)] = None,
    make: Annotated[bool, typer.Option("--make", help="Make one now, whatever the age of the others.")] = False,
    hold: Annotated[bool, typer.Option("--hold", help="Of the one that is made: keep what it names, until it is dropped.")] = False,
    drop: Annotated[str | None, typer.Option(metavar="BACKUP", help="Remove one; what it held is freed.", show_default=False)] = None,
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Put a metadata backup in the place of the metadata, which is kept; or list the backups.

    JSON: of a list, an array of name, time (seconds since 1970), bytes, held (what it names is kept); of a restore, as repair has it.
    """
    from ..backups import all_backups, find_backup, make_backup
    from ..holds import describe
    from ..metadata import Metadata
    from ..recovery.repair import restore_metadata as restore

    if hold and not make:
        raise typer.BadParameter("only one that is made can be held: --make --hold")
    path = pool_path(ctx, pool)
    if hold:
        with opened(ctx, pool) as p:
            p.make_backup(hold=True)
    elif make:
        with closing(Metadata(path / "meta", read_only=True)) as store:
            make_backup(store)
    if drop is not None:
        with opened(ctx, pool, gives_back=True) as p:
            p.drop_backup(drop)
    known = all_backups(path)
    if backup is None:
        found = [describe(one) for one in known]
        if as_json:
            print_json([asdict(one) for one in found])
        else:
            rows = [[one.name, format_time(one.time), format_size(one.bytes), "yes" if one.held else ""] for one in found]
            print_table(["BACKUP", "MADE", ">SIZE", "HELD"], rows)
        return
    chosen = known[0] if backup == "latest" and known else find_backup(path, backup)
    done = restore(path, chosen)
    if as_json:
        print_json(done.as_json())
        return
    print(f"restored {chosen.name}; the metadata that was there is kept in {done.kept}")
    print_repair(done)


def trim(ctx: typer.Context, pool: options.Pool = None) -> None:
    """Give all that is free back to the host, and wait until it has it."""
    with opened(ctx, pool, gives_back=True) as p:
        before = p.usage().host
        p.reclaim()
        print(f"{format_size(max(before - p.usage().host, 0))} given back")


def _scrub(path: Path, report: Report) -> None:
    from ..digests import has_its_content, lineage
    from ..pool import Pool
    from ..recovery.scrub import scrub_chunks

    report.mode = "scrub"
    os.setpriority(os.PRIO_PROCESS, 0, _SCRUB_NICE)
    try:
        with progress_bar("reading chunks") as progress:
            wrong = scrub_chunks(path, report, progress)
        told = {name for _, places in wrong.values() for name, _, _ in places}
        with Pool.open(path, read_only=True) as opened:
            for layer in opened.layers():
                if any(one.name in told for one in lineage(layer)):  # which of its bytes are wrong is known better
                    continue
                try:
                    found = has_its_content(layer)
                except (DamagedError, DiskError) as error:
                    report.corrupt(message_of(error), "I7")
                    continue
                if found is False:
                    report.corrupt(f"layer {layer.name} is not what its content digest says", "I7")
                    report.add_ranges(iter([Range(layer.name, 0, layer.size, "somewhere in it: its content digest does not fit")]))
    except DamagedError as error:
        report.corrupt(message_of(error))


def _print(report: Report) -> None:
    for problem in report.problems[:_SHOWN_MAX]:
        print(f"{problem.kind}{f' ({problem.invariant})' if problem.invariant else ''}: {problem.message}")
    if (more := report.corruptions + report.leaks - _SHOWN_MAX) > 0:
        print(f"... and {more} more")
    if report.ranges:
        print()
        rows = [[one.layer, str(one.offset), str(one.length), one.why] for one in report.ranges[:_SHOWN_MAX]]
        print_table(["LAYER", ">OFFSET", ">LENGTH", "WHY"], rows)
        if (more := len(report.ranges) + report.more_ranges - _SHOWN_MAX) > 0:
            print(f"... and {more} more")
        print()
    found = f"{report.corruptions} corruptions, {report.leaks} leaks" if report.corruptions or report.leaks else "no errors"
    print(f"{report.mode} check: {found} ({report.layers} layers, {report.nodes} map nodes, {report.chunks} chunks)")
