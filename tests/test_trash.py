"""The trash: what ``rm`` removes can be had back for a while, unless its space is needed."""

from __future__ import annotations

import time
from pathlib import Path

import invariants
import pytest
from commandline import Command, wait_until
from conftest import needs_root

import thinpool
from thinpool import Pool
from thinpool.catalog import TRASH_LABEL
from thinpool.trash import take_back, throw_away, thrown_away

MIB = 1 << 20


@pytest.fixture
def command(tmp_path: Path) -> Command:
    command = Command(tmp_path)
    with Pool.create(command.pool, capacity="64M") as pool:
        base = pool.create_layer("base", "1G", labels={"os": "none"})
        base.pwrite(b"base" * MIB, 0)
        base.clone("web").pwrite(b"web", 100)
    return command


def test_a_removed_layer_comes_back_whole(command: Command) -> None:
    before = command.json("ls")
    command("rm", "base")
    assert [layer["name"] for layer in command.json("ls")] == ["web"]
    command("undelete", "base")
    assert command.json("ls") == before
    with Pool.open(command.pool) as pool:
        assert pool.layer("base").pread(4 * MIB, 0) == b"base" * MIB


def test_its_name_is_free_meanwhile(command: Command) -> None:
    command("rm", "base")
    command("create", "base", "1G")
    code, message = command.fails("undelete", "base")
    assert code == 4 and "exists already" in message
    command("undelete", "base", "--as", "old")
    assert {layer["name"] for layer in command.json("ls")} == {"base", "old", "web"}


def test_the_one_removed_last_comes_back_first(command: Command) -> None:
    for size in ("1G", "2G"):
        command("create", "again", size)
        command("rm", "again", "--keep", "24" if size == "1G" else "25")
    command("undelete", "again")
    assert next(layer["size"] for layer in command.json("ls") if layer["name"] == "again") == 2 << 30


def test_what_is_in_the_trash_is_listed_and_counted(command: Command) -> None:
    command("rm", "web", "base")
    listed = command.json("undelete")
    assert {item["layer"] for item in listed} == {"base", "web"}
    assert all(23 * 3600 < item["until"] - time.time() <= 24 * 3600 for item in listed)
    usage = command.json("df")
    assert (usage["layers"], usage["reclaimable"]) == (0, usage["allocated"])
    assert "base" in command("undelete")


def test_what_other_layers_share_is_not_reclaimable(command: Command) -> None:
    command("rm", "web")
    assert 0 < command.json("df")["reclaimable"] <= 65536


def test_keep_0_deletes_for_good(command: Command) -> None:
    command("rm", "web", "base", "--keep", "0")
    assert command.json("undelete") == []
    assert command.json("df")["allocated"] == 0
    assert command.fails("undelete", "base")[0] == 3


def test_removing_it_again_deletes_it_for_good(command: Command) -> None:
    command("rm", "base")
    (name,) = (layer["name"] for layer in command.json("ls", "--all") if TRASH_LABEL in layer["labels"])
    command("rm", name)
    assert command.json("undelete") == []


def test_it_goes_when_its_time_is_up(pool_path: Path) -> None:
    with Pool.create(pool_path, capacity="64M") as pool:
        pool.create_layer("short", "1G").pwrite(b"x" * MIB, 0)
        pool.create_layer("long", "1G")
        throw_away(pool, pool.layer("short"), -1)
        throw_away(pool, pool.layer("long"), 1)
    with Pool.open(pool_path) as pool:
        assert [one.name for one in thrown_away(pool.layers())] == ["long"]
        pool.reclaim()
        assert pool.usage().allocated == 0


def test_it_goes_while_the_pool_stays_open(pool_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinpool.commits._TRASH_INTERVAL_SECONDS", 0.05)
    with Pool.create(pool_path) as pool:
        throw_away(pool, pool.create_layer("a", "1G"), 1 / 36000)
        wait_until(lambda: not pool.layers())


@pytest.mark.parametrize("background", [True, False])
def test_it_goes_when_its_space_is_needed(pool_path: Path, background: bool) -> None:
    Pool.create(pool_path, chunk_size="16K", capacity="16M").close()
    with Pool.open(pool_path, background=background) as pool:
        pool.create_layer("gone", "1G").pwrite(b"g" * 12 * MIB, 0)
        throw_away(pool, pool.layer("gone"), 24)
        pool.commit()
        layer = pool.create_layer("new", "1G")
        for piece in range(15):
            layer.pwrite(bytes([piece + 1]) * MIB, piece * MIB)
        assert [one.name for one in pool.layers()] == ["new"]
        assert layer.pread(15 * MIB, 0) == b"".join(bytes([piece + 1]) * MIB for piece in range(15))
        pool.commit()
        pool.reclaim()
        invariants.check(pool._store.records, pool.chunk_size)


def test_a_full_pool_without_trash_is_full(pool_path: Path) -> None:
    with Pool.create(pool_path, chunk_size="16K", capacity="16M") as pool:
        layer = pool.create_layer("a", "1G")
        with pytest.raises(thinpool.OutOfSpace):
            layer.pwrite(b"x" * 17 * MIB, 0)


@pytest.mark.parametrize("background", [True, False])
def test_what_was_deleted_makes_room_at_once(pool_path: Path, background: bool) -> None:
    Pool.create(pool_path, chunk_size="16K", capacity="16M").close()
    with Pool.open(pool_path, background=background) as pool:
        layer = pool.create_layer("a", "1G")
        layer.pwrite(b"a" * 8 * MIB, 0)
        layer.snapshot("snapshot")
        with pytest.raises(thinpool.OutOfSpace):
            layer.pwrite(b"b" * 9 * MIB, 0)
        pool.layer("snapshot").delete()
        layer.pwrite(b"c" * 7 * MIB, 8 * MIB)


def test_programs_delete_for_good(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        pool.create_layer("a", "1G").delete()
        with pytest.raises(thinpool.LayerNotFound):
            take_back(pool.layers(), "a")


def test_a_layer_in_the_trash_is_not_found_by_its_digest(pool_path: Path) -> None:
    with Pool.create(pool_path, capacity="64M") as pool:
        pool.create_layer("a", "1M").pwrite(b"x" * 65536, 0)
        pool.layer("a").seal()
        pool.compute_digests()
        digest = pool.layer("a").digests["content"]
        throw_away(pool, pool.layer("a"), 24)
        assert pool.layers_with_digest("content", digest) == []
        assert take_back(pool.layers(), "a").digests["content"] == digest
        assert [layer.name for layer in pool.layers_with_digest("content", digest)] == ["a"]


@needs_root()
def test_through_a_server(command: Command) -> None:
    command("attach", "base")
    code, message = command.fails("rm", "base")
    assert code == 4 and "used by block device" in message
    command("rm", "web")
    assert {item["layer"] for item in command.json("undelete")} == {"web"}
    command("undelete", "web")
    command("detach", "base")


def test_listing_the_trash_while_somebody_else_deletes(pool: thinpool.Pool) -> None:
    layers = [pool.create_layer(name, "1M") for name in ("a", "b")]
    throw_away(pool, layers[0], 1)
    layers[1].delete()
    assert [one.layer for one in thrown_away(layers)] == [layers[0]]


def test_listing_the_trash_while_somebody_else_takes_a_layer_back(pool: thinpool.Pool) -> None:
    throw_away(pool, pool.create_layer("a", "1M"), 1)
    (listed,) = thrown_away(pool.layers())
    take_back(pool.layers(), "a")
    assert listed.name == "a" and listed.until > time.time()
