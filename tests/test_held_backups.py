"""Held metadata backups: what they name stays as it was until they are dropped, whatever becomes of the pool meanwhile."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from commandline import Command, wait_until
from test_compact import whole

import thinpool
from thinpool import BackupHeld, BackupNotFound, LayerState, OutOfSpace, Pool
from thinpool import backups as copies
from thinpool.backups import held_backups
from thinpool.catalog import HELD_LABEL, HELD_LAYER_LABEL
from thinpool.commits import Committer
from thinpool.engine import MAP, NODE
from thinpool.metadata import Metadata
from thinpool.recovery.dump import dump
from thinpool.recovery.dump import restore as restore_dump
from thinpool.recovery.repair import repair, restore_metadata
from thinpool.recovery.stored import StoredState
from thinpool.trash import take_back, throw_away

MIB = 1 << 20
CHUNK = 16 << 10
Content = dict[str, tuple[bool, bytes]]


def content_of(pool: Pool) -> Content:
    """All that there is, by layer: whether it is sealed, and its bytes."""
    return {layer.name: (layer.sealed, layer.pread(layer.size, 0)) for layer in pool.layers()}


def scribble(layer: thinpool.Layer, rng: random.Random, times: int = 60) -> None:
    for _ in range(times):
        layer.pwrite(rng.randbytes(rng.randrange(1, 6000)), rng.randrange(layer.size - 6000))


def build(path: Path, capacity: str = "32M") -> None:
    """Layers that share chunks, whole ones and parts of them; two that are equal, which nobody has noticed yet; one of which all is its own."""
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


@pytest.fixture
def built(pool_path: Path) -> tuple[Path, Content]:
    build(pool_path)
    with Pool.open(pool_path) as pool:
        return pool_path, content_of(pool)


# --- what it is for ---


def test_every_byte_of_every_layer_is_back(built: tuple[Path, Content]) -> None:
    path, content = built
    backup = hold(path)
    ruin(path)
    assert restored(path, backup) == content
    with Pool.open(path) as pool:
        assert (pool.layer("base").labels, pool.layer("web").parent) == ({"os": "none"}, pool.layer("base@1"))
    for _ in range(2):  # and it is held still
        ruin(path)
        assert restored(path, backup) == content


def test_without_holds_it_is_not(built: tuple[Path, Content]) -> None:
    """So that the test above is one."""
    path, content = built
    with Pool.open(path) as pool:
        backup = path / "meta.backups" / pool.make_backup().name
    ruin(path)
    restore_metadata(path, backup)
    with Pool.open(path, background=False) as pool:
        assert {layer.name for layer in pool.layers()} == content.keys()
        assert sum(pool.layer(name).pread(len(was), 0) != was for name, (_, was) in content.items()) >= 4


def test_one_of_two_and_then_the_other(built: tuple[Path, Content]) -> None:
    """Going back leaves what a later one holds, and the way there is open."""
    path, before = built
    first = hold(path)
    with Pool.open(path) as pool:
        pool.layer("empty").delete()
        scribble(pool.layer("web"), random.Random(3))
        pool.create_layer("late", "1M").pwrite(b"late" * 1000, 0)
        pool.layer("late").snapshot("late@1")
        pool.compute_digests()
        after = content_of(pool)
    second = hold(path)
    ruin(path)
    for _ in range(2):
        for backup, content in ((first, before), (second, after)):
            assert restored(path, backup) == content
            with Pool.open(path) as pool:
                pool.compute_digests()
                scribble(pool.layer("web"), random.Random(4))
    with Pool.open(path) as pool:
        for backup in (first, second):
            pool.drop_backup(backup.name)
    whole(path)


def test_checksums_of_what_was_not_held_do_not_come_back(pool_path: Path) -> None:
    """The chunks of what was in the trash are another layer's by now, which a later backup holds."""
    with Pool.create(pool_path, CHUNK, "4M") as pool:
        gone = pool.create_layer("gone", "2M")
        gone.pwrite(b"g" * (2 << 20), 0)
        gone.seal()
        pool.compute_digests()
        throw_away(pool, gone, 24)
        first = pool_path / "meta.held" / pool.make_backup(hold=True).name
        pool._committer.empty_trash()
        pool.reclaim()
        pool.create_layer("later", "4M").pwrite(b"l" * (3 << 20), 0)
        pool.make_backup(hold=True)
    assert restored(pool_path, first) == {}


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


# --- other ways to new metadata ---


def restore_earlier(path: Path, earlier: Path, text: Path) -> Iterator[Callable[[], object]]:
    yield lambda: restore_metadata(path, earlier)
    yield lambda: restore_dump(path, text.open("rb"))


def test_what_knows_nothing_of_it_is_not_restored(built: tuple[Path, Content], tmp_path: Path) -> None:
    """Its chunks would be free, and soon another layer's."""
    path, _ = built
    with Pool.open(path) as pool:
        earlier = path / "meta.backups" / pool.make_backup().name
    text = tmp_path / "dump"
    text.write_text("".join(dump(path)))
    backup = hold(path)
    for restore in restore_earlier(path, earlier, text):
        with pytest.raises(BackupHeld, match=backup.name):
            restore()
    with Pool.open(path) as pool:
        pool.drop_backup(backup.name)
    for restore in restore_earlier(path, earlier, text):
        restore()
    whole(path)


def test_what_knows_of_it_leaves_it_held(built: tuple[Path, Content], tmp_path: Path) -> None:
    path, content = built
    backup = hold(path)
    with Pool.open(path) as pool:
        scribble(pool.layer("web"), random.Random(6))
        later = path / "meta.backups" / pool.make_backup().name
    text = tmp_path / "dump"
    text.write_text("".join(dump(path)))
    for restore in restore_earlier(path, later, text):
        restore()
        assert is_held(path)
    ruin(path)
    assert restored(path, backup) == content


def test_a_repair_keeps_what_it_holds(built: tuple[Path, Content]) -> None:
    """Also where the pool itself has lost nodes, maps and names of its holds: the backup has them still."""
    path, content = built
    backup = hold(path)
    with Pool.open(path) as pool:
        for layer in pool.layers():
            layer.delete()
        pool.reclaim()
        holds = [layer.id for layer in pool.layers(HELD_LABEL)]
    store = Metadata(path / "meta")
    nodes = [key for key, _ in store.records(NODE)]
    store.commit([*((NODE, key, None) for key in nodes[::2]), (MAP, holds[0].to_bytes(8, "big"), None)], {holds[1]: None}, {}, {})
    store.close()
    done = repair(path)
    assert done.before.corruptions and not (done.lost or done.dropped or done.found)
    whole(path)
    assert is_held(path)
    ruin_all_free(path)
    assert restored(path, backup) == content


def ruin_all_free(path: Path) -> None:
    with Pool.open(path) as pool, pytest.raises(OutOfSpace):
        pool.create_layer("filler", "1G").pwrite(random.Random(7).randbytes(40 * MIB), 0)


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
