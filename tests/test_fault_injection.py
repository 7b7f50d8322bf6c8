"""Every call to the disk below and to the store fails once: who asked is told, nobody else, and nothing is lost without a word."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import faultscript
import invariants
import preloads
import pytest
from conftest import needs_tool
from crashworld import Disk, Records, World
from faultscript import CHUNK, Run

from thinpool import Pool
from thinpool.cli import listings
from thinpool.errors import DiskError, OutOfSpace, PoolFailed

SHORT = 0


class FaultyWorld(World):
    """A world in which one call to disk or store fails, and the power stays on."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        super().__init__(directory, CHUNK, self.rng)
        self.disk, self.records = _FaultyDisk(self), _FaultyRecords(self, CHUNK)
        (directory / "data").touch()  # usage() asks the host what it takes
        self.failed_call = ""
        self.fault, self.late = 0, False
        self._calls, self._fail_at, self._counting = 0, 0, False

    def arm(self, at: int, fault: int, *, late: bool) -> None:
        """``late``: the call takes effect, and fails all the same."""
        self.fault, self.late = fault, late
        self._calls, self._fail_at, self._counting = 0, at, True

    def counting(self, on: bool) -> None:
        self._counting = on

    def call(self, name: str) -> bool:
        """True: this is the call that fails."""
        self._calls += self._counting
        if not self._counting or self._calls != self._fail_at:
            return False
        self.failed_call = name
        return True


