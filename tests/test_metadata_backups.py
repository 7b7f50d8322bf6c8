"""Metadata backups: made by themselves, dropped by count and age, put back."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import damagedpool
import pytest
from commandline import Command, wait_until

from thinpool import Pool
from thinpool import backups as made
from thinpool.backups import backups, make_backup
from thinpool.metadata import Metadata
from thinpool.recovery.repair import restore_metadata


def make(path: Path) -> Path:
    store = Metadata(path / "meta", read_only=True)
    try:
        return make_backup(store)
    finally:
        store.close()


def age(path: Path, seconds: float) -> None:
    os.utime(path, (0, time.time() - seconds))


def test_closing_a_pool_makes_three_backups_soon_and_then_one_an_hour(pool_path: Path) -> None:
    Pool.create(pool_path).close()
    for count, seconds, expected in ((1, 1, 1), (1, 61, 2), (2, 61, 3), (3, 61, 3), (3, 3601, 4)):
        assert len(backups(pool_path)) == count
        age(backups(pool_path)[0], seconds)
        Pool.open(pool_path).close()
        assert len(backups(pool_path)) == expected


def test_a_pool_that_stays_open_makes_them_too(pool_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pool.create(pool_path).close()
    monkeypatch.setattr(made, "_LOOK_SECONDS", 0.01)
    with Pool.open(pool_path) as pool:
        age(backups(pool_path)[0], made.INTERVAL_SECONDS + 1)
        pool.create_layer("a", "1M")
        pool.commit()
        wait_until(lambda: len(backups(pool_path)) == 2)


def test_old_ones_are_dropped_by_count_and_age(pool_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pool.create(pool_path).close()
    monkeypatch.setattr(made, "COUNT_MAX", 3)
    names = [make(pool_path).name for _ in range(5)]
    assert [path.name for path in backups(pool_path)] == names[:1:-1]
    age(backups(pool_path)[-1], made.AGE_MAX_SECONDS + 1)
    names.append(make(pool_path).name)
    assert [path.name for path in backups(pool_path)] == names[:2:-1]


def test_the_newest_is_kept_when_the_clock_was_set_back(pool_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pool.create(pool_path).close()
    monkeypatch.setattr(made, "COUNT_MAX", 2)
    (first,) = backups(pool_path)
    first.rename(ahead := first.with_name("20991231T235959.999999Z"))
    age(ahead, -1e9)
    Pool.open(pool_path).close()  # makes one that is due: from now on, not when the time of the other has come
    new = make(pool_path)
    assert [path.name for path in backups(pool_path)] == [new.name, "21000101T000000.000000Z"]


def test_a_backup_of_a_pool_in_use_is_one_committed_state(tmp_path: Path) -> None:
    command = Command(tmp_path)
    with Pool.create(command.pool) as pool:
        pool.create_layer("a", "1G").pwrite(b"a" * 100000, 0)
        pool.commit()
        command("restore-metadata", "--make")
        pool.layer("a").pwrite(b"b" * 100000, 1 << 20)
    backup = backups(command.pool)[0]
    report = restore_metadata(command.pool, backup).before
    assert (report.corruptions, report.leaks, report.layers) == (0, 0, 1)


def test_what_was_there_when_the_backup_was_made_is_back(tmp_path: Path) -> None:
    command = Command(tmp_path)
    with Pool.create(command.pool) as pool:
        base = pool.create_layer("base", "1G")
        base.pwrite(b"a" * 300000, 5000)
        base.snapshot("base@1")
    backup = make(command.pool)
    with Pool.open(command.pool) as pool:
        pool.create_layer("later", "1G").pwrite(b"l" * 100000, 0)
    (command.pool / "meta/data.mdb").write_bytes(b"\xa5" * 100000)
    assert command.start("repair").returncode == 6
    out = command("restore-metadata", backup.name)
    assert out == f"restored {backup.name}; the metadata that was there is kept in {command.pool}/meta.kept-1\n"
    with Pool.open(command.pool, background=False) as pool:
        assert [layer.name for layer in pool.layers()] == ["base", "base@1"]
        assert pool.layer("base@1").pread(300000, 5000) == b"a" * 300000
        pool.layer("base").pwrite(b"x" * 10**6, 0)
        assert pool.layer("base@1").pread(300000, 5000) == b"a" * 300000
    damagedpool.require_whole(command.pool)


def test_the_list(tmp_path: Path) -> None:
    command = Command(tmp_path)
    Pool.create(command.pool).close()
    (listed,) = command.json("restore-metadata")
    assert (command.pool / "meta.backups" / listed["name"] / "data.mdb").stat().st_size == listed["bytes"]
    assert listed["name"] in command("restore-metadata")


def test_a_backup_that_is_not_there(tmp_path: Path) -> None:
    command = Command(tmp_path)
    Pool.create(command.pool).close()
    code, message = command.fails("restore-metadata", "nothing")
    assert code == 3 and "no metadata backup" in message


def test_a_backup_that_fails_fails_nothing_else(pool_path: Path) -> None:
    Pool.create(pool_path).close()
    shutil.rmtree(pool_path / "meta.backups")
    (pool_path / "meta.backups").write_text("in the way")
    with Pool.open(pool_path) as pool:
        pool.create_layer("a", "1M")
    with Pool.open(pool_path, read_only=True) as pool:
        assert len(pool.layers()) == 1
