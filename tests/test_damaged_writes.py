"""Work on pools whose records are whole by their checksums and wrong all the same: errors with a name, and never the end of the process.

``--damage-rounds`` times as many of each.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import damage
import damagedpool
import pytest
from damagedpool import CHUNK, World

from thinpool import DamagedError, Pool, PoolFailed, ThinpoolError
from thinpool.engine import NODE_PAGE, STATE
from thinpool.recovery.records import NodeReader, make_page, new_page, of_varints, read_page, varints

WRONG: dict[str, Callable[[Path, random.Random], str]] = {
    "nodes": lambda path, rng: damage.wrong_node(path, rng, CHUNK),
    **{name: lambda path, rng, name=name: damage.wrong_counts(path, rng, name) for name in ("chunk-counts", "node-counts", "summaries")},
    **{name: lambda path, rng, name=name: damage.wrong_numbers(path, rng, name) for name in ("maps", "state")},
}


def work(path: Path, rng: random.Random, places: list[tuple[str, int]]) -> int:
    """Random operations, where there is data, each of which may fail in thinpool's own words. How many did not."""
    done = 0
    with suppress(ThinpoolError), Pool.open(path, background=False) as pool:
        layers = pool.layers()
        for step in range(40):
            name, offset = rng.choice(places)
            with suppress(ThinpoolError):
                layer = next((one for one in layers if one.name == name), layers[0]) if rng.random() < 0.5 else rng.choice(layers)
                length = rng.choice((1, 4096, CHUNK, 5 * CHUNK))
                operations: list[Callable[[], object]] = [
                    lambda layer=layer, offset=offset, length=length: layer.pwrite(b"w" * length, offset),
                    lambda layer=layer, offset=offset, length=length: layer.discard(offset, length),
                    lambda layer=layer, step=step: layers.append(layer.clone(f"clone-{step}")),
                    layer.delete,
                    layer.usage,
                    layer.sparsify,
                    pool.commit,
                    pool.reclaim,
                ]
                rng.choices(operations, (6, 3, 2, 1, 1, 1, 2, 1))[0]()
                done += 1
        pool.reclaim()
    return done


@pytest.mark.parametrize("database", WRONG)
def test_nothing_that_is_wrong_ends_the_process(sound_pool: World, tmp_path: Path, damage_rounds: int, database: str) -> None:
    done = 0
    for seed in range(4 * damage_rounds):
        path, rng = sound_pool.restore(tmp_path / "pool"), random.Random(f"{database} {seed}")
        told = WRONG[database](path, rng)
        found = damagedpool.apart(lambda path=path, rng=rng: work(path, rng, list(sound_pool.pieces)))
        assert isinstance(found, int), f"seed {seed}: {told}: {found}"
        done += found
    assert done


def require_error_mode(pool: Pool) -> None:
    assert (usage := pool.usage()).mode == "error"
    assert "counts" in usage.cause and "repair" in usage.way_out
    with pytest.raises(PoolFailed):
        pool.commit()


def test_a_chunk_that_is_named_more_often_than_it_counts(pool_path: Path) -> None:
    """The transaction in which that shows is never stored, and reads go on."""
    with Pool.create(pool_path, CHUNK) as pool:
        pool.create_layer("a", "16M").pwrite(b"a" * 2 * CHUNK, 0)
        pool.create_layer("b", "16M").pwrite(b"b" * CHUNK, 0)
    reader = NodeReader(CHUNK)
    for key, value in damage._records(pool_path, "nodes"):
        assert reader.read(int.from_bytes(key, "big"), value)
        entries = list(reader.entries())
        if reader.level == 0 and entries[1]:
            entries[1] = entries[0]
            damage.put(pool_path, "nodes", key, reader.make(int.from_bytes(key, "big"), 0, entries))
    with Pool.open(pool_path, background=False) as pool:
        pool.layer("a").delete()
        with suppress(PoolFailed):
            pool.reclaim()
        require_error_mode(pool)
        assert pool.layer("b").pread(CHUNK, 0) == b"b" * CHUNK
    with Pool.open(pool_path, read_only=True) as pool:
        assert pool.layer("a").pread(CHUNK, 0) == b"a" * CHUNK


def test_node_ids_that_would_be_given_twice(sound_pool: World, tmp_path: Path) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    key, value = next((key, value) for key, value in damage._records(path, "state") if key[-1] == 0)
    damage.put(path, "state", key, of_varints(STATE, key, [1, *varints(STATE, key, value)[1:]]))
    with Pool.open(path, background=False) as pool:
        clone = pool.layer("base").clone("new")
        with pytest.raises(DamagedError, match="pool state"):
            clone.pwrite(b"x", 0)
        offset = next(offset for name, offset in sound_pool.pieces if name == "base")
        assert clone.pread(CHUNK, offset) == sound_pool.pieces["base", offset]


def test_a_deleted_node_that_counts_too_much(sound_pool: World, tmp_path: Path) -> None:
    path, values = sound_pool.restore(tmp_path / "pool"), new_page()
    queue = next(varints(STATE, key, value)[1:] for key, value in damage._records(path, "state") if key[-1] == 1)
    for key, value in damage._records(path, "node-counts"):
        page = int.from_bytes(key, "big")
        assert read_page(NODE_PAGE, page, value, values)
        for node in queue:
            if node // 1024 == page:
                values[node % 1024] += 1
        damage.put(path, "node-counts", key, make_page(NODE_PAGE, page, values))
    with Pool.open(path, background=False) as pool:
        with pytest.raises(ThinpoolError):
            pool.reclaim()
        require_error_mode(pool)
