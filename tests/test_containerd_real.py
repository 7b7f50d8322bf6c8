"""containerd itself, with runc, on a pool: images, containers, and what is left when one of the processes is killed."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gotests
import pytest
from commandline import wait_until
from conftest import missing
from containerdworld import PROGRAMS, World, run, world
from imageworld import registry, umoci_image

import thinpool
from thinpool.exports.keeping.link import kernel_can_resend

lacking = missing(*PROGRAMS, "umoci", "skopeo", root=True)
pytestmark = pytest.mark.skipif(lacking is not None, reason=lacking or "")

IMAGE = "example.com/test:1"
AT_ONCE = 50
PAGE = Path(__file__).parent.parent / "docs" / "containerd.md"


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return umoci_image(tmp_path_factory.mktemp("image"), 3)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, layout: Path) -> Iterator[World]:
    """containerd with an image in two namespaces. At the end everything is taken away, and nothing may be left."""
    directory = tmp_path_factory.mktemp("containerd")
    with world(directory) as here:
        with thinpool.connect(here.pool_path) as pool:
            before = pool.usage().allocated
        run("skopeo", "copy", f"oci:{layout}:test", f"oci-archive:{directory}/image.tar:{IMAGE}")
        for namespace in ("default", "other"):
            here.ctr("images", "import", "--snapshotter", "thinpool", directory / "image.tar", namespace=namespace)
        yield here
        here.remove_all()
        with thinpool.connect(here.pool_path) as pool:
            pool.reclaim()
            assert pool.attachments() == []
            assert {layer.name for layer in pool.layers() if layer.name.startswith("containerd/")} == set()
            assert pool.usage().allocated == before
    wait_until(lambda: str(directory) not in run("ps", "-e", "-o", "args"))  # the pool's server ends by itself
    wait_until(lambda: str(directory) not in Path("/proc/self/mounts").read_text())


def test_containers_run_on_devices_of_the_pool(here: World) -> None:
    said = here.run_container(IMAGE, "first", "/bin/sh", "-c", "echo hello; /bin/busybox mount")
    assert said.startswith("hello\n/dev/loop")
    with thinpool.connect(here.pool_path) as pool:
        wait_until(lambda: pool.attachments() == [])


def test_names_in_two_namespaces_are_two_containers(here: World) -> None:
    here.start_container(IMAGE, "same")
    said = here.run_container(IMAGE, "same", "/bin/sh", "-c", "echo other > /file; cat /file", namespace="other")
    assert said == "other\n"
    assert here.execute("same", "cat /file || echo none") == "none\n"
    here.delete_container("same")


def test_fifty_containers_at_once(here: World) -> None:
    names = [f"many-{number}" for number in range(AT_ONCE)]
    with ThreadPoolExecutor(10) as threads:
        list(threads.map(lambda name: here.start_container(IMAGE, name), names))
        said = threads.map(lambda name: here.execute(name, f"[ -e /file ] || echo {name} > /file; cat /file"), names)
        assert list(said) == [f"{name}\n" for name in names]
        with thinpool.connect(here.pool_path) as pool:
            assert len({one.device for one in pool.attachments()}) == AT_ONCE
        list(threads.map(here.delete_container, names))
    here.ctr("content", "prune", "references")  # which collects garbage, too
    with thinpool.connect(here.pool_path) as pool:
        wait_until(lambda: pool.attachments() == [])


def test_what_a_container_changed_can_be_committed(here: World) -> None:
    here.start_container(IMAGE, "changed")
    here.execute("changed", "echo new > /new")
    snapshots = ("snapshots", "--snapshotter", "thinpool")
    tar = subprocess.run(here.ctr_words(*snapshots, "diff", "changed"), capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        assert [entry.name for entry in archive if entry.isfile()] == ["new"]
    here.end_task("changed")
    here.ctr(*snapshots, "commit", "committed", "changed")
    here.ctr(*snapshots, "prepare", "again", "committed")
    assert "Active" in here.ctr(*snapshots, "list")
    command = here.ctr(*snapshots, "mounts", str(here.directory / "mnt"), "again").split()
    (here.directory / "mnt").mkdir()
    run(*command)
    assert (here.directory / "mnt" / "new").read_text() == "new\n"
    run("umount", here.directory / "mnt")
    for key in ("again", "committed"):
        here.ctr(*snapshots, "remove", key)
    here.ctr("containers", "delete", "changed", check=False)


@pytest.mark.parametrize("name", ["containerd", "snapshotter", "server"])
def test_containers_outlive_a_killed_process(here: World, name: str) -> None:
    if name == "server" and not kernel_can_resend():
        pytest.skip("needs Linux 6.9")
    here.start_container(IMAGE, "lives")
    here.execute("lives", "echo before > /file")
    if name == "server":
        os.kill(here.server_pid(), signal.SIGKILL)
    else:
        here.kill(name)
        here.start_containerd() if name == "containerd" else here.start_snapshotter()
    assert here.execute("lives", "echo after >> /file; cat /file") == "before\nafter\n"
    assert here.run_container(IMAGE, "new", "/bin/busybox", "echo", "goes on") == "goes on\n"
    here.delete_container("lives")


def test_a_container_starts_again_with_what_it_had_when_its_device_went_down(here: World) -> None:
    here.start_container(IMAGE, "again")
    here.execute("again", "echo synced > /file; /bin/busybox sync")
    here.end_task("again")
    with thinpool.connect(here.pool_path) as pool:
        (used,) = (one for one in pool.attachments() if one.layer.endswith("/again"))
        pool.layer(used.layer).detach()
    here.ctr("tasks", "start", "--detach", "--null-io", "again")
    assert here.execute("again", "cat /file") == "synced\n"
    here.delete_container("again")


@pytest.mark.skipif(gotests.lacking() is not None, reason=gotests.lacking() or "")
def test_layers_that_the_pool_has_are_not_downloaded(here: World, layout: Path, tmp_path: Path) -> None:
    with thinpool.connect(here.pool_path) as pool, registry(tmp_path) as address:
        image = f"{address}/test:1"
        run("skopeo", "copy", "--dest-tls-verify=false", f"oci:{layout}:test", f"docker://{image}")
        pool.images.load(layout, "known")
        run(gotests.compiled(), "-test.run=TestPull", CONTAINERD_ADDRESS=f"{here.directory}/containerd.sock", IMAGE=image)
        assert here.run_container(image, "one", "/bin/sh", "-c", "echo $GREETING", namespace="pulled") == "hello\n"
        here.ctr("images", "remove", "--sync", image, namespace="pulled")
        pool.images.remove("known")
        pool.images.gc()


_SYSTEMD_RUN = """
import os, pathlib, socket, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):  # --unit=NAME -p NAME=VALUE
    words = words[2 if words[0] == "-p" else 1 :]
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, open(os.devnull, "w") as nothing:
    told.bind("told")
    unit = subprocess.Popen(words, env={**os.environ, "NOTIFY_SOCKET": os.path.abspath("told")}, stdout=nothing, stderr=nothing, start_new_session=True)
    pathlib.Path("unit.pid").write_text(str(unit.pid))
    while "Type=notify" in sys.argv and b"READY=1" not in told.recv(1000):
        pass
