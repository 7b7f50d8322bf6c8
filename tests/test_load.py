"""File systems under load on layers, snapshotted meanwhile: each snapshot is as after a power cut, and nothing fsynced is missing."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest
from conftest import needs_root, needs_tool

import thinpool

pytestmark = [needs_root(), needs_tool("mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair")]

CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}
SECONDS, SNAPSHOTS, THREADS = 6.0, 4, 3
KEEP_SIZE_PUNCH_HOLE = 1 | 2  # fallocate(2)
libc = ctypes.CDLL(None)


def step(directory: Path, choose: random.Random) -> None:
    """One random act on one of a few files."""
    path, other = (directory / str(choose.randrange(20)) for _ in range(2))
    act = choose.randrange(6)
    with suppress(FileNotFoundError):
        if act == 0:
            path.rename(other)
        elif act == 1:
            path.unlink()
        else:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            offset = choose.randrange(1 << 20)
            if act == 2:
                os.ftruncate(fd, offset)
            elif act == 3:
                libc.fallocate(fd, KEEP_SIZE_PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(100_000))
            else:
                os.pwrite(fd, choose.randbytes(choose.randrange(1, 150_000)), offset)
            if choose.random() < 0.2:
                os.fsync(fd)
            os.close(fd)


class Load:
    """Threads that each work in a directory of their own, and now and then keep a file that must never be lost."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._stop = directory, threading.Event()
        self.synced: list[tuple[str, bytes]] = []
        self.failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(THREADS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _work(self, number: int) -> None:
        try:
            choose, own = random.Random(number), self._directory / f"own{number}"
            own.mkdir()
            count = 0
            while not self._stop.is_set():
                step(own, choose)
                count += 1
                if count % 20 == 0:
                    self._keep(f"kept-{number}-{count}", choose.randbytes(choose.randrange(1, 50_000)))
        except BaseException as failure:
            self.failures.append(failure)

    def _keep(self, name: str, content: bytes) -> None:
        with open(self._directory / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        directory = os.open(self._directory, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        self.synced.append((name, content))


@pytest.mark.parametrize("kind", CHECK)
def test_snapshots_under_load(pool: thinpool.Pool, tmp_path: Path, kind: str) -> None:
    layer = pool.create_layer("disk", "512M")
    subprocess.run([f"mkfs.{kind}", "-q", layer.attach().device], check=True, timeout=60)
    layer.detach()
    directory = tmp_path / "mnt"
    directory.mkdir()
    layer.mount(directory)
    taken: list[tuple[str, list[tuple[str, bytes]]]] = []
    with Load(directory) as load:
        for number in range(SNAPSHOTS):
            time.sleep(SECONDS / SNAPSHOTS)
            synced = list(load.synced)
            layer.snapshot(f"snapshot{number}")
            taken.append((f"snapshot{number}", synced))
    assert not load.failures
    layer.unmount()
    assert taken[-1][1], "nothing was kept"
    for name, synced in taken:
        clone = pool.layer(name).clone(f"clone-{name}")
        clone.mount(directory)  # replays the journal
        for file, content in synced:
            assert (directory / file).read_bytes() == content, f"{file} of {name}"
        clone.unmount()
        device = clone.attach().device
        checked = subprocess.run([*CHECK[kind], device], capture_output=True, text=True, timeout=120, check=False)
        clone.detach()
        assert checked.returncode == 0, checked.stdout + checked.stderr
