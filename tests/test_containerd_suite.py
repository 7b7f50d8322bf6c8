"""containerd's own tests of snapshotters, in Go, against ``thinpool snapshotter`` (tests/go)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gotests
import pytest
from commandline import wait_until
from conftest import missing

import thinpool
from thinpool.containerd.service import Service

CASES = 21

lacking = gotests.lacking() or missing("mkfs.ext4", "debugfs", root=True)
pytestmark = pytest.mark.skipif(lacking is not None, reason=lacking or "")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a pool, of which nothing is left in use."""
    directory = tmp_path_factory.mktemp("suite")
    thinpool.Pool.create(directory / "pool").close()
    yield directory
    service = Service(lambda: thinpool.connect(directory / "pool", server=True), str(directory / "last"))  # deletes what a killed one could not
    with thinpool.connect(directory / "pool") as pool:
        wait_until(lambda: pool.attachments() == [])
    service.close()
    wait_until(lambda: not (directory / "pool" / "server.sock").exists())  # it ends when nothing is attached any more


@pytest.mark.parametrize("killed", ["", "1"], ids=["", "killed-between-cases"])
def test_containerds_own_tests_pass(place: Path, killed: str) -> None:
    environment = {
        **os.environ,
        "THINPOOL": f"{sys.executable} -m thinpool.cli",
        "THINPOOL_POOL": str(place / "pool"),
        "SNAPSHOTTER_SOCKET": str(place / "sock"),
        "SNAPSHOTTER_KILLED": killed,
        "TMPDIR": str(place),
    }
    # One after the other: each case has the keys of all to itself.
    command = [gotests.compiled(), "-test.run=TestSnapshotter", "-test.v", "-test.parallel=1", "-test.timeout=500s", "-test.root"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=gotests.ROOT, env=environment)
    ended = re.findall(r"^    --- (\w+): TestSnapshotter/(\w+)", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(ended) == CASES
    assert [one for one in ended if one[0] != "PASS"] in ([], [("SKIP", "Rename")])  # which containerd 1.6 skips