class _FaultyDisk(Disk):
    _world: FaultyWorld

    def _pread(self, ctx: Any, buffer: Any, length: int, offset: int) -> int:
        if self._world.call("pread"):
            if self._world.fault != SHORT:
                return -self._world.fault
            length = max(1, length // 2)
        return super()._pread(ctx, buffer, length, offset)

    def _pwrite(self, ctx: Any, buffer: Any, length: int, offset: int) -> int:
        fails = self._world.call("pwrite")
        if fails and self._world.fault == SHORT:
            return super()._pwrite(ctx, buffer, max(1, length // 2), offset)
        if not fails or self._world.late:
            done = super()._pwrite(ctx, buffer, length, offset)
        return -self._world.fault if fails else done

    def _punch(self, ctx: Any, offset: int, length: int) -> int:
        fails = self._world.call("punch") and self._world.fault != SHORT
        if not fails or self._world.late:
            super()._punch(ctx, offset, length)
        return -self._world.fault if fails else 0

    def _sync(self, ctx: Any) -> int:
        """As the kernel does it: what could not be written is dropped, and the next sync knows nothing of it."""
        if not self._world.call("sync") or self._world.fault == SHORT:
            return super()._sync(ctx)
        self._unsynced = [change for change in self._unsynced if self._world.rng.random() < 0.5]
        super()._sync(ctx)
        return -self._world.fault

    def _resize(self, ctx: Any, length: int) -> int:
        fails = self._world.call("resize") and self._world.fault != SHORT
        if not fails or self._world.late:
            super()._resize(ctx, length)
        return -self._world.fault if fails else 0

    def _cut(self, ctx: Any, length: int) -> int:
        fails = self._world.call("cut") and self._world.fault != SHORT
        if not fails or self._world.late:
            super()._cut(ctx, length)
        return -self._world.fault if fails else 0


class _FaultyRecords(Records):
    _world: FaultyWorld

    def _fail(self) -> None:
        if self._world.fault != SHORT:
            raise (OutOfSpace if self._world.fault == errno.ENOSPC else DiskError)(os.strerror(self._world.fault))

    def usage(self) -> int:
        return 0

    def fetch(self, kind: int, key: int) -> bytes | None:
        if self._world.call("fetch"):
            self._fail()
        return super().fetch(kind, key)

    def _store(self, changes: Any, *, commit: bool) -> None:
        fails = self._world.call("commit" if commit else "window")
        if fails and not self._world.late:
            self._fail()
        super()._store(changes, commit=commit)
        if fails:
            self._fail()


def once(directory: Path, at: int, fault: int, *, late: bool) -> str:
    """One run with one fault, then a power cut: all that was flushed is there. Which call it was."""
    world = FaultyWorld(directory, at)
    pool = world.open()
    state = faultscript.prepare(pool)
    pool.close()
    pool = world.open()
    world.arm(at, fault, late=late)
    run = Run(pool, state, world)
    run.run()
    assert run.failed == (fault != SHORT and world.failed_call in ("sync", "commit"))
    pool.engine.close()
    world.reboot()
    invariants.check(world.records.of_kind, CHUNK)
    pool = world.open()
    Run.check(pool, run.since)
    pool.engine.close()
    return world.failed_call


@pytest.mark.parametrize(
    ("fault", "late"),
    [(errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, False), (SHORT, False)],
    ids=["EIO", "EIO although done", "ENOSPC", "short"],
)
def test_each_call_to_disk_and_store_fails_once(tmp_path: Path, fault: int, late: bool) -> None:
    for at in itertools.count(1):
        try:
            failed_call = once(tmp_path, at, fault, late=late)
        except BaseException as error:
            error.add_note(f"call {at}")
            raise
        if not failed_call:
            break
    assert at > 40


# --- the real thing: system calls on real files ---


@pytest.fixture(scope="session")
def failing_calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes them fail."""
    return preloads.build("failing_calls", tmp_path_factory.mktemp("faults"))


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory where syncs cost nothing, if there is one."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@needs_tool("gcc")
@pytest.mark.parametrize(
    ("fault", "go_on"),
    [(errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, False), (errno.EINTR, False), (SHORT, False)],
    ids=["EIO", "EIO from then on", "ENOSPC", "EINTR", "short"],
)
def test_each_system_call_fails(quick_disk: Path, failing_calls: Path, fault: int, go_on: bool) -> None:
    tests = str(Path(__file__).parent)
    command = [sys.executable, f"{tests}/faultychild.py", str(quick_disk), str(fault), str(int(go_on))]
    environment = {**os.environ, "LD_PRELOAD": str(failing_calls), "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = done.stdout.splitlines()
    assert len(calls) > 40
    assert {"pread data", "pwrite data", "fdatasync data", "fallocate data", "pwrite data.mdb", "fdatasync data.mdb"} <= set(calls)


# --- error mode: what others see of it ---


def test_a_failed_read_names_the_range_that_could_not_be_read(tmp_path: Path) -> None:
    world = FaultyWorld(tmp_path, 1)
    pool = world.open()
    layer = pool.create_layer("a", 10 * CHUNK)
    layer.pwrite(b"a" * 2 * CHUNK, 2 * CHUNK)
    layer.pwrite(b"a" * CHUNK, 8 * CHUNK)
    world.arm(2, errno.EIO, late=False)
    with pytest.raises(DiskError, match=rf"layer a, offset {8 * CHUNK}, {CHUNK - 100} bytes"):
        layer.pread(8 * CHUNK - 100, CHUNK)
    world.arm(1, errno.EIO, late=False)
    with pytest.raises(DiskError, match=rf"layer a, offset {2 * CHUNK}, {2 * CHUNK} bytes"):
        layer.pread(10 * CHUNK, 0)
    pool.close()


def test_usage_tells_of_a_failed_sync_without_a_commit(tmp_path: Path) -> None:
    world = FaultyWorld(tmp_path, 1)
    pool = world.open()
    layer = pool.create_layer("a", CHUNK)
    layer.pwrite(b"a", 0)
    pool.commit()
    layer.pwrite(b"b", 0)  # in place: the flush has nothing to commit
    assert pool.usage().mode == "normal"
    world.arm(1, errno.EIO, late=False)
    with pytest.raises(DiskError):
        pool.commit()
    usage = pool.usage()
    assert (usage.mode, usage.cause) == ("error", f"a sync of the data failed: {os.strerror(errno.EIO)}")
    assert "open it anew" in usage.way_out
    pool.close()


def test_nobody_does_again_what_a_pool_in_error_mode_noted(pool_path: Path) -> None:
    """Its notes name chunks whose bytes may never have reached the disk: what lay there before may be another layer's."""
    redo = os.memfd_create("thinpool-redo")
    try:
        Pool.create(pool_path).close()
        pool = Pool.open(pool_path, background=False, redo=redo)
        layer = pool.create_layer("a", CHUNK)
        pool.commit()
        layer.pwrite(b"a", 0)
        pool.engine.fail()
        pool.close()
        with pytest.raises(PoolFailed):
            Pool.open(pool_path, background=False, redo=redo)
        with Pool.open(pool_path) as pool:
            assert pool.layer("a").pread(1, 0) == b"\0"
    finally:
        os.close(redo)


def test_df_shows_error_mode_its_cause_and_the_way_out(pool: Pool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A pool of this process, as error mode ends with the process."""
    monkeypatch.setattr(listings, "opened", lambda *_: nullcontext(pool))
    pool.create_layer("a", CHUNK)
    pool.engine.sync = lambda: pool.engine.check(-1)  # type: ignore[method-assign]
    with pytest.raises(PoolFailed):
        pool.commit()
    listings.df(None, as_json=False)  # type: ignore[arg-type]
    _, _, mode, way_out = capsys.readouterr().out.splitlines()
    assert mode.startswith("error mode, reads go on: a commit failed: the host's disk failed")
    assert "open it anew" in way_out
    listings.df(None, as_json=True)  # type: ignore[arg-type]
    assert json.loads(capsys.readouterr().out)["mode"] == "error"
