"""A pool for the tests of held metadata backups, and the worst that can be done to it."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
from test_compact import whole

import thinpool
from thinpool import BackupHeld, OutOfSpace, Pool
from thinpool.backups import held_backups
from thinpool.catalog import HELD_LABEL
from thinpool.recovery.repair import restore_metadata
from thinpool.trash import throw_away

MIB = 1 << 20
CHUNK = 16 << 10
Content = dict[str, tuple[bool, bytes]]


def content_of(pool: Pool) -> Content:
    """All that there is, by layer: whether it is sealed, and its bytes."""
    return {layer.name: (layer.sealed, layer.pread(layer.size, 0)) for layer in pool.layers()}


def scribble(layer: thinpool.Layer, rng: random.Random, times: int = 60) -> None:
    for _ in range(times):
        layer.pwrite(rng.randbytes(rng.randrange(1, 6000)), rng.randrange(layer.size - 6000))


def build(path: Path, capacity: str = "32M") -> Content:
    """What is in a new pool: layers that share chunks, whole and in part; two that are equal, which nobody has noticed yet; one of which all is its own."""
    rng = random.Random(1)
    with Pool.create(path, CHUNK, capacity) as pool:
        base = pool.create_layer("base", 3 * MIB, labels={"os": "none"})
        base.pwrite(rng.randbytes(2 * MIB), 5000)
        scribble(base.snapshot("base@1").clone("web"), rng)
        pool.compute_digests()
        scribble(base, rng)
        solo = pool.create_layer("solo", 2 * MIB)
        solo.pwrite(rng.randbytes(MIB), 0)
        solo.discard(100_000, 50_000)
        same = rng.randbytes(MIB)
        for name in ("one", "two"):
            pool.create_layer(name, MIB).pwrite(same, 0)
            pool.layer(name).seal()
        scribble(pool.layer("two").clone("heir"), rng, 10)
        pool.create_layer("empty", "1G").resize("1M", allow_shrink=True)
        return content_of(pool)


def ruin(path: Path) -> None:
    """All that can be done to a pool, so that as little as possible is where it was; then its metadata is damaged."""
    rng = random.Random(2)
    with Pool.open(path) as pool:
        pool.compute_digests()  # one and two become one
        for name in ("base", "web"):
            scribble(pool.layer(name), rng)
        pool.layer("solo").discard(0, 2 * MIB)
        pool.layer("heir").resize("600K", allow_shrink=True)
        pool.reclaim()
        for name in ("web", "one", "base@1"):
            throw_away(pool, pool.layer(name), 24)
        pool._committer.empty_trash()
        pool.reclaim()
        with suppress(BackupHeld):
            pool.compact()
        pool.layer("two").delete()
        pool.layer("base").write_zeroes(0, MIB)
        pool.layer("base").reset("heir")
        pool.reclaim()
        with pytest.raises(OutOfSpace):
            for number in range(1000):
                pool.create_layer(f"filler-{number}", MIB).pwrite(rng.randbytes(MIB), 0)
        pool.commit()
        pool.reclaim()
    damage(path)


def damage(path: Path) -> None:
    (path / "meta/data.mdb").write_bytes(b"\xa5" * 100_000)


def hold(path: Path) -> Path:
    """Of a closed pool."""
    with Pool.open(path) as pool:
        name = pool.make_backup(hold=True).name
    return path / "meta.held" / name


def restored(path: Path, backup: Path) -> Content:
    """What the pool has once the backup is put back; it is whole."""
    done = restore_metadata(path, backup)
    assert not (done.before.corruptions or done.lost or done.found or done.dropped)
    whole(path)
    with Pool.open(path, background=False) as pool:
        return content_of(pool)


def is_held(path: Path) -> bool:
    """Whether the pool has holds: exactly those of the backups that say so."""
    with Pool.open(path, background=False) as pool:
        there = {layer.labels[HELD_LABEL] for layer in pool.layers(HELD_LABEL)}
    assert there == {backup.name for backup in held_backups(path)}
    return bool(there)
