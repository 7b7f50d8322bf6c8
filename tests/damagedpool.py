"""A pool to be damaged: closed, with all kinds of records, an earlier copy of it, and what its layers hold."""

from __future__ import annotations

import json
import os
import random
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damage
import invariants

import thinpool
from thinpool import Pool
from thinpool.recovery.check import check

CHUNK = 16 << 10
LEAF = CHUNK * 256
LEAVES = 120
Place = tuple[str, int]


@dataclass
class World:
    """``pieces``: the content of a chunk's length, by layer and offset: of all that holds data, and of some holes."""

    path: Path
    earlier: Path
    pieces: dict[Place, bytes]
    ids: dict[str, int]

    def restore(self, target: Path) -> Path:
        """A fresh copy of the pool."""
        return damage.copy_pool(self.path, target)


def build(directory: Path, seed: int = 1) -> World:
    """Makes the pool in ``directory/pool`` and its earlier copy beside it."""
    rng, path, earlier = random.Random(seed), directory / "pool", directory / "earlier"
    with Pool.create(path, chunk_size=CHUNK) as pool:
        base = pool.create_layer("base", LEAVES * LEAF)
        for leaf in range(LEAVES):
            base.pwrite(rng.randbytes(rng.randrange(1, 3 * CHUNK)), leaf * LEAF + rng.randrange(LEAF - 3 * CHUNK))
        pool.create_layer("early", "8M").pwrite(rng.randbytes(100000), 5000)
        pool.put_document("test/1", b'{"a": 1}')
    damage.copy_pool(path, earlier)
    with Pool.open(path, background=False) as pool:
        base = pool.layer("base")
        snapshot = base.snapshot("base@1", labels={"kept": "yes"})
        for layer in (base, snapshot.clone("clone", LEAVES * LEAF + 12345)):
            for _ in range(60):
                layer.pwrite(rng.randbytes(rng.randrange(1, 2 * CHUNK)), rng.randrange(LEAVES * LEAF - 2 * CHUNK))
        pool.layer("early").pwrite(rng.randbytes(3000), 4 << 20)
        pool.layer("early").discard(0, 8192)
        pool.put_document("test/1", b'{"a": 2}')
        pool.compute_digests()
        gone = pool.create_layer("gone", "1G")
        for leaf in range(5):
            gone.pwrite(b"x" * CHUNK, leaf * LEAF)
        pool.commit()
        gone.delete()
        pieces, ids = {}, {layer.name: layer.id for layer in pool.layers()}
        for layer in pool.layers():
            for extent in layer.extents():
                if extent.kind == "data":
                    offsets = range(extent.offset // CHUNK * CHUNK, min(extent.offset + extent.length, layer.size), CHUNK)
                else:
                    offsets = range(extent.offset // CHUNK * CHUNK, extent.offset // CHUNK * CHUNK + 1, CHUNK)
                for offset in offsets:
                    pieces[layer.name, offset] = layer.pread(min(CHUNK, layer.size - offset), offset)
    return World(path, earlier, pieces, ids)


def require_whole(path: Path) -> None:
    """The pool is sound, also for the independent reader, and can be used."""
    report = check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    with Pool.open(path, background=False) as pool:
        layer = pool.create_layer("after", "64M")
        layer.pwrite(b"after" * 100000, 12345)
        for old in pool.layers():
            if not old.sealed:
                old.pwrite(b"x", 0)
        pool.commit()
        pool.reclaim()
        assert layer.pread(500000, 12345) == b"after" * 100000
        invariants.check(pool._store.records, pool.chunk_size)


def read_all(path: Path, pieces: dict[Place, bytes]) -> dict[str, str]:
    """Reads all pieces in a process of its own. What is not as it should be, by ``layer:offset``: "wrong", or the error's message.

    ``""`` stands for the pool as a whole: it cannot be opened, or took the process down with it.
    """
    found: str | dict[str, str] = apart(lambda: _read(path, pieces))
    return {"": found} if isinstance(found, str) else found


def apart(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, done in a process of its own; or, as text, how that ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            with os.fdopen(writing, "w") as out:
                out.write(json.dumps(work()))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if status == 0 else f"ended by signal {status & 127}, with code {status >> 8}"


def _read(path: Path, pieces: dict[Place, bytes]) -> dict[str, str]:
    bad = {}
    try:
        with Pool.open(path, read_only=True) as pool:
            layers = {layer.name: layer for layer in pool.layers()}
            for (name, offset), content in pieces.items():
                try:
                    if name not in layers:
                        bad[f"{name}:{offset}"] = "no such layer"
                    elif layers[name].pread(len(content), offset) != content:
                        bad[f"{name}:{offset}"] = "wrong"
                except thinpool.ThinpoolError as error:
                    bad[f"{name}:{offset}"] = str(error)
    except (thinpool.ThinpoolError, OSError, ValueError, KeyError) as error:
        bad[""] = repr(error)
    return bad
