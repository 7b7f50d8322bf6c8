"""Metadata is put back, from a held backup, another one or a dump, or repaired: what is held is whole, or it is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from heldworld import CHUNK, MIB, Content, build, content_of, hold, is_held, restored, ruin, scribble
from test_compact import whole

from thinpool import BackupHeld, OutOfSpace, Pool
from thinpool.catalog import HELD_LABEL
from thinpool.engine import MAP, NODE
from thinpool.metadata import Metadata
from thinpool.recovery.dump import dump
from thinpool.recovery.dump import restore as restore_dump
from thinpool.recovery.repair import repair, restore_metadata
from thinpool.trash import throw_away


@pytest.fixture
def built(pool_path: Path) -> tuple[Path, Content]:
    return pool_path, build(pool_path)


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