"""
STAND_INS = {
    "thinpool": f'exec {sys.executable} -m thinpool.cli "$@"',
    "systemd-run": f'exec {sys.executable} systemd_run.py "$@"',
    "systemctl": '[ "$*" = "restart containerd" ]',  # the test does
}


def test_the_five_commands_of_the_docs(tmp_path: Path, layout: Path) -> None:
    """In a directory in place of the host's, and with a registry on loopback."""
    block = re.search(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    commands = re.findall(r"^(?:.*<<'END'.*\n(?:.*\n)*?END|.+)$", block[1], re.MULTILINE)
    assert len(commands) == 5
    (tmp_path / "bin").mkdir()
    (tmp_path / "systemd_run.py").write_text(_SYSTEMD_RUN)
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CONTAINERD_ADDRESS": f"{tmp_path}/containerd.sock"}
    with registry(tmp_path) as address, world(tmp_path, configured=False) as here:
        run("skopeo", "copy", "--dest-tls-verify=false", f"oci:{layout}:test", f"docker://{address}/test:1")
        places = {
            "/var/lib/thinpool": str(here.pool_path),
            "/run/thinpool.sock": f"{tmp_path}/snapshotter.sock",
            "/etc/containerd/config.toml": f"{tmp_path}/containerd.toml",
            "images pull": "images pull --plain-http",
            "docker.io/library/busybox:latest": f"{address}/test:1",
            " echo ": " /bin/busybox echo ",
        }
        try:
            said = ""
            for command in commands:
                for place, ours in places.items():
                    command = command.replace(place, ours)
                said = run("sh", "-c", f"cd {tmp_path} && {command}", **environment)
                if "systemctl restart containerd" in command:
                    here.stop("containerd")
                    here.start_containerd()
            assert said == "from a thin layer\n"
            here.remove_all()
            with thinpool.connect(here.pool_path) as pool:
                assert pool.attachments() == []
        finally:
            if (tmp_path / "unit.pid").exists():
                os.kill(int((tmp_path / "unit.pid").read_text()), signal.SIGTERM)
