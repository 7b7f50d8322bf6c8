"""``run`` and ``container start`` as processes: what is an option of ours and what a word of the command, and whose status it is.

They need root, for mounts and namespaces.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import Command
from conftest import needs_root, needs_tool

import thinpool

pytestmark = [needs_root(), needs_tool("busybox")]
APPLETS = ("sh", "cat", "echo", "id", "pwd", "hostname", "env", "false")


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    made = Command(tmp_path)
    made("init")
    with tarfile.open(tmp_path / "root.tar", "w") as archive:
        archive.add("/bin/busybox", "bin/busybox")
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
        for name in ("etc", "proc", "sys", "dev", "work"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(directory)
    made("load", "root.tar", "--tag", "box:1", "--size", "256M")
    with thinpool.connect(made.pool, server=True):  # one server for all the verbs of a test
        yield made


def test_options_stand_before_the_image_or_before_two_dashes(command: Command) -> None:
    for words, printed in {
        ("run", "--rm", "box:1", "echo", "-n", "--rm", "--", "x"): "--rm -- x",
        ("run", "--rm", "box:1", "--", "echo", "--rm"): "--rm\n",
        ("run", "box:1", "--rm", "--", "echo", "--", "x"): "-- x\n",
        ("run", "--rm", "--entrypoint", "echo", "box:1", "--name", "x"): "--name x\n",
    }.items():
        assert command(*words) == printed, words
    assert command.json("container", "ls") == []


def test_how_the_command_runs_is_said_by_options(command: Command) -> None:
    command.environment["PASSED"] = "on"
    options = ["-e", "SAID=so=so", "-e", "PASSED", "--env", "ABSENT", "-u", "7:8", "-w", "/work", "--hostname", "somewhere", "--size", "512M"]
    script = "echo $SAID $PASSED [$ABSENT] $(id -u):$(id -g) $(pwd) $(hostname)"
    printed = command("run", "--name", "kept", *options, "box:1", "sh", "-c", script)
    assert printed == "so=so on [] 7:8 /work somewhere\n"
    (kept,) = command.json("container", "ls")
    assert (kept["name"], kept["virtual"], kept["running"]) == ("kept", 512 << 20, False)


def test_a_container_is_started_again_and_keeps_what_was_written(command: Command) -> None:
    command("container", "create", "--name", "again", "box:1", "sh", "-c", "echo more >> /data; cat /data; exit 3")
    for printed in ("more\n", "more\nmore\n"):
        done = command.start("container", "start", "again")
        assert (done.returncode, done.stdout) == (3, printed)
    assert command("container", "start", "again", "cat", "/data") == "more\nmore\n"
    assert command("cp", "again:/data", "data") == ""
    assert (command.directory / "data").read_text() == "more\nmore\n"


def test_copies_run_at_once_and_the_first_status_that_is_not_0_counts(command: Command) -> None:
    script = "echo $THINPOOL_COPY > /mine; echo I am $(cat /mine); test $THINPOOL_COPY != 2"
    done = command.start("run", "--rm", "--copies", "3", "--name", "test", "box:1", "--", "sh", "-c", script)
    assert (done.returncode, done.stderr) == (1, "")
    assert sorted(done.stdout.splitlines()) == [f"test-{number} | I am {number}" for number in (1, 2, 3)]
    assert command.json("container", "ls") == []


def test_what_keeps_a_command_from_running_is_125(command: Command) -> None:
    command("container", "create", "--name", "taken", "box:1")
    for words, said in {
        "run nope true": "nope",
        "run --name taken box:1 true": "taken",
        "run box:1": "command",
        "container start nope": "nope",
    }.items():
        code, line = command.fails(*words.split())
        assert (code, words) == (125, words) and said in line
    for words in ("run", "run -e =x box:1 true", "run --copies 0 box:1 true", "run --frobnicate box:1", "container start"):
        assert (command.fails(*words.split())[0], words) == (125, words)
    assert command.fails("container", "create", "--frobnicate")[0] == 2
