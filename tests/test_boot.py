"""A virtual machine that lives on a layer: QEMU boots firmware, boot loader, kernel and root file system from it over NBD."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import needs_root, needs_tool

import thinpool

MIB = 1 << 20
KERNEL = next((Path(__file__).parent.parent / ".venv/unpacked/boot").glob("vmlinuz-*"), None)

INIT = """#!/bin/busybox sh
if [ -e /written ]; then
    echo "the second time: $(busybox cat /written)"
    busybox mount -t proc proc /proc
    busybox mount -o remount,ro /
    busybox poweroff -f
fi
echo 'by the first' >/written
busybox sync
busybox reboot -f
"""
# The disk has no partitions: its first sector is the boot loader's, which ext4 leaves alone. NVMe, as the kernel needs no module for that.
EXTLINUX = """SERIAL 0
DEFAULT linux
LABEL linux
LINUX vmlinuz
APPEND root=/dev/nvme0n1 rootfstype=ext4 rw init=/init console=ttyS0 quiet
"""


def run(*words: str | Path) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


def make_bootable(layer: thinpool.Layer, directory: Path, kernel: Path) -> None:
    """The smallest system that boots; the layer was used before."""
    layer.pwrite(os.urandom(layer.size), 0)
    run("mkfs.ext4", "-q", "-E", "nodiscard", "-O", "^64bit,^metadata_csum", layer.attach().device)  # which extlinux can read
    layer.detach()
    directory.mkdir()
    layer.mount(directory)
    try:
        for name in ("bin", "boot", "dev", "proc"):
            (directory / name).mkdir()
        shutil.copy("/bin/busybox", directory / "bin/busybox")
        shutil.copy(kernel, directory / "boot/vmlinuz")
        (directory / "boot/extlinux.conf").write_text(EXTLINUX)
        (directory / "init").write_text(INIT)
        (directory / "init").chmod(0o755)
        run("extlinux", "--install", directory / "boot")
    finally:
        layer.unmount()


@needs_root()
@needs_tool("qemu-system-x86_64", "extlinux", "busybox", "mkfs.ext4", "e2fsck")
@pytest.mark.skipif(KERNEL is None, reason="needs a kernel in .venv/unpacked/boot (./dev test unpacks it)")
def test_a_machine_boots_from_a_layer_writes_reboots_and_sees_it(pool: thinpool.Pool, tmp_path: Path) -> None:
    assert KERNEL is not None
    base = pool.create_layer("base", 64 * MIB)
    make_bootable(base, tmp_path / "mnt", KERNEL)
    siblings = [base.snapshot("snap"), base.clone("other")]
    before = base.pread(base.size, 0)
    disk = base.clone("machines/disk")
    pool.serve_nbd(f"unix:{tmp_path}/nbd.sock")
    drive = f"file=nbd+unix:///machines%2Fdisk?socket={tmp_path}/nbd.sock,format=raw,if=none,id=disk"
    words = f"qemu-system-x86_64 -accel tcg -m 256 -nodefaults -no-user-config -display none -serial stdio -drive {drive} -device nvme,drive=disk,serial=1"
    done = subprocess.run(words.split(), check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-2].strip() == "the second time: by the first", done.stdout
    run("e2fsck", "-fn", disk.attach().device)
    assert all(one.pread(one.size, 0) == before for one in (base, *siblings))
