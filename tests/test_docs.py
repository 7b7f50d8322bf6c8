"""The examples in README.md and docs/ do what they say.

A page is one session in a fresh directory: its ``console`` blocks are typed into a shell and must print what the page
shows, its ``python`` blocks run as programs. Numbers (sizes, times, device names) may differ; ``...`` stands for anything.
A command that fails on the page (its output begins with ``thinpool:``) must fail. Other blocks (``sh``, ``text``) are
only for reading. ``rootfs.tar.gz``, a small root file system, is there to be imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from commandline import Command, make_rootfs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_NEEDS_ROOT = re.compile(r"thinpool (attach|mount|run|import rootfs)")
_END = "=====end of step====="


@dataclass
class Step:
    """A command or program, what it must print (None: anything), and whether it must succeed."""

    script: str
    expected: str | None
    succeeds: bool = True


def steps_of(page: Path) -> list[Step]:
    steps = []
    for kind, body in _BLOCK.findall(page.read_text()):
        if kind == "python":
            steps.append(Step(f"python3 - <<'END OF PROGRAM'\n{body}END OF PROGRAM", None))
            continue
        for typed in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            script, _, expected = typed.partition("\n")
            while script.endswith("\\"):
                more, _, expected = expected.partition("\n")
                script = f"{script}\n{more.removeprefix('> ')}"
            steps.append(Step(script, expected, not expected.startswith("thinpool: ")))
    return steps


def pattern_of(expected: str) -> re.Pattern[str]:
    """The regular expression that an output must match: blanks, numbers and ``...`` are taken loosely."""
    pattern = re.escape(" ".join(expected.split()))
    pattern = re.sub(r"\d+(\\\.\d+)?[KMGTP]?\b", r"\\d+(\\.\\d+)?[KMGTP]?", pattern)
    return re.compile(pattern.replace(r"\.\.\.", ".*"))


def run_session(steps: list[Step], directory: Path, environment: dict[str, str]) -> list[tuple[int, str]]:
    """Status and output of each step, all typed into one shell."""
    script = "".join(f"{step.script}\nprintf '\\n%s %s\\n' '{_END}' $?\n" for step in steps)
    done = subprocess.run(
        ["bash"], input=script, cwd=directory, env=environment, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    parts = re.split(rf"\n?{_END} (\d+)\n", done.stdout)
    return list(zip(map(int, parts[1::2]), parts[0::2], strict=False))


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rootfs(tmp_path_factory.mktemp("rootfs"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_work(page: Path, tmp_path: Path, tarball: Path) -> None:
    steps = steps_of(page)
    if not steps:
        return
    if os.geteuid() != 0 and any(_NEEDS_ROOT.search(step.script) for step in steps):
        pytest.skip("needs root: the page mounts layers or runs containers")
    (tmp_path / "bin").mkdir()
    for name, words in (("thinpool", "-m thinpool.cli"), ("python3", "")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    (work / "rootfs.tar.gz").symlink_to(tarball)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    environment.pop("THINPOOL_POOL", None)
    try:
        outcomes = run_session(steps, work, environment)
    finally:
        take_down(work)
    assert len(outcomes) == len(steps)
    for step, (status, output) in zip(steps, outcomes, strict=True):
        assert (status == 0) == step.succeeds, f"$ {step.script}\n{output}"
        if step.expected is not None:
            assert pattern_of(step.expected).fullmatch(" ".join(output.split())), f"$ {step.script}\n{output}instead of\n{step.expected}"


def take_down(directory: Path) -> None:
    """What a page that failed half-way has left in use."""
    for lock in directory.rglob("server.sock"):
        command = Command(lock.parent.parent)
        for used in command.json("ps", "--pool", str(lock.parent)):
            command.start("umount" if used["mountpoint"] else "detach", used["layer"], "--pool", str(lock.parent))


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
