"""Power cuts at every write: dm-log-writes below the pool's file system, in a guest, and its log replayed here up to one entry after another.

Unlike a killed guest's, this disk has a cache that is lost: of what was written since the last flush, any part is there.
``--logged-cuts`` says how many marks, and how many other entries, are tried.
"""

from __future__ import annotations

import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import powerload
import pytest
import umlhost
import writelog
from conftest import needs_root, needs_tool
from powerdisk import format_with_pool, mounted

pytestmark = [needs_root(), needs_tool("linux.uml", "gcc", "busybox", "dmsetup", "mkfs.ext4", "e2fsck", "mount")]

ROOT = Path(__file__).parent.parent
SEED = 1
STEPS = 300
LOG_BYTES = 4 << 30

SCRIPT = """
set -e
export DM_DISABLE_UDEV=1
dmsetup create log --table "0 $(blockdev --getsz /dev/ubda) log-writes /dev/ubda /dev/ubdb"
mkdir disk
mount -t ext4 /dev/mapper/log disk
(cd {root} && PYTHONPATH=. {python} -B tests/powerload.py /mnt/disk/pool {seed} {steps} log)
umount disk
dmsetup remove log
"""


@dataclass(frozen=True)
class Logged:
    """A disk before and after a load, and the log in between."""

    before: Path
    after: Path
    log: Path
    entries: list[writelog.Entry]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    place = tmp_path_factory.mktemp("logged")
    before, after, log = (place / name for name in ("before", "after", "log"))
    format_with_pool(before)
    copy(before, after)
    with log.open("wb") as file:
        file.truncate(LOG_BYTES)
    script = SCRIPT.format(root=shlex.quote(str(ROOT)), python=shlex.quote(sys.executable), seed=SEED, steps=STEPS)
    ended = umlhost.run(script, modules=["dm-log-writes"], disks=[after, log], seconds=120)
    assert ended.status == 0, ended
    yield Logged(before, after, log, writelog.entries(log))
    shutil.rmtree(place)


def copy(disk: Path, new: Path) -> None:
    subprocess.run(["cp", "--sparse=always", disk, new], check=True)


def test_the_whole_log_gives_the_disk(logged: Logged) -> None:
    disk = logged.before.with_name("replayed")
    copy(logged.before, disk)
    writelog.replay(logged.log, logged.entries, disk)
    subprocess.run(["cmp", disk, logged.after], check=True)


def test_flushed_is_there_wherever_the_power_goes(logged: Logged, request: pytest.FixtureRequest) -> None:
    count = int(request.config.getoption("--logged-cuts"))
    rng = random.Random(count)
    marks = [number for number, entry in enumerate(logged.entries, 1) if entry.mark]
    places = {number for some in (marks, range(len(logged.entries))) for number in rng.sample(some, min(count, len(some)))}
    sure, disk, done = logged.before.with_name("sure"), logged.before.with_name("disk"), 0
    copy(logged.before, sure)
    for place in sorted(places):
        flushed, others = writelog.cut(logged.entries, place, rng)
        writelog.replay(logged.log, logged.entries[done:flushed], sure)
        done = flushed
        copy(sure, disk)
        writelog.replay(logged.log, others, disk)
        acknowledged = [int(entry.mark) for entry in logged.entries[:place] if entry.mark and entry.mark.isdecimal()]
        with mounted(disk) as where:
            powerload.verify(where / "pool", {}, SEED, max(acknowledged, default=-1))
