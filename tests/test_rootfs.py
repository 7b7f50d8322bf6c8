"""Bases from root file system tarballs: complete and sealed, or not there at all."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import needs_root, needs_tool

import thinpool
from thinpool.errors import BadSize, ImportFailed, LayerExists, OutOfSpace
from thinpool.filesystems import blank

pytestmark = [needs_root(), needs_tool("mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair")]

SIZE = "320M"
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}


def rootfs(path: Path, size: int = 200_000) -> Path:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("etc/content")
        info.size = size
        tar.addfile(info, io.BytesIO(os.urandom(size)))
    return path


@pytest.mark.parametrize("kind", CHECK)
def test_clean_sealed_and_cloned(pool: thinpool.Pool, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = rootfs(tmp_path / "a.tar")
    base = pool.import_rootfs(tar, "base", size=SIZE, filesystem=kind)
    monkeypatch.setattr(blank, "run_tool", lambda command: pytest.fail(f"ran {command}"))  # mkfs runs once per pool
    pool.import_rootfs(tar, "second", size=SIZE, filesystem=kind)
    assert base.sealed and base.labels["thinpool.filesystem"] == kind
    base.export_raw(tmp_path / "image")
    checked = subprocess.run([*CHECK[kind], tmp_path / "image"], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    clones = [base.clone(f"clone{number}") for number in range(3)]
    for clone in clones:
        directory = tmp_path / clone.name
        directory.mkdir()
        clone.mount(directory)
        (directory / "own").write_text(clone.name)
    for clone in clones:
        assert (tmp_path / clone.name / "own").read_text() == clone.name
        assert (tmp_path / clone.name / "etc/content").stat().st_size == 200_000
        clone.unmount()


def test_an_ext4_has_no_orphan_file_whatever_the_hosts_defaults(tmp_path: Path) -> None:
    (tmp_path / "conf").write_text("[fs_types]\next4 = {\nfeatures = has_journal,extent,64bit,orphan_file\n}\n")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    command = blank._mkfs_command("ext4", 64 << 20, image)
    subprocess.run(command, check=True, env={**os.environ, "MKE2FS_CONFIG": str(tmp_path / "conf")})
    (compatible,) = struct.unpack_from("<I", image.read_bytes()[1024:2048], 0x5C)
    assert compatible & 0x1000 == 0


def test_failure_leaves_nothing(pool: thinpool.Pool, tmp_path: Path) -> None:
    tar = rootfs(tmp_path / "a.tar", 8 << 20)
    pool.import_rootfs(tar, "base", size=SIZE)
    tar.write_bytes(tar.read_bytes()[: 6 << 20])
    names, allocated = [layer.name for layer in pool.layers()], pool.usage().allocated
    with pytest.raises(ImportFailed, match="content"):
        pool.import_rootfs(tar, "broken", size=SIZE)
    with pytest.raises(LayerExists):
        pool.import_rootfs(tar, "base", size=SIZE)
    with pytest.raises(BadSize):
        pool.import_rootfs(tar, "small", size="1M")
    pool.reclaim()
    assert [layer.name for layer in pool.layers()] == names
    assert pool.usage().allocated == allocated


def test_no_room_in_the_file_system(pool: thinpool.Pool, tmp_path: Path) -> None:
    with pytest.raises(OutOfSpace, match="content"):
        pool.import_rootfs(rootfs(tmp_path / "a.tar", 40 << 20), "base", size="16M")
    assert [layer.name for layer in pool.layers() if not layer.name.startswith("thinpool/blank/")] == []


def test_killed_import_leaves_nothing(pool_path: Path, tmp_path: Path) -> None:
    tar = rootfs(tmp_path / "a.tar", 64 << 20)
    thinpool.Pool.create(pool_path).close()
    code = """
import sys, thinpool
def progress(done, total):
    if done > 32 << 20:
        print("half of it", flush=True)
        sys.stdin.read()
thinpool.Pool.open(sys.argv[1]).import_rootfs(sys.argv[2], "base", size="320M", progress=progress)
"""
    with subprocess.Popen([sys.executable, "-c", code, pool_path, tar], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half of it\n"
        process.send_signal(signal.SIGKILL)
    with thinpool.Pool.open(pool_path) as pool:
        assert {layer.name for layer in pool.layers()} <= {f"thinpool/blank/ext4/{320 << 20}"}
        pool.reclaim()
        assert pool.usage().allocated < 8 << 20


@needs_root()
@needs_tool("mkfs.ext4")
def test_two_imports_at_once_share_one_blank(pool: thinpool.Pool, tmp_path: Path) -> None:
    tarball = tmp_path / "rootfs.tar"
    with tarfile.open(tarball, "w") as tar:
        tar.add(__file__, "file")
    with ThreadPoolExecutor(4) as threads:
        layers = list(threads.map(lambda number: pool.import_rootfs(tarball, f"base{number}", size="64M"), range(4)))
    assert len(pool.layers("thinpool.blank")) == 1
    assert all(layer.sealed for layer in [*layers, *pool.layers("thinpool.blank")])
    assert not pool.layers("thinpool.partial")
