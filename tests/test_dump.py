"""``dump``, ``restore``, ``pack``, ``rmap``, ``trim``."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import damage
import damagedpool
import pytest
from commandline import Command
from damagedpool import CHUNK, World

import thinpool
from thinpool import Pool
from thinpool.recovery.dump import dump, restore


def test_dump_restore_dump_is_the_same_file(sound_pool: World, tmp_path: Path) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    before = "".join(dump(path))
    done = restore(path, io.BytesIO(before.encode()))
    assert (done.lost, done.dropped, done.found, done.renamed) == ([], [], [], {})
    assert "".join(dump(path)) == before
    assert damagedpool.read_all(path, sound_pool.pieces) == {}
    damagedpool.require_whole(path)


def test_shared_parts_of_maps_are_dumped_once(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        layer = pool.create_layer("layer", "1T")
        layer.handle.map_unwritten(0, 256 * 300)
        for number in range(20):
            layer.snapshot(f"layer@{number}")
    nodes = [line for line in map(json.loads, dump(pool_path)) if "node" in line]
    assert len(nodes) == len({node["node"] for node in nodes}) == 300 + 3


def test_a_dump_of_a_pool_whose_metadata_is_gone_brings_it_back(sound_pool: World, tmp_path: Path) -> None:
    command = Command(tmp_path)
    sound_pool.restore(command.pool)
    command("dump", "-o", tmp_path / "dump")
    (command.pool / "meta/data.mdb").write_bytes(b"")
    command("restore", tmp_path / "dump")
    assert damagedpool.read_all(command.pool, sound_pool.pieces) == {}


def test_a_damaged_pool_is_not_dumped(sound_pool: World, tmp_path: Path) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    damage.zero_record(path, random.Random(1), path, "nodes")
    with pytest.raises(thinpool.DamagedError, match="repair it first"):
        list(dump(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [],
        lambda lines: lines[1:],
        lambda lines: ["nonsense\n"],
        lambda lines: [*lines[:5], lines[5][: len(lines[5]) // 2]],
        lambda lines: [lines[0], json.dumps({"node": 1, "level": 0, "entries": [[0, 2**60, 1]]})],
        lambda lines: [lines[0], json.dumps({"node": 1, "level": 0, "entries": [[250, 1, 10]]})],
        lambda lines: [lines[0], json.dumps({"node": -1, "level": 0, "entries": []})],
        lambda lines: [lines[0], json.dumps({"node": 1, "level": 9, "entries": []})],
        lambda lines: [lines[0], json.dumps({"layer": 1, "root": 1, "height": 10**9, "size": 1, "sealed": 0, "record": {"name": "a"}})],
        lambda lines: [*lines, lines[-2].replace('"layer":', '"layer":9')] if '"layer"' in lines[-2] else [],
    ],
)
def test_what_is_no_dump_changes_nothing(sound_pool: World, tmp_path: Path, change: Any) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    before = (path / "meta/data.mdb").read_bytes()
    with pytest.raises(thinpool.FormatError, match="not a dump"):
        restore(path, io.BytesIO("".join(change(list(dump(path)))).encode()))
    assert (path / "meta/data.mdb").read_bytes() == before
    assert not list(path.glob("meta.*"))


def test_a_pack_names_nobody_and_has_all_maps(sound_pool: World, tmp_path: Path) -> None:
    command = Command(tmp_path)
    sound_pool.restore(command.pool)
    command("pack", tmp_path / "packed")
    text = gzip.decompress((tmp_path / "packed").read_bytes()).decode()
    for word in ("base", "clone", "early", "kept", "sha256", "test/1"):
        assert word not in text
    whole = [line for line in map(json.loads, dump(command.pool)) if "node" in line]
    assert [line for line in map(json.loads, text.splitlines()) if "node" in line] == whole
    command("restore", tmp_path / "packed")
    assert command("check").startswith("full check: no errors (4 layers")


def test_a_damaged_pool_can_be_packed(sound_pool: World, tmp_path: Path) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    damage.zero_record(path, random.Random(1), path, "nodes")
    head = json.loads(next(iter(dump(path, anonymous=True))))
    assert head["damage"] > 0


def test_rmap_is_the_inverse_of_the_map(sound_pool: World, tmp_path: Path) -> None:
    command = Command(tmp_path)
    sound_pool.restore(command.pool)
    with Pool.open(command.pool, read_only=True) as pool:
        clone = pool.layer("clone")
        offset = next(extent.offset for extent in clone.extents() if extent.kind == "data" and clone.handle.chunk_at(extent.offset // CHUNK) is not None)
        chunk = clone.handle.chunk_at(offset // CHUNK)
        sharing = sorted(layer.name for layer in pool.layers() if layer.size > offset and layer.handle.chunk_at(offset // CHUNK) == chunk)
    found = command.json("rmap", str(chunk))
    assert sorted(item["layer"] for item in found) == sharing
    assert {(item["chunk"], item["offset"], item["length"]) for item in found} == {(chunk, offset // CHUNK * CHUNK, CHUNK)}
    assert "clone" in command("rmap", str(chunk), "1")
    assert command.json("rmap", "60000", "5") == []


def test_rmap_of_a_split_entry_says_which_blocks(tmp_path: Path) -> None:
    command = Command(tmp_path)
    with Pool.create(command.pool) as pool:
        base = pool.create_layer("base", "1M")
        base.pwrite(b"b" * 65536, 0)
        base.snapshot("base@1")
        base.pwrite(b"n" * 4096, 8192)
    offsets = {(item["layer"], item["offset"], item["length"]) for item in command.json("rmap", "0", "1024")}
    assert ("base@1", 0, 65536) in offsets
    assert {("base", offset, 4096) for offset in range(0, 65536, 4096)} <= offsets


def test_trim_gives_free_chunks_back(tmp_path: Path) -> None:
    command = Command(tmp_path)
    with Pool.create(command.pool) as pool:
        pool.create_layer("gone", "64M").pwrite(b"x" * (8 << 20), 0)
    with Pool.open(command.pool, background=False) as pool:
        pool.layer("gone").delete()
        pool.commit()
    assert (command.pool / "data").stat().st_blocks * 512 >= 8 << 20
    command("trim")
    assert (command.pool / "data").stat().st_blocks * 512 < 1 << 20
