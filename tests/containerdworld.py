"""A containerd of our own, with a pool as its snapshotter: both are processes that can be killed and started again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import thinpool
from thinpool.server.client import RemotePool

PROGRAMS = ("containerd", "ctr", "runc", "mkfs.ext4", "debugfs")
_CONFIGURATION = """version = 2
root = "{0}/containerd"
state = "{0}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{0}/containerd.sock"
"""
_PLUGIN = """[proxy_plugins.thinpool]
type = "snapshot"
address = "{0}/snapshotter.sock"
"""


def run(*command: str | Path, check: bool = True, **environment: str) -> str:
    """A program's output; where it must succeed, and does not, what it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **environment})
    assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class World:
    """The processes in a directory, and how to talk to them."""

    def __init__(self, directory: Path, *, configured: bool) -> None:
        self.directory = directory
        self.pool_path = directory / "pool"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        (directory / "containerd.toml").write_text((_CONFIGURATION + (_PLUGIN if configured else "")).format(directory))

    def start_snapshotter(self) -> None:
        """Returns when containerd would be answered."""
        command = [sys.executable, "-m", "thinpool.cli", "--pool", self.pool_path, "snapshotter", "--address", self.directory / "snapshotter.sock"]
        process = self._start("snapshotter", command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline(), self.log("snapshotter")
        if "containerd" in self._processes:  # which tries again after some seconds
            self._wait_for("snapshotter", "snapshots", "--snapshotter", "thinpool", "list")

    def start_containerd(self) -> None:
        """Returns when it answers."""
        self._start("containerd", ["containerd", "--config", self.directory / "containerd.toml"], stdout=None)
        self._wait_for("containerd", "version")

    def _wait_for(self, name: str, *words: str) -> None:
        deadline = time.monotonic() + 60
        while subprocess.run(self.ctr_words(*words), capture_output=True, check=False).returncode != 0:
            assert self._processes[name].poll() is None and time.monotonic() < deadline, self.log(name)
            time.sleep(0.05)

    def _start(self, name: str, command: list[str | Path], stdout: int | None) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log if stdout is None else stdout, stderr=log)
        self._processes[name] = process
        return process

    def log(self, name: str) -> str:
        """What a process has said."""
        return (self.directory / f"{name}.log").read_text()[-5000:]

    def stop(self, name: str) -> None:
        """Ends one of them as a service manager does."""
        self._end(name, kill=False)

    def kill(self, name: str) -> None:
        """Ends one of them without a warning."""
        self._end(name, kill=True)

    def _end(self, name: str, *, kill: bool) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.kill() if kill else process.terminate()
            process.wait(60)
            if process.stdout is not None:
                process.stdout.close()

    def server_pid(self) -> int:
        """The process that has the pool open."""
        with RemotePool(self.pool_path) as pool:
            return pool.server_pid

    def ctr_words(self, *words: str | Path, namespace: str = "default") -> list[str]:
        """The words of a command of ``ctr``."""
        return ["ctr", "--address", str(self.directory / "containerd.sock"), "--namespace", namespace, *map(str, words)]

    def ctr(self, *words: str | Path, namespace: str = "default", check: bool = True) -> str:
        """What ``ctr`` prints."""
        environment = {"CONTAINERD_SNAPSHOTTER": "thinpool"}
        return run(*self.ctr_words(*words, namespace=namespace), check=check, **environment)

    def run_container(self, image: str, name: str, *command: str, namespace: str = "default") -> str:
        """What a new container prints."""
        return self.ctr("run", "--rm", image, name, *command, namespace=namespace)

    def start_container(self, image: str, name: str) -> None:
        """A container that stays."""
        self.ctr("run", "--detach", "--null-io", image, name, "/bin/busybox", "sleep", "1000")

    def execute(self, name: str, script: str) -> str:
        """What a shell in a container prints. Seen once on a busy machine: ``ctr`` gave nothing of it; so the shell keeps it, and is asked again."""
        script = f"{{ {script}\n}} > /run/said && echo end >> /run/said && cat /run/said"
        for _ in range(10):
            said = self.ctr("tasks", "exec", "--exec-id", f"exec-{time.monotonic_ns()}", name, "/bin/sh", "-c", script)
            if said.endswith("end\n"):
                return said.removesuffix("end\n")
            script = "cat /run/said"
        raise AssertionError(f"not the end of what it said: {said!r}")

    def end_task(self, name: str) -> None:
        """Kills what runs in a container."""
        self.ctr("tasks", "kill", "--signal", "KILL", name, check=False)
        deadline = time.monotonic() + 60
        while name in self.ctr("tasks", "list", "--quiet").split():
            assert time.monotonic() < deadline
            self.ctr("tasks", "delete", name, check=False)

    def delete_container(self, name: str) -> None:
        """Takes a container away."""
        self.end_task(name)
        self.ctr("containers", "delete", name)

    def remove_all(self) -> None:
        """Takes all containers, images and snapshots away."""
        for namespace in self.ctr("namespaces", "list", "--quiet").split():
            images = self.ctr("images", "list", "--quiet", namespace=namespace).split()
            if images:
                self.ctr("images", "remove", "--sync", *images, namespace=namespace)


@contextmanager
def world(directory: Path, *, configured: bool = True) -> Iterator[World]:
    """containerd, with a new pool as its snapshotter if ``configured``; nothing of them is left afterwards, even if the test has failed."""
    here = World(directory, configured=configured)
    try:
        if configured:
            thinpool.Pool.create(here.pool_path).close()
            here.start_snapshotter()
        here.start_containerd()
        yield here
    finally:
        for namespace in here.ctr("namespaces", "list", "--quiet", check=False).split():
            for name in here.ctr("containers", "list", "--quiet", namespace=namespace, check=False).split():
                here.ctr("tasks", "delete", "--force", name, namespace=namespace, check=False)
                here.ctr("containers", "delete", name, namespace=namespace, check=False)
        here.stop("containerd")
        here.stop("snapshotter")
        with thinpool.connect(here.pool_path, server=True) as pool:
            for used in pool.attachments():
                subprocess.run(["umount", "--all-targets", used.device], check=False, capture_output=True)
                pool.layer(used.layer).detach()
        shutil.rmtree(directory / "containerd", ignore_errors=True)
