"""The snapshotter as a command: by itself, and within the pool's server."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commandline import Command, wait_until
from conftest import missing
from snapshotclient import Client

import thinpool

lacking = missing("mkfs.ext4", "debugfs", root=True)
pytestmark = pytest.mark.skipif(lacking is not None, reason=lacking or "")


@pytest.fixture
def command(tmp_path: Path) -> Command:
    command = Command(tmp_path)
    command("init")
    return command


@contextmanager
def running(command: Command, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on; ended when this is left, if it has not ended by then."""
    process = subprocess.Popen(command.words(*arguments), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=command.environment)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_devices_outlive_the_snapshotter(command: Command, tmp_path: Path) -> None:
    address = tmp_path / "sock"
    words = ("snapshotter", "--address", str(address), "--size", "1G")
    with running(command, *words) as process, Client(address) as client:
        device = client.device("Prepare", key="a")
        process.terminate()
        assert process.wait(60) == 0
    with running(command, *words), Client(address) as client:
        assert client.device("Mounts", key="a") == device
        client("Remove", key="a")
    wait_until(lambda: not (command.pool / "server.sock").exists())


def test_a_killed_server_of_the_pool_is_started_again(command: Command, tmp_path: Path) -> None:
    with running(command, "snapshotter", "--address", str(tmp_path / "sock"), "--size", "1G"), Client(tmp_path / "sock") as client:
        client.commit("base", tmp_path / "mnt", file=b"content")
        client("Prepare", key="a", parent="base")
        os.kill(int((command.pool / "lock").read_text()), signal.SIGKILL)
        with client.mounted(tmp_path / "mnt", key="a") as root:
            assert (root / "file").read_bytes() == b"content"
        client("Remove", key="a")
        client("Remove", key="base")
    wait_until(lambda: not (command.pool / "server.sock").exists())


def test_the_pools_server_can_be_the_snapshotter(command: Command, tmp_path: Path) -> None:
    with running(command, "serve", "--foreground", "--containerd", str(tmp_path / "sock")), Client(tmp_path / "sock") as client:
        client("Prepare", key="a")
        with thinpool.connect(command.pool) as pool:
            assert [one.layer for one in pool.attachments()] == ["containerd/a"]


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("snapshotter", "--address", "sock", "--fs", "vfat"), 2, "vfat"),
        (("snapshotter", "--address", "sock", "--size", "1M"), 2, "16 MiB"),
        (("snapshotter", "--address", "nowhere/sock"), 2, "cannot listen"),
        (("snapshotter",), 2, "--address"),
        (("serve", "--containerd", "sock"), 2, "--foreground"),
    ],
)
def test_what_cannot_be_is_told(command: Command, arguments: tuple[str, ...], status: int, word: str) -> None:
    code, line = command.fails(*arguments)
    assert (code, word in line) == (status, True), line
