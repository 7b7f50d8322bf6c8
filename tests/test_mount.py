"""File systems on layers: mounted, snapshotted while in use, checked, unmounted."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest
from commandline import wait_until
from conftest import needs_root, needs_tool
from outofsight import written_out_of_sight

import thinpool
from thinpool import exports

pytestmark = [needs_root(), needs_tool("mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair", "fstrim")]

MIB = 1 << 20
SIZE = 320 * MIB  # the smallest that mkfs.xfs takes is 300 MiB
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}


def make_filesystem(pool: thinpool.Pool, kind: str, name: str = "disk", sector_size: int = 512) -> thinpool.Layer:
    layer = pool.create_layer(name, SIZE)
    subprocess.run([f"mkfs.{kind}", "-q", layer.attach(sector_size=sector_size).device], check=True)
    layer.detach()
    return layer


def check(layer: thinpool.Layer, kind: str) -> None:
    device = layer.attach().device
    checked = subprocess.run([*CHECK[kind], device], capture_output=True, text=True, check=False)
    layer.detach()
    assert checked.returncode == 0, checked.stdout + checked.stderr


def is_trimmed(directory: Path) -> bool:
    os.sync()
    return subprocess.run(["fstrim", directory], check=False).returncode == 0


@pytest.fixture(params=["ext4", "xfs"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "mnt"
    made.mkdir()
    return made


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_files_stay(pool: thinpool.Pool, directory: Path, kind: str, sector_size: int) -> None:
    layer = make_filesystem(pool, kind, sector_size=sector_size)
    attachment = layer.mount(directory)
    assert (attachment.purpose, attachment.mountpoint) == ("mount", str(directory))
    assert os.path.ismount(directory)
    (directory / "file").write_bytes(os.urandom(5 * MIB))
    content = (directory / "file").read_bytes()
    layer.unmount()
    assert list(directory.iterdir()) == []
    check(layer, kind)
    layer.mount(directory)
    assert (directory / "file").read_bytes() == content


def test_snapshots_under_load_are_sound(pool: thinpool.Pool, directory: Path, tmp_path: Path, kind: str) -> None:
    layer = make_filesystem(pool, kind)
    layer.mount(directory)
    (directory / "first").write_bytes(b"synced")
    os.sync()
    stop = threading.Event()

    def work() -> None:
        i = 0
        while not stop.is_set():
            (directory / f"file{i % 50}").write_bytes(os.urandom(100_000))
            if i % 3 == 0:
                (directory / f"file{i % 50}").unlink()
            if i % 20 == 0:
                os.sync()
            i += 1

    worker = threading.Thread(target=work)
    worker.start()
    snapshots = []
    for i in range(3):
        stop.wait(0.3)
        snapshots.append(layer.snapshot(f"snap{i}"))
    stop.set()
    worker.join()
    clone_directory = tmp_path / "clone"
    clone_directory.mkdir()
    for i, snapshot in enumerate(snapshots):
        clone = snapshot.clone(f"clone{i}")
        clone.mount(clone_directory)  # replays the journal
        assert (clone_directory / "first").read_bytes() == b"synced"
        (clone_directory / "own").write_bytes(b"own")
        clone.unmount()
        check(clone, kind)
    assert not (directory / "own").exists()


def test_a_sealed_layer_is_mounted_read_only(pool: thinpool.Pool, directory: Path, kind: str) -> None:
    layer = make_filesystem(pool, kind)
    layer.mount(directory)
    (directory / "file").write_bytes(b"content")
    layer.unmount()
    layer.seal()
    layer.mount(directory)
    assert (directory / "file").read_bytes() == b"content"
    with pytest.raises(OSError) as raised:
        (directory / "new").touch()
    assert raised.value.errno == errno.EROFS
    layer.unmount()
    with pytest.raises(thinpool.LayerState, match="clone"):
        layer.mount(directory, read_only=False)


def test_deleting_files_gives_space_back(pool: thinpool.Pool, directory: Path, kind: str) -> None:
    layer = make_filesystem(pool, kind)
    layer.mount(directory)
    (directory / "large").write_bytes(os.urandom(64 * MIB))
    os.sync()
    full = layer.usage().mapped
    (directory / "large").unlink()
    wait_until(lambda: is_trimmed(directory) and layer.usage().mapped < full - 56 * MIB)  # XFS takes its time with deleted files


def test_an_unmount_of_a_busy_file_system_says_who_is_in_it(pool: thinpool.Pool, directory: Path) -> None:
    layer = make_filesystem(pool, "ext4")
    layer.mount(directory)
    sleeper = subprocess.Popen(["sleep", "60"], cwd=directory)
    with pytest.raises(thinpool.LayerBusy, match=rf"sleep \(pid {sleeper.pid}\)"):
        layer.unmount()
    assert [one.layer for one in pool.attachments()] == ["disk"]
    sleeper.kill()
    sleeper.wait()
    layer.unmount()


def test_closing_the_pool_unmounts_under_whoever_is_in_it(pool: thinpool.Pool, directory: Path) -> None:
    make_filesystem(pool, "ext4").mount(directory)
    sleeper = subprocess.Popen(["sleep", "60"], cwd=directory)
    pool.close()
    assert not os.path.ismount(directory)
    sleeper.kill()
    sleeper.wait()


def test_what_was_unmounted_by_hand_is_no_trouble(pool: thinpool.Pool, directory: Path) -> None:
    layer = make_filesystem(pool, "ext4")
    layer.mount(directory)
    subprocess.run(["umount", directory], check=True)
    layer.unmount()
    assert pool.attachments() == []


def test_it_is_busy_while_it_is_being_unmounted(pool: thinpool.Pool, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, unmount = make_filesystem(pool, "ext4"), exports.unmount_filesystem
    layer.mount(directory)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(mountpoint: str, device: str) -> None:
        begun.set()
        go_on.wait(30)
        unmount(mountpoint, device)

    monkeypatch.setattr(exports, "unmount_filesystem", slowly)
    thread = threading.Thread(target=layer.unmount)
    thread.start()
    assert begun.wait(30)
    for use in (layer.unmount, layer.detach, layer.attach, lambda: layer.mount(directory)):
        with pytest.raises(thinpool.LayerBusy):
            use()
    go_on.set()
    thread.join()
    assert pool.attachments() == []
    with pytest.raises(thinpool.LayerState, match="not mounted"):
        layer.unmount()


def test_a_containers_directory_is_made_and_removed(pool: thinpool.Pool) -> None:
    layer = make_filesystem(pool, "ext4")
    directory = pool.path / "run" / "containers" / "web"
    attachment = layer.mount(directory)
    assert (attachment.purpose, attachment.container) == ("run", "web")
    with pytest.raises(thinpool.LayerBusy, match="container web"):
        layer.delete()
    layer.unmount()
    assert not directory.exists()


def test_it_goes_when_its_owner_ends_even_if_busy(pool: thinpool.Pool, directory: Path) -> None:
    layer = make_filesystem(pool, "ext4")
    owner = subprocess.Popen(["sleep", "60"])
    layer.mount(directory, owner=owner.pid)
    with open(directory / "file", "wb"):
        owner.kill()
        owner.wait()
        wait_until(lambda: pool.attachments() == [])
        assert not os.path.ismount(directory)


def test_what_cannot_be_mounted_leaves_nothing(pool: thinpool.Pool, directory: Path, tmp_path: Path) -> None:
    empty = pool.create_layer("empty", MIB)
    with pytest.raises(thinpool.LayerState, match="no ext4 or XFS"):
        empty.mount(directory)
    with pytest.raises(thinpool.ToolFailed, match="directory"):
        make_filesystem(pool, "ext4").mount(tmp_path / "missing")
    broken = make_filesystem(pool, "ext4", "broken")
    broken.pwrite(b"\xff" * 16, 1024)
    with pytest.raises(thinpool.ToolFailed, match="broken"):
        broken.mount(directory)
    assert pool.attachments() == []


def test_what_was_written_out_of_sight_is_kept_when_the_pool_is_closed(pool_path: Path, directory: Path) -> None:
    with thinpool.Pool.create(pool_path) as pool:
        with written_out_of_sight(make_filesystem(pool, "ext4").attach().device, directory):
            pool.close()
    with thinpool.Pool.open(pool_path) as pool:
        pool.layer("disk").mount(directory)
        assert (directory / "file").read_text() == "not synced"
        pool.layer("disk").unmount()
