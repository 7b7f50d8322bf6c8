"""The guard: a small process that takes down what this one leaves behind when it dies without a word (takedown.py).

It holds the lock ``run/guard.lock`` while it lives, so that a pool's next process waits for it and never meets a
predecessor's clean-up half way. If the guard was killed as well, the next process does its work.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time

from ..errors import ToolFailed
from . import takedown

_PATIENCE_SECONDS = 10.0


class Guard:
    """The guard of this process and one pool's run directory."""

    def __init__(self, run_directory: str) -> None:
        """Waits for an earlier guard, clears what an earlier process left, and starts the guard. Raises ToolFailed."""
        os.makedirs(run_directory, mode=0o700, exist_ok=True)
        lock = os.open(os.path.join(run_directory, "guard.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _take(lock, run_directory)
            takedown.take_down(run_directory)
            command = [sys.executable, "-I", "-S", takedown.__file__, run_directory, str(os.getpid())]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
                pass_fds=(lock,),
            )
        finally:
            os.close(lock)  # the guard has it now

    def close(self) -> None:
        """Ends the guard; there should be nothing left for it to do."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _take(lock: int, run_directory: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ToolFailed(f"an earlier process of this pool is still being cleared away (fuser {run_directory}/guard.lock)") from None
        time.sleep(0.02)
