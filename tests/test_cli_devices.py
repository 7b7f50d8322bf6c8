"""The verbs that outlive their process: block devices, mounts and containers, through the pool's server.

All need root: loop devices, mounts and namespaces.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import Command, make_rootfs, wait_until
from conftest import needs_root, needs_tool

import thinpool
from thinpool.server.client import RemotePool

pytestmark = [needs_root(), needs_tool("mkfs.ext4", "e2fsck")]


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rootfs(tmp_path_factory.mktemp("rootfs"))


def in_use(directory: Path) -> list[str]:
    """Mounts and loop devices of this host that have to do with a directory."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line]
    loops = [str(file) for file in Path("/sys/block").glob("loop*/loop/backing_file") if str(directory) in file.read_text()]
    return mounts + loops


def server_pid(command: Command) -> int:
    with thinpool.connect(command.pool) as pool:
        assert isinstance(pool, RemotePool)
        return pool.server_pid


def has_stopped(command: Command) -> bool:
    return not (command.pool / "server.sock").exists()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    made = Command(tmp_path)
    made("init")
    yield made
    for used in made.json("ps"):
        made("umount" if used["mountpoint"] else "detach", used["layer"])
    wait_until(lambda: has_stopped(made))
    wait_until(lambda: in_use(tmp_path) == [])


def test_a_device_outlives_the_verb(command: Command) -> None:
    command("create", "disk", "64M")
    device = command("attach", "disk").strip()
    assert Path(device).is_block_device()
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    assert command.json("ps") == [{"layer": "disk", "device": device, "mountpoint": None, "purpose": "attach", "owner": 0, "container": None}]
    assert command.json("ls")[0]["used_by"] == [device]
    refused = command.start("rm", "disk")
    assert refused.returncode == 4 and device in refused.stderr
    command("detach", device)
    assert command.json("ps") == []
    wait_until(lambda: has_stopped(command))
    command("export", "disk", "disk.img")
    subprocess.run(["e2fsck", "-fn", command.directory / "disk.img"], check=True, capture_output=True)


def test_devices_and_mountpoints_have_many_names(command: Command) -> None:
    here = command.directory
    command("create", "disk", "64M")
    (here / "device").symlink_to(command("attach", "disk").strip())
    subprocess.run(["mkfs.ext4", "-q", here / "device"], check=True)
    command("detach", "./device")
    (here / "real/mnt").mkdir(parents=True)
    (here / "link").symlink_to("real")
    for given in ("real/mnt", "link/mnt/", "link/../real/./mnt", here / "link/mnt"):
        command("mount", "disk", "link/mnt")
        command("umount", given)
    gone = ["sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; "$@" attach disk && "$@" detach disk', "sh", *command.words()]
    subprocess.run(gone, env=command.environment, cwd=here, check=True, capture_output=True)
    assert command.json("ps") == []


def test_attach_says_more_to_programs(command: Command) -> None:
    command("create", "disk", "64M")
    attached = command.json("attach", "disk", "--sector-size", "4096")
    sectors = Path("/sys/block", Path(attached["device"]).name, "queue/logical_block_size").read_text()
    assert attached["layer"] == "disk" and sectors == "4096\n"


def test_a_base_is_mounted_and_cloned(command: Command, tarball: Path) -> None:
    command("import", tarball, "--name", "base", "--size", "256M")
    assert [layer["name"] for layer in command.json("ls")] == ["base"]
    assert [layer["sealed"] for layer in command.json("ls", "--all")] == [True, True]
    command("clone", "base", "web")
    places = {name: command.directory / name for name in ("base", "web")}
    for name, place in places.items():
        place.mkdir()
        command("mount", name, place)
    (places["web"] / "etc/motd").write_text("hello\n")
    assert not (places["base"] / "etc/motd").exists()
    with pytest.raises(OSError, match="Read-only"):
        (places["base"] / "etc/motd").write_text("no\n")
    users = {used["layer"]: used["mountpoint"] for used in command.json("ps")}
    assert users == {name: str(place) for name, place in places.items()}
    command("umount", places["web"])
    command("umount", "base")
    command("mount", "web", places["web"], "--read-only")
    assert (places["web"] / "etc/motd").read_text() == "hello\n"
    command("umount", "web")


def test_run_gives_what_the_command_gives(command: Command, tarball: Path) -> None:
    command("import", tarball, "--name", "base", "--size", "256M")
    script = "cat; echo written > /etc/new; echo loud >&2; exit 7"
    done = subprocess.run(
        command.words("run", "base", "--name", "box", "--", "sh", "-c", script),
        env=command.environment, input="through\n", check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (7, "through\n", "loud\n")
    assert command("run", "box", "--rm", "--", "cat", "/etc/new") == "written\n"
    assert [layer["name"] for layer in command.json("ls")] == ["base", "box"]


def test_run_that_cannot_start_is_125(command: Command, tarball: Path) -> None:
    done = command.start("run", "nope", "--", "true")
    assert done.returncode == 125
    assert done.stderr.startswith("thinpool: ") and "nope" in done.stderr and done.stderr.count("\n") == 1


def test_a_running_container_is_seen_and_kept(command: Command, tarball: Path) -> None:
    command("import", tarball, "--name", "base", "--size", "256M")
    running = subprocess.Popen(
        command.words("run", "base", "--rm", "--name", "box", "--", "cat"),
        env=command.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdin is not None and running.stdout is not None
    running.stdin.write("ready\n")
    running.stdin.flush()
    assert running.stdout.readline() == "ready\n"
    (used,) = command.json("ps")
    assert (used["layer"], used["purpose"], used["container"]) == ("box", "run", "box")
    refused = command.start("rm", "box")
    assert refused.returncode == 4 and "box" in refused.stderr
    command("rm", "base")  # the container goes on without its parent's name
    running.communicate("more\n", timeout=60)
    assert running.returncode == 0
    wait_until(lambda: command.json("ls") == [])


def test_sigterm_takes_everything_down(command: Command) -> None:
    command("create", "disk", "64M")
    command("create", "disk2", "64M")
    device = command("attach", "disk").strip()
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    command("detach", "disk")
    place = command.directory / "place"
    place.mkdir()
    command("mount", "disk", place)
    command("attach", "disk2")
    (place / "file").write_text("kept")
    os.kill(server_pid(command), signal.SIGTERM)
    wait_until(lambda: has_stopped(command))
    wait_until(lambda: in_use(command.directory) == [])
    command("mount", "disk", place)
    assert (place / "file").read_text() == "kept"


def test_an_attachment_goes_with_its_owner(command: Command) -> None:
    command("create", "disk", "64M")
    owner = subprocess.Popen(["sleep", "600"])
    with thinpool.connect(command.pool, server=True) as pool:
        pool.layer("disk").attach(owner=owner.pid)
    assert command.json("ps")[0]["owner"] == owner.pid
    owner.kill()
    owner.wait()
    wait_until(lambda: command.json("ps") == [])
