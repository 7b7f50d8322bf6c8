"""The power of a whole machine is cut, again and again: a pool on ext4 on the disk of a guest that is killed while it works (umlhost.py).

What the guest's kernel had not written is lost. The disk is then mounted here, which replays its journal, and the pool must open at once and
hold what a flush acknowledged; the next guest goes on with it. ``--power-cuts`` says how often.
"""

from __future__ import annotations

import random
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import powerload
import pytest
import umlhost
from conftest import needs_root, needs_tool
from powerdisk import format_with_pool, mounted

pytestmark = [needs_root(), needs_tool("linux.uml", "gcc", "busybox", "mkfs.ext4", "e2fsck", "mount")]

ROOT = Path(__file__).parent.parent
NO_END = 1_000_000_000
FLUSHES_MAX = 12
SECONDS_PAST_FLUSH_MAX = 0.3


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    format_with_pool(disk)
    yield disk
    disk.unlink()


def test_flushed_is_there_after_power_cuts(disk: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model: powerload.Model = {}
    for seed in range(int(request.config.getoption("--power-cuts"))):
        acknowledged = work_until_cut(disk, tmp_path / f"told-{seed}", seed)
        with mounted(disk) as place:
            model = powerload.verify(place / "pool", model, seed, acknowledged)


def work_until_cut(disk: Path, directory: Path, seed: int) -> int:
    """Boots a guest that works on the pool, and kills it at a random moment. Returns the number of the last step known to be flushed."""
    directory.mkdir()
    told, rng = directory / "told", random.Random(seed)
    flushes, past = rng.randrange(FLUSHES_MAX), rng.random() * SECONDS_PAST_FLUSH_MAX
    moment: list[float] = []

    def cut() -> bool:
        if not moment and told.exists() and told.read_text().count("\n") > flushes:
            moment.append(time.monotonic() + past)
        return bool(moment) and time.monotonic() >= moment[0]

    words = [sys.executable, "-B", "tests/powerload.py", "/mnt/disk/pool", str(seed), str(NO_END), f"{umlhost.HOST}/told"]
    script = f"mkdir disk && mount -t ext4 /dev/ubda disk && cd {shlex.quote(str(ROOT))} && PYTHONPATH=. {shlex.join(words)}"
    ended = umlhost.run(script, directory=directory, disks=[disk], cut=cut)
    assert moment and ended.status is None, ended
    return max((int(line) for line in told.read_text().splitlines()[1:]), default=-1)
