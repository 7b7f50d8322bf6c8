"""Held metadata backups: making, keeping and dropping them, also cut short; by the command and through a server."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from commandline import Command, wait_until
from heldworld import CHUNK, MIB, Content, build, content_of, damage, hold, is_held, restored, ruin, scribble
from test_compact import whole

import thinpool
from thinpool import BackupHeld, BackupNotFound, LayerState, OutOfSpace, Pool
from thinpool import backups as copies
from thinpool.backups import held_backups
from thinpool.catalog import HELD_LABEL, HELD_LAYER_LABEL
from thinpool.commits import Committer
from thinpool.metadata import Metadata
from thinpool.recovery.stored import StoredState
from thinpool.trash import take_back, throw_away


@pytest.fixture
def built(pool_path: Path) -> tuple[Path, Content]:
    return pool_path, build(pool_path)


def test_what_changes_while_it_is_made_is_not_in_it(pool_path: Path) -> None:
    """Each layer is what its hold is, whoever writes, names, labels and commits meanwhile; and there are no others."""
    with Pool.create(pool_path, CHUNK) as pool:
        layers = [pool.create_layer(f"l{number}", "4M") for number in range(8)]
        done = threading.Event()

        def write() -> None:
            rng = random.Random(5)
            while not done.is_set():
                for layer in layers:
                    scribble(layer, rng, 3)
                pool.commit()

        def come_and_go() -> None:
            while not done.is_set():
                pool.create_layer("gone", "1M").delete()
                pool.layer("l0").snapshot("snapshot")
                pool.put_document("test/1", b"{}")
                pool.layer("snapshot").delete()

        writers = [threading.Thread(target=write) for write in (write, write, come_and_go)]
        for writer in writers:
            writer.start()
        try:
            backups = [pool_path / "meta.held" / pool.make_backup(hold=True).name for _ in range(5)]
        finally:
            done.set()
            for writer in writers:
                writer.join()
        held: dict[str, dict[int, bytes]] = {backup.name: {} for backup in backups}
        for one in pool.layers(HELD_LABEL):
            held[one.labels[HELD_LABEL]][int(one.labels[HELD_LAYER_LABEL])] = one.pread(one.size, 0)
    for backup in backups:
        with StoredState(backup, pytest.fail) as state:
            layers_then = state.layers()
        assert held[backup.name].keys() == {number for number, record in layers_then.items() if HELD_LABEL not in record["labels"]}
    damage(pool_path)
    for backup in backups[::2]:
        content = restored(pool_path, backup)
        assert sorted(data for _, data in content.values()) == sorted(held[backup.name].values())


# --- how long it stays ---


def test_dropping_it_gives_the_space_back(built: tuple[Path, Content]) -> None:
    path, _ = built
    with Pool.open(path) as pool:
        pool.compute_digests()
        pool.reclaim()
        before = pool.usage()
        backup = pool.make_backup(hold=True)
        assert (pool.usage().layers, pool.usage().allocated, pool.usage().held) == (before.layers, before.allocated, 0)
        for layer in pool.layers():
            layer.delete()
        pool.reclaim()
        assert (pool.usage().layers, pool.usage().allocated, pool.usage().held) == (0, before.allocated, before.allocated)
        assert pool.usage().host == before.host
        pool.drop_backup(backup.name)
        pool.reclaim()
        assert (pool.usage().allocated, pool.usage().held, pool.usage().host) == (0, 0, 0)
        assert backup not in pool.backups()
        with pytest.raises(BackupNotFound):
            pool.drop_backup(backup.name)


def test_neither_age_nor_number_drops_it(pool_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pool.create(pool_path).close()
    backup = hold(pool_path)
    os.utime(backup, (0, 0))
    monkeypatch.setattr(copies, "COUNT_MAX", 1)
    with Pool.open(pool_path) as pool:
        for _ in range(3):
            pool.make_backup()
        assert [one.held for one in pool.backups()] == [False, True]


def test_a_pool_that_is_full_keeps_it(pool_path: Path) -> None:
    """The trash goes, and the backup stays until it is dropped."""
    with Pool.create(pool_path, CHUNK, "16M") as pool:
        layer = pool.create_layer("a", "64M")
        layer.pwrite(b"a" * (8 << 20), 0)
        pool.create_layer("gone", "64M").pwrite(b"g" * (4 << 20), 0)
        throw_away(pool, pool.layer("gone"), 24)
        backup = pool.make_backup(hold=True)
        layer.pwrite(b"b" * (7 << 20), 0)
        assert [one.name for one in pool.layers()] == ["a"]
        with pytest.raises(OutOfSpace):
            layer.pwrite(b"c" * (8 << 20), 8 << 20)
        pool.drop_backup(backup.name)
        pool.reclaim()
        layer.pwrite(b"c" * (7 << 20), 8 << 20)


def test_chunks_stay_where_it_names_them(built: tuple[Path, Content]) -> None:
    path, content = built
    backup = hold(path)
    with Pool.open(path) as pool:
        with pytest.raises(BackupHeld, match=backup.name):
            pool.compact()
        pool.drop_backup(backup.name)
        pool.layer("solo").delete()
        pool.compact()
        assert {name: item for name, item in content.items() if name != "solo"} == content_of(pool)


# --- holds are nobody's layers ---


def test_holds_are_out_of_sight_and_out_of_reach(built: tuple[Path, Content]) -> None:
    path, content = built
    hold(path)
    with Pool.open(path) as pool:
        assert {name for _, name in pool.names()} == content.keys()
        assert pool.layer("base@1").children == [pool.layer("web")]
        pool.compute_digests()
        holds = pool.layers(HELD_LABEL)
        assert len(holds) == len(content)
        assert not any(one.digests for one in holds)
        for change in (holds[0].delete, lambda: holds[0].rename("mine"), lambda: holds[0].set_labels({})):
            with pytest.raises(LayerState, match="metadata backup"):
                change()
        mine = pool.layer(holds[0].name).clone("mine")  # but what they hold can be had
        assert mine.pread(mine.size, 0) == content["base"][1]


def test_what_is_in_the_trash_is_not_held(built: tuple[Path, Content]) -> None:
    path, content = built
    with Pool.open(path) as pool:
        throw_away(pool, pool.layer("base@1"), 24)
        backup = path / "meta.held" / pool.make_backup(hold=True).name
        take_back(pool.layers(), "base@1")
    del content["base@1"]
    assert restored(path, backup) == content


def test_earlier_versions_do_not_write_to_such_a_pool(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        assert "holds" not in pool._store.pool_record()["features"]["read_compatible"]
        pool.make_backup(hold=True)
        assert "holds" in pool._store.pool_record()["features"]["read_compatible"]


# --- what ends half-way ---


def killed_at(path: Path, work: Callable[[Pool], object], where: object, name: str, *, after: bool) -> None:
    """Does it in a process that is gone as it comes to a call, or after that."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            pool = Pool.open(path, background=False)
            call = getattr(where, name)

            def end(*args: object, **options: object) -> None:
                if after:
                    call(*args, **options)
                os._exit(0)

            setattr(where, name, end)
            work(pool)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


