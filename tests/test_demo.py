"""The demo, from a small tarball, does its work and leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from conftest import needs_root, needs_tool

ROOT = Path(__file__).parent.parent
PROGRAMS = ("sh", "cat", "dd", "echo", "hostname", "ls", "rm", "sleep", "wc")


def busybox_tarball(path: Path) -> None:
    busybox = shutil.which("busybox")
    assert busybox is not None
    with tarfile.open(path, "w:gz") as tar:
        for name in ("bin", "etc", "var", "var/tmp", "usr", "usr/share", "usr/share/doc", "proc", "sys", "dev"):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        tar.add(busybox, "bin/busybox")
        for name in PROGRAMS:
            info = tarfile.TarInfo(f"bin/{name}")
            info.type, info.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(info)


def run_demo(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    return subprocess.run(["sh", "docs/examples/demo.sh", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@needs_root()
@needs_tool("busybox", "mkfs.ext4", "e2fsck")
def test_the_demo_with_a_tarball_of_ones_own(tmp_path: Path) -> None:
    tarball = tmp_path / "rootfs.tar.gz"
    busybox_tarball(tarball)
    done = run_demo(tmp_path, str(tarball))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "and the base is gone" in done.stdout
    assert '"this is db", and 0 documents' in done.stdout
    assert list(tmp_path.iterdir()) == [tarball]


@needs_root()
def test_a_demo_that_fails_cleans_up(tmp_path: Path) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"no tarball at all" * 100)
    done = run_demo(tmp_path, str(broken))
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == [broken]
