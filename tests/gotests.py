"""The Go tests of tests/go, compiled without a network from Debian's packages of containerd's sources."""

from __future__ import annotations

import fcntl
import os
import subprocess
from functools import lru_cache
from pathlib import Path

from conftest import missing

ROOT = Path(__file__).parent.parent
_GO = ROOT / "build" / "go"
_SOURCES = Path("/usr/share/gocode")  # where Debian's packages of Go libraries lie


def lacking() -> str | None:
    """What of it this machine lacks."""
    there = (_SOURCES / "src/github.com/containerd/containerd/snapshots/testsuite").is_dir()
    return missing("go") or (None if there else "needs golang-github-containerd-containerd-dev")


@lru_cache
def compiled() -> Path:
    """The program; what was compiled before is kept below build/."""
    package = _GO / "src" / "snapshots"
    package.parent.mkdir(parents=True, exist_ok=True)
    if not package.is_symlink():
        package.symlink_to(ROOT / "tests" / "go")
    settings = {"GO111MODULE": "off", "GOFLAGS": "", "GOPATH": f"{_GO}:{_SOURCES}", "GOCACHE": str(_GO / "cache"), "CGO_ENABLED": "0"}
    program = _GO / "snapshots.test"
    with (_GO / "lock").open("w") as lock:  # other processes that test wait, and find it compiled
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["go", "test", "-vet=off", "-c", "-o", program, "snapshots"], check=True, cwd=_GO, env={**os.environ, **settings})
    return program
