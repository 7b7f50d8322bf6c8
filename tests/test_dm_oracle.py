"""The kernel's dm-thin as an oracle: one script of writes, discards, snapshots, clones and deletes on both, and all bytes compared.

In a guest, as few hosts have the module. The scripts are those of powerload.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import dmioctl
import powerload
import pytest
from conftest import needs_tool
from guesttests import in_guest
from powerload import LAYER_BYTES, Step

import thinpool

pytestmark = [in_guest("loop", "dm-thin-pool"), needs_tool("linux.uml", "gcc", "busybox", "losetup")]

SEEDS = 2
STEPS = 400
CHUNK_BYTES = 64 << 10
DATA_BYTES, METADATA_BYTES = 256 << 20, 8 << 20
BLKDISCARD = 0x1277


def run(*words: str | Path) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


class DmThin:
    """A pool of the kernel's, its layers by name."""

    def __init__(self, directory: Path) -> None:
        self._loops = []
        for name, length in (("metadata", METADATA_BYTES), ("data", DATA_BYTES)):
            with (directory / name).open("wb") as file:
                file.truncate(length)
            self._loops.append(run("losetup", "--show", "-f", directory / name))
        self._device = dmioctl.create("pool", DATA_BYTES // 512, "thin-pool", f"{' '.join(self._loops)} {CHUNK_BYTES // 512} 0")
        self._layers: dict[str, tuple[int, Path]] = {}
        self._next = itertools.count()

    def close(self) -> None:
        for name in [*self._layers, "pool"]:
            dmioctl.remove(name)
        for loop in self._loops:
            run("losetup", "-d", loop)

    def do(self, step: Step) -> None:
        match step.verb:
            case "create":
                self._make(step.name, "create_thin")
            case "snapshot" | "clone":
                dmioctl.suspend(step.source)
                self._make(step.name, "create_snap", str(self._layers[step.source][0]))
                dmioctl.resume(step.source)
            case "delete":
                dmioctl.remove(step.name)
                dmioctl.message("pool", f"delete {self._layers.pop(step.name)[0]}")
            case "write":
                self._write(step.name, step.data, step.offset)
            case "discard":
                self._discard(step.name, step.offset, step.offset + step.length)

    def _make(self, name: str, how: str, *source: str) -> None:
        number = next(self._next)
        dmioctl.message("pool", " ".join([how, str(number), *source]))
        self._layers[name] = number, dmioctl.create(name, LAYER_BYTES // 512, "thin", f"{self._device} {number}")

    def _write(self, name: str, data: bytes, offset: int) -> None:
        with open(self._layers[name][1], "r+b", buffering=0) as device:
            os.pwrite(device.fileno(), data, offset)
            os.fsync(device.fileno())

    def _discard(self, name: str, begin: int, end: int) -> None:
        """The whole chunks in it; dm-thin leaves the rest as it is, so that is written as zeros."""
        first, last = -(-begin // CHUNK_BYTES) * CHUNK_BYTES, end // CHUNK_BYTES * CHUNK_BYTES
        if first >= last:
            self._write(name, bytes(end - begin), begin)
            return
        self._write(name, bytes(first - begin), begin)
        self._write(name, bytes(end - last), last)
        with open(self._layers[name][1], "r+b", buffering=0) as device:
            fcntl.ioctl(device, BLKDISCARD, struct.pack("QQ", first, last - first))

    def read_into(self, name: str, buffer: bytearray) -> None:
        with open(self._layers[name][1], "rb", buffering=0) as device:
            assert device.readinto(buffer) == len(buffer)


@pytest.fixture
def pool_path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "pool"
    shutil.rmtree(tmp_path)  # all of it is in the guest's memory


@pytest.fixture
def dm_thin(pool_path: Path) -> Iterator[DmThin]:
    thin = DmThin(pool_path.parent)
    yield thin
    thin.close()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_layers_hold_what_dm_thin_says(pool: thinpool.Pool, dm_thin: DmThin, seed: int) -> None:
    names: dict[str, bool] = {}
    ours, theirs = bytearray(LAYER_BYTES), bytearray(LAYER_BYTES)
    for number, step in enumerate(itertools.islice(powerload.steps(names, seed), STEPS)):
        powerload.do(pool, step)
        dm_thin.do(step)
        if step.verb == "flush" or number == STEPS - 1:
            for name in names:
                pool.layer(name).pread_into(ours, 0)
                dm_thin.read_into(name, theirs)
                assert ours == theirs, f"{name} after step {number}: {step}"