MAKING = [(Pool, "commit"), (Metadata, "copy_to"), (Path, "rename"), (copies, "sync_directory")]
DROPPING = [(Path, "rename"), (copies, "sync_directory"), (shutil, "rmtree"), (Committer, "release_holds"), (Pool, "commit")]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("where", "name"), MAKING)
def test_one_that_is_half_made_holds_nothing(built: tuple[Path, Content], where: object, name: str, after: bool) -> None:
    path, content = built
    killed_at(path, lambda pool: pool.make_backup(hold=True), where, name, after=after)
    if is_held(path):
        ruin(path)
        assert restored(path, held_backups(path)[0]) == content
    assert list((path / "meta.held").glob("*.new")) == []
    whole(path)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("where", "name"), DROPPING)
def test_one_that_is_half_dropped_holds_all_or_nothing(built: tuple[Path, Content], where: object, name: str, after: bool) -> None:
    path, content = built
    backup = hold(path)
    killed_at(path, lambda pool: pool.drop_backup(backup.name), where, name, after=after)
    if is_held(path):
        ruin(path)
        assert restored(path, backup) == content
    else:
        assert held_backups(path) == [] and list((path / "meta.held").iterdir()) == []
        whole(path)


def test_one_that_cannot_be_made_leaves_nothing(built: tuple[Path, Content], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = built

    def full(*_: object) -> None:
        raise OutOfSpace("no room")

    with Pool.open(path) as pool:
        monkeypatch.setattr(Metadata, "copy_to", full)
        with pytest.raises(OutOfSpace):
            pool.make_backup(hold=True)
        monkeypatch.undo()
        assert pool.layers(HELD_LABEL) == []
        pool.create_layer("more", "1M").pwrite(b"m", 0)
        pool.commit()
    assert not is_held(path)


def test_who_is_interrupted_leaves_nothing(pool_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Pool.commit

    def interrupted(pool: Pool) -> None:
        monkeypatch.setattr(Pool, "commit", commit)
        raise KeyboardInterrupt

    with Pool.create(pool_path) as pool:
        pool.create_layer("a", "1M")
        monkeypatch.setattr(Pool, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.make_backup(hold=True)
        assert pool.layers(HELD_LABEL) == []
    assert not is_held(pool_path)


# --- the command, and through a server ---


def test_the_command(tmp_path: Path) -> None:
    command = Command(tmp_path)
    build(command.pool)
    (held,) = [one for one in command.json("restore-metadata", "--make", "--hold") if one["held"]]
    with Pool.open(command.pool) as pool:
        content = content_of(pool)
    assert command("restore-metadata").count("yes") == 1
    command("rm", "--keep", "0", "solo")
    assert 900_000 < command.json("df")["held"] <= MIB
    assert "held by metadata backups: " in command("df")
    assert {layer["name"] for layer in command.json("ls", "--all")} == content.keys() - {"solo"}
    code, message = command.fails("compact")
    assert code == 4 and held["name"] in message
    damage(command.pool)
    assert f"restored {held['name']}" in command("restore-metadata", held["name"])
    with Pool.open(command.pool) as pool:
        assert content_of(pool) == content
    assert not [one for one in command.json("restore-metadata", "--drop", held["name"]) if one["held"]]
    assert command.json("df")["held"] == 0
    assert command.fails("restore-metadata", "--drop", held["name"])[0] == 3
    assert command.start("restore-metadata", "--hold").returncode == 2


def test_through_a_server(tmp_path: Path) -> None:
    command = Command(tmp_path)
    build(command.pool)
    with thinpool.connect(command.pool, server=True) as pool:
        rng, stop = random.Random(8), threading.Event()

        def write() -> None:
            while not stop.is_set():
                scribble(pool.layer("web"), rng, 1)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            backup = pool.make_backup(hold=True)
            assert backup in pool.backups()
            (held,) = [one for one in pool.layers(HELD_LABEL) if one.name.endswith("/web")]
            content = held.pread(held.size, 0)
            with pytest.raises(BackupHeld):
                pool.compact()
            listed = [one["name"] for one in command.json("restore-metadata", "--make", "--hold") if one["held"]]
        finally:
            stop.set()
            writer.join()
        command("restore-metadata", "--drop", next(name for name in listed if name != backup.name))
        assert [one.name for one in pool.backups() if one.held] == [backup.name]
        with pytest.raises(BackupNotFound):
            pool.drop_backup("nothing")
    wait_until(lambda: not (command.pool / "server.sock").exists())
    thinpool.connect(command.pool).close()  # which waits for the server's end
    ruin(command.pool)
    assert restored(command.pool, command.pool / "meta.held" / backup.name)["web"] == (False, content)
