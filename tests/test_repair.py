"""``repair``: what damage has not touched comes back, what is lost is said, the old metadata is kept."""

from __future__ import annotations

import errno
import itertools
import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import damagedpool
import invariants
import pytest
from commandline import Command
from damagedpool import CHUNK, World

import thinpool
from thinpool import Pool, poolfiles
from thinpool.metadata import Metadata, frame
from thinpool.recovery.check import check
from thinpool.recovery.repair import Repair, repair

CUT = 99


def require_rest(sound_pool: World, path: Path, done: Repair) -> None:
    """All pieces are as they were, but for what the repair said is lost."""
    names = {name: known for name, number in sound_pool.ids.items() if (known := f"lost-name-{number}") in done.found}
    pieces = {(names.get(name, name), offset): content for (name, offset), content in sound_pool.pieces.items()}
    for place, message in damagedpool.read_all(path, pieces).items():
        name, _, offset = place.rpartition(":")
        lost = name in done.dropped or any(
            one.layer == name and one.offset < int(offset) + CHUNK and int(offset) < one.offset + one.length for one in done.lost
        )
        shorter = name in done.found and message.startswith("past the end")  # its size is lost too
        assert lost or shorter, f"{place}: {message}, and not said to be lost"


@pytest.mark.parametrize("database", damage.DATABASES)
def test_damaged_records(sound_pool: World, tmp_path: Path, damage_rounds: int, database: str) -> None:
    for seed in range(2 * damage_rounds):
        path, rng = sound_pool.restore(tmp_path / "pool"), random.Random(f"{database} {seed}")
        how = rng.choice(list(damage.RECORDS))
        print(f"seed {seed}:", damage.RECORDS[how](path, rng, sound_pool.earlier, database))
        done = repair(path)
        if database not in ("nodes", "maps", "layers"):
            assert (done.lost, done.dropped, done.found) == ([], [], [])
        require_rest(sound_pool, path, done)
        damagedpool.require_whole(path)


@pytest.mark.parametrize("how", damage.PAGES)
def test_damaged_pages(sound_pool: World, tmp_path: Path, damage_rounds: int, how: str) -> None:
    """Where hardly anything is left, a repair says so and changes nothing; then there are backups."""
    for seed in range(3 * damage_rounds):
        path, rng = sound_pool.restore(tmp_path / "pool"), random.Random(f"page {how} {seed}")
        print(f"seed {seed}:", damage.PAGES[how](path, rng, sound_pool.earlier))
        try:
            done = repair(path)
        except thinpool.DamagedError:
            assert not list(path.glob("meta.kept-*"))
            continue
        require_rest(sound_pool, path, done)
        damagedpool.require_whole(path)


