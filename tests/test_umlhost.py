"""The guest that other tests run in (umlhost.py)."""

from __future__ import annotations

from pathlib import Path

import umlhost
from conftest import needs_tool

pytestmark = needs_tool("linux.uml", "gcc", "busybox")


def test_a_script_runs_as_root_of_another_kernel_and_gives_its_status_and_output(tmp_path: Path) -> None:
    script = "id -u; echo told >&2; ls /dev/mapper/control; echo kept > /mnt/host/file; exit 7"
    ended = umlhost.run(script, modules=["dm-thin-pool"], directory=tmp_path)
    assert (ended.status, ended.output) == (7, "0\ntold\n/dev/mapper/control\n"), ended.console
    assert (tmp_path / "file").read_text() == "kept\n"


def test_a_script_that_takes_too_long_is_ended() -> None:
    ended = umlhost.run("echo begun; sleep 1000", seconds=1)
    assert (ended.status, ended.output) == (None, "begun\n"), ended.console


def test_what_a_guest_flushed_to_its_disk_is_there_when_it_was_killed(tmp_path: Path) -> None:
    disk, told = tmp_path / "disk", tmp_path / "told"
    disk.write_bytes(bytes(1 << 20))
    script = "set -e; printf kept | dd of=/dev/ubda conv=fsync; touch /mnt/host/told; sleep 1000"
    ended = umlhost.run(script, directory=tmp_path, disks=[disk], cut=told.exists)
    assert ended.status is None and told.exists(), ended
    assert disk.read_bytes()[:5] == b"kept\0"
