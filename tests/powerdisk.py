"""A disk of a guest (umlhost.py) with a pool on it: a file with ext4 in it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thinpool import Pool

_DISK_BYTES = 256 << 20


def format_with_pool(disk: Path) -> None:
    """Makes it; the pool is ``pool`` on it, and empty."""
    with disk.open("wb") as file:
        file.truncate(_DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    with mounted(disk) as place:
        Pool.create(place / "pool").close()


@contextmanager
def mounted(disk: Path) -> Iterator[Path]:
    """Where its file system is mounted, the journal replayed. It must be clean afterwards."""
    place = disk.with_suffix(".mounted")
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", disk, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()
    checked = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
