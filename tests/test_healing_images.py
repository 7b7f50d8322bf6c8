"""``repair --heal-from IMAGE``: an image's layers are pulled into a pool of their own beside the data, which goes again, whatever happens."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import damage
import pytest
from commandline import Command, wait_until
from conftest import needs_tool
from imageworld import registry
from test_checksums import flip, places_in
from test_healing import contents, damaged

import thinpool
from thinpool import Pool

pytestmark = needs_tool("docker-registry")
CHUNK = 65536


class World:
    """A registry with an image of two layers, and a pool that it was pushed from, with file systems of a size that is not the default."""

    def __init__(self, directory: Path, address: str) -> None:
        self.directory, self.image = directory, f"{address}/app:1"
        rng = random.Random(1)
        for name in ("one", "two"):
            (directory / name).write_bytes(rng.randbytes(1_000_000))
        with tarfile.open(directory / "root.tar", "w") as archive:
            archive.add(directory / "one", "one")
        with Pool.create(directory / "pool") as pool:
            pool.images.load(directory / "root.tar", "base", size="48M")
            pool.containers.create("base", name="work")
            pool.containers.copy_in(directory / "two", "work", "/two")
            pool.images.commit("work", self.image)
            self.digest = f"{address}/app@{pool.images.push(self.image)}"
            pool.containers.remove("work")
            pool.compute_digests()
        self.right = contents(directory / "pool")

    def command(self, directory: Path) -> Command:
        """On a copy of the pool."""
        command = Command(directory)
        damage.copy_pool(self.directory / "pool", command.pool)
        return command

    @property
    def requests(self) -> int:
        """Blobs that the registry was asked for."""
        return (self.directory / "registry.log").read_text().count("GET /v2/app/blobs")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("images")
    with registry(directory) as address:
        yield World(directory, address)


@pytest.mark.parametrize("served", [False, True])
def test_an_image_heals_its_layers_and_archives(world: World, tmp_path: Path, served: bool) -> None:
    command = world.command(tmp_path)
    chunks = damaged(command.pool, 20)
    names = {name for chunk in chunks for name, _ in places_in(command.pool, chunk)}
    assert any(name.startswith("blob/") for name in names) and any(name.startswith("sha256:") for name in names)
    if served:
        with thinpool.connect(command.pool, server=True):
            told = command("repair", "--heal-from", world.image)
    else:
        told = command("repair", "--heal-from", world.digest)
    assert told.startswith("nothing to repair\n") and "no source" not in told
    assert contents(command.pool) == world.right
    assert not (command.pool / "healing").exists()


def test_nothing_is_pulled_that_cannot_help(world: World, tmp_path: Path) -> None:
    command = world.command(tmp_path)
    before = world.requests
    assert command("repair", "--heal-from", world.image) == "nothing to repair\nnothing to heal\n"
    with Pool.create(tmp_path / "other") as pool:
        layer = pool.create_layer("a", "1M")
        layer.pwrite(b"a" * 100_000, 0)
        layer.seal()
        pool.compute_digests()
    assert world.requests == before
    damaged(tmp_path / "other", 1)
    with Pool.open(tmp_path / "other", background=False) as pool:
        assert len(pool.heal([], images=[world.image]).left) == 1
    wait_until(lambda: world.requests > before)  # it is logged when it is answered
    assert world.requests == before + 1, "its configuration, and no layer"


def test_what_fails_leaves_nothing_behind(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = world.command(tmp_path)
    damaged(command.pool, 5)
    with Pool.open(command.pool, background=False) as pool:
        with pytest.raises(thinpool.RegistryError):
            pool.heal([], images=[world.image.replace("app", "nothing")])
        with pytest.raises(thinpool.BadReference):
            pool.heal([], images=["UPPER"])
        monkeypatch.setattr("thinpool.poolfiles.PoolFiles.free", lambda _: 1 << 20)
        with pytest.raises(thinpool.OutOfSpace, match="no room beside the pool"):
            pool.heal([], images=[world.image])
        monkeypatch.undo()
        assert not (command.pool / "healing").exists()
        assert not pool.heal([], images=[world.image]).left
    assert contents(command.pool) == world.right


def test_what_a_killed_process_leaves_goes_when_the_pool_is_opened(world: World, tmp_path: Path) -> None:
    command = world.command(tmp_path)
    damaged(command.pool, 5)
    healing = f"""
import os, signal, sys
from pathlib import Path
from thinpool import Pool
with Pool.open({str(command.pool)!r}) as pool:
    def progress(done, total):
        if Path({str(command.pool)!r}, "healing", "data").exists():
            os.kill(os.getpid(), signal.SIGKILL)
    pool.heal([], images=[{world.image!r}], progress=progress)
"""
    assert subprocess.run([sys.executable, "-c", healing], check=False).returncode == -signal.SIGKILL
    assert (command.pool / "healing" / "data").exists()
    Pool.open(command.pool, read_only=True).close()
    assert (command.pool / "healing").exists(), "whoever only reads changes nothing"
    Pool.open(command.pool, background=False).close()
    assert not (command.pool / "healing").exists()


def test_sources_on_this_host_come_first(world: World, tmp_path: Path) -> None:
    command = world.command(tmp_path)
    with Pool.open(command.pool, read_only=True) as pool:
        (name,) = [layer.name for layer in pool.layers() if layer.name.startswith("thinpool/blank/")]
        chunk = pool.layer(name).handle.chunk_at(0)
    assert chunk is not None
    flip(command.pool, chunk, CHUNK, random.Random(1))
    (tmp_path / "app").write_bytes(world.right[name])
    before = world.requests
    command("repair", "--heal-from", world.image, "--heal-from", "app")
    assert world.requests == before
    assert contents(command.pool) == world.right
