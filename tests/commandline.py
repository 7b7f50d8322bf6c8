"""``thinpool`` as a process on a pool of its own, for the tests of the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEADLINE_SECONDS = 30.0
PROGRAMS = ("/bin/sh", "/bin/cat", "/bin/ls", "/bin/rm", "/bin/sleep", "/bin/hostname")


def wait_until(what: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    """Returns when ``what`` holds; fails the test if it does not come to hold."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def shared_objects(program: str) -> set[str]:
    """The libraries and the loader that a program of this host needs."""
    words = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout.split()
    return {word for word in words if word.startswith("/")}


def make_rootfs(directory: Path) -> Path:
    """A tarball of a root file system with a shell and a few programs of this host."""
    path = directory / "rootfs.tar.gz"
    files = set(PROGRAMS).union(*map(shared_objects, PROGRAMS))
    with tarfile.open(path, "w:gz", compresslevel=1, dereference=True) as archive:
        for name in ("etc", "proc", "sys", "dev", "tmp"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for file in sorted(files):
            archive.add(file)
    return path


class Command:
    """``thinpool`` on the pool ``directory/pool``, run in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pool = directory / "pool"
        self.environment = {**os.environ, "THINPOOL_POOL": str(self.pool)}
        self.environment.pop("THINPOOL_DEBUG", None)

    def words(self, *arguments: str | Path) -> list[str]:
        """The words of the command."""
        return [sys.executable, "-m", "thinpool.cli", *map(str, arguments)]

    def start(self, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs it to its end, whatever that is."""
        if "stdout" not in options:
            options["capture_output"] = True
        options = {"env": self.environment, "cwd": self.directory, "text": True, "timeout": 120, **options}
        return subprocess.run(self.words(*arguments), check=False, **options)

    def __call__(self, *arguments: str | Path) -> str:
        """What it prints; it must succeed, without a word on standard error."""
        done = self.start(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """What it prints for programs."""
        return json.loads(self(*arguments, "--json"))

    def fails(self, *arguments: str | Path) -> tuple[int, str]:
        """Its exit code and its one line on standard error; it must fail."""
        done = self.start(*arguments)
        assert done.returncode != 0
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("thinpool: "), done.stderr
        return done.returncode, lines[0]
