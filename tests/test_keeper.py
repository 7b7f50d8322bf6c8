"""The keeper's program by itself: what it keeps for a successor, and what it does when none comes. With a pool: test_survival.py."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
from commandline import wait_until
from conftest import needs_root

from thinpool.exports.keeping import keeper as keeper_program
from thinpool.exports.keeping.link import KeeperLink

pytestmark = needs_root()


def test_what_nobody_goes_on_with_is_taken_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper's program, watching a process that is killed, and that has no successor."""
    monkeypatch.setattr(keeper_program, "SUCCESSOR_SECONDS", 0.2)
    victim = subprocess.Popen(["sleep", "600"])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reading, writing = os.pipe()
    keeper_program.send(ours, {"keep": "pipe"}, [writing])
    os.close(writing)
    victim.kill()
    victim.wait()
    keeper_program.Keeper(str(tmp_path), theirs, victim.pid).run()
    assert not (tmp_path / "keeper.sock").exists()
    ours.close()
    os.close(reading)


def test_a_successor_gets_what_was_kept_and_others_do_not(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = KeeperLink(str(run))
    try:
        reading, writing = os.pipe()
        first.keep("pipe", [reading, writing])
        first.keep("other", [reading])
        first.drop("other")
        wait_until((run / "keeper.sock").exists)
        assert KeeperLink.claim(str(run)) is None
        first.survive(None, lambda: None)
    finally:
        first.close()
    assert KeeperLink.claim(str(run)) is None
    os.close(reading)
    os.close(writing)