def test_one_damaged_leaf_costs_its_range_and_no_more(sound_pool: World, tmp_path: Path) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    with Pool.open(path, read_only=True) as pool:
        leaves = {(layer, offset // damagedpool.LEAF) for layer, offset in sound_pool.pieces}
    table = [(key, value) for key, value in damage._records(path, "nodes") if value[4] == 0]
    damage.put(path, "nodes", table[7][0], b"gone")
    done = repair(path)
    assert {(one.length, one.offset % damagedpool.LEAF) for one in done.lost} == {(damagedpool.LEAF, 0)}
    assert {(one.layer, one.offset // damagedpool.LEAF) for one in done.lost} <= leaves
    require_rest(sound_pool, path, done)
    with Pool.open(path) as pool:
        for one in done.lost:
            assert pool.layer(one.layer).labels["thinpool.lost"] == f"{one.offset}+{one.length}"
            assert pool.layer(one.layer).digests == {}


def test_a_lost_page_between_the_records_loses_nothing(sound_pool: World, tmp_path: Path) -> None:
    """The branch page above the nodes: all leaves of the tree are found without it."""
    path = sound_pool.restore(tmp_path / "pool")
    content = (path / "meta/data.mdb").read_bytes()
    branches = [at for at in range(2 * 4096, len(content), 4096) if content[at + 10 : at + 12] == b"\1\0"]
    assert branches
    with open(path / "meta/data.mdb", "r+b") as file:
        for at in branches:
            file.seek(at)
            file.write(bytes(4096))
    assert check(path).corruptions
    done = repair(path)
    assert (done.lost, done.dropped, done.found) == ([], [], [])
    require_rest(sound_pool, path, done)
    damagedpool.require_whole(path)


def test_a_page_that_the_disk_cannot_read_is_lost_and_no_more(sound_pool: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, hidden = os.pread, 0
    for page in range(9, 60, 10):
        path = sound_pool.restore(tmp_path / "pool")
        wanted = []

        def failing(fd: int, length: int, offset: int, path: Path = path, page: int = page, wanted: list[int] = wanted) -> bytes:
            if os.readlink(f"/proc/self/fd/{fd}") == str(path / "meta/data.mdb") and offset // 4096 == page:
                wanted.append(offset)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return pread(fd, length, offset)

        monkeypatch.setattr(os, "pread", failing)
        report = check(path)
        assert bool(wanted) == any(f"cannot be read at {page * 4096}" in problem.message for problem in report.problems)
        hidden += bool(wanted)
        done = repair(path)
        monkeypatch.undo()
        require_rest(sound_pool, path, done)
        damagedpool.require_whole(path)
    assert hidden


def test_a_lost_map_gets_its_nodes_back(sound_pool: World, tmp_path: Path) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    with Pool.open(path, read_only=True) as pool:
        number = pool.layer("clone").id
    damage.put(path, "maps", number.to_bytes(8, "big"), None)
    done = repair(path)
    assert (done.lost, done.found) == ([], ["clone"])
    end = damagedpool.LEAVES * damagedpool.LEAF
    assert damagedpool.read_all(path, {place: content for place, content in sound_pool.pieces.items() if place[1] + CHUNK <= end}) == {}


def test_a_data_file_cut_short(sound_pool: World, tmp_path: Path) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    with open(path / "data", "r+b") as file:
        file.truncate(100 * CHUNK + 5)
    done = repair(path)
    assert done.lost and {one.why for one in done.lost} == {"the data file is cut off"}
    require_rest(sound_pool, path, done)
    damagedpool.require_whole(path)


def leaking(path: Path) -> None:
    """A count too high."""
    (key, value), *_ = damage._records(path, "chunk-counts")
    counts = invariants.Reader(invariants.CHUNK_PAGE, key, value).array(1024)
    counts[next(i for i, count in enumerate(counts) if count > 1)] += 1
    store = Metadata(path / "meta")
    store.commit([(invariants.CHUNK_PAGE, key, frame(invariants.CHUNK_PAGE, key, bytes([1, 1]) + bytes(counts)))], {}, {}, {})
    store.close()


def test_leaks_only(sound_pool: World, tmp_path: Path) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    leaking(path)
    done = repair(path, leaks_only=True)
    assert (done.before.leaks, done.lost, done.found) == (1, [], [])
    require_rest(sound_pool, path, done)
    damagedpool.require_whole(path)


def test_leaks_only_does_not_touch_corruption(sound_pool: World, tmp_path: Path) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    damage.zero_record(path, random.Random(1), path, "nodes")
    with pytest.raises(thinpool.DamagedError, match="more than leaks"):
        repair(path, leaks_only=True)
    assert not list(path.glob("meta.*"))


def test_the_old_metadata_is_kept(sound_pool: World, tmp_path: Path) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    damage.zero_record(path, random.Random(1), path, "summaries")
    before = (path / "meta/data.mdb").read_bytes()
    done = repair(path)
    assert Path(done.kept) == path / "meta.kept-1"
    assert (path / "meta.kept-1/data.mdb").read_bytes() == before


def cut_repair(path: Path, step: int) -> bool:
    """A repair in a process that ends before, or after, that step of it (a store's transaction, a call that names or syncs files); false: it had fewer."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, CUT)
        return status == CUT
    left = step

    def steps(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if (left := left - 1) == 0:
                os._exit(CUT)
            result = call(*arguments, **options)
            if (left := left - 1) == 0:
                os._exit(CUT)
            return result

        return counted

    for module, name in ((os, "mkdir"), (os, "rename"), (os, "fsync"), (os, "ftruncate"), (poolfiles, "_exchange"), (Metadata, "_write")):
        setattr(module, name, steps(getattr(module, name)))
    try:
        repair(path)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def test_a_repair_may_be_cut_off_anywhere(sound_pool: World, tmp_path: Path) -> None:
    """The old metadata is there or the new, each whole, and the old one is kept then; a repair that is begun again ends well."""
    cut, swapped = True, 0
    for step in itertools.count(1):
        path = sound_pool.restore(tmp_path / "pool")
        with open(path / "data", "r+b") as file:
            file.truncate(100 * CHUNK + 5)
        damage.zero_record(path, random.Random(1), path, "nodes")
        before = (path / "meta/data.mdb").read_bytes()
        cut = cut_repair(path, step)
        if (path / "meta/data.mdb").read_bytes() == before:
            assert repair(path).kept
        else:
            swapped += 1
            damagedpool.require_whole(path)
        assert before in [kept.read_bytes() for kept in path.glob("meta.kept-*/data.mdb")]
        if not cut:
            break
    assert step > swapped > 3


def test_a_pool_in_use_is_not_repaired(sound_pool: World, tmp_path: Path) -> None:
    command = Command(tmp_path)
    sound_pool.restore(command.pool)
    with Pool.open(command.pool):
        code, message = command.fails("repair")
    assert code == 4 and "is open in process" in message and "only while nobody has it open" in message


def test_the_command(sound_pool: World, tmp_path: Path) -> None:
    command = Command(tmp_path)
    sound_pool.restore(command.pool)
    assert command("repair") == "nothing to repair\n"
    damage.zero_record(command.pool, random.Random(2), command.pool, "nodes")
    out = command("repair")
    assert "the old metadata is kept in" in out and "its map is damaged" in out
    assert command("check").startswith("full check: no errors")


def test_fresh_layers_read_zeros_after_a_repair(sound_pool: World, tmp_path: Path) -> None:
    """Nobody's old bytes show, whatever was lost."""
    path = sound_pool.restore(tmp_path / "pool")
    with Pool.open(path, read_only=True) as pool:
        number = pool.layer("early").id
    damage.put(path, "maps", number.to_bytes(8, "big"), b"")
    damage.put(path, "layers", number.to_bytes(8, "big"), None)
    repair(path)
    with Pool.open(path, background=False) as pool:
        layer = pool.create_layer("new", "64M")
        for chunk in range(2000):
            layer.pwrite(b"x", chunk * CHUNK + 77)
        content = layer.pread(2000 * CHUNK, 0)
    assert content.count(b"\0") == len(content) - 2000
