"""What works without root, and what is said where the kernel asks for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from commandline import Command, make_rootfs
from conftest import needs_tool

pytestmark = needs_tool("unshare", "mke2fs")


class UnprivilegedCommand(Command):
    """``thinpool`` by a user who is not root: in a user namespace when the tests are run by root."""

    def words(self, *arguments: str | Path) -> list[str]:
        as_user = ["unshare", "--user", "--map-user=1000"] if os.geteuid() == 0 else []
        return [*as_user, *super().words(*arguments)]


@pytest.fixture
def command(tmp_path: Path) -> UnprivilegedCommand:
    made = UnprivilegedCommand(tmp_path)
    made("init")
    return made


def make_image(directory: Path) -> Path:
    image = directory / "disk.img"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", image, "16M"], check=True)
    return image


def test_layers_and_images_need_no_root(command: UnprivilegedCommand) -> None:
    image = make_image(command.directory)
    command("import", image)
    command("clone", "disk", "c1")
    command("snapshot", "c1", "c1@1")
    command("reset", "c1", "--to", "disk")
    command("export", "c1", "out.img")
    assert (command.directory / "out.img").read_bytes() == image.read_bytes()
    assert [layer["name"] for layer in command.json("ls")] == ["disk", "c1", "c1@1"]
    command("serve")
    command("rm", "c1")
    assert [layer["name"] for layer in command.json("ls")] == ["disk", "c1@1"]


def test_what_needs_root_says_so(command: UnprivilegedCommand) -> None:
    make_rootfs(command.directory)
    (command.directory / "here").mkdir()
    command("import", make_image(command.directory), "--name", "a")
    for code, arguments in (
        (7, ("attach", "a")),
        (7, ("mount", "a", "here")),
        (7, ("import", "rootfs.tar.gz", "--fs", "xfs")),
        (125, ("run", "a", "--", "true")),
    ):
        found, line = command.fails(*arguments)
        assert (found, arguments) == (code, arguments), line
        assert "root" in line and "without" in line.lower()
    assert command.json("ps") == []
    assert [layer["name"] for layer in command.json("ls")] == ["a"]
    assert not (command.pool / "run" / "layers").is_mount()
