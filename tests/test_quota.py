"""Quotas of the host's file system: what holds for a full disk holds where a quota is used up. In a guest, whose kernel has XFS with quotas.

That of a directory tree (a project) XFS tells as if it were the disk: ENOSPC, and statvfs(2) knows. Of a user's only the call that fails tells, with EDQUOT.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import needs_root, needs_tool
from guesttests import in_guest
from test_full_disk import (  # noqa: F401 - the same, on other disks
    MIB,
    SmallDisk,
    mounted,
    run,
    test_a_full_disk_stops_nobody_but_who_needs_space,
    test_a_pool_opens_on_a_full_disk_and_frees_it,
    test_the_trash_goes_before_a_writer_is_refused_and_full_is_told,
)

pytestmark = [needs_root(), needs_tool("linux.uml", "gcc", "busybox", "mkfs.xfs", "xfs_quota"), in_guest("loop")]

LIMITED = 12345  # a project, or a user


@pytest.fixture(params=["project", "user"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path, 320 * MIB, "mkfs.xfs", "-q", options="loop,uquota,pquota") as path:
        if request.param == "project":
            run("xfs_quota", "-x", "-c", f"project -s -p {path} {LIMITED}", "-c", f"limit -p bhard=60m {LIMITED}", path)
            yield SmallDisk(path)
        else:
            run("xfs_quota", "-x", "-c", f"limit -u bhard=60m {LIMITED}", path)
            yield SmallDisk(path, owner=LIMITED)
