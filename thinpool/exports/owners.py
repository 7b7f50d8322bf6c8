"""Watching processes end: what a process asked for is taken down when it does not live any more.

One thread sleeps on a pidfd for each process watched (pidfd_open(2)), so neither polling nor a reused pid is a problem.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from ..errors import LayerState

Use = TypeVar("Use")


def process_identity(pid: int) -> str | None:
    """The pid with its start time, which together name a process for good (proc(5), ``/proc/pid/stat``); ``None``: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{pid}:{fields[19]}"


class Owners(Generic[Use]):
    """Calls ``ended(use)`` for each use whose process has ended, from a thread of its own."""

    def __init__(self, ended: Callable[[Use], None]) -> None:
        self._ended = ended
        self._lock = threading.Lock()
        self._watched: dict[int, Use] = {}  # uses by pidfd
        self._dropped: list[int] = []  # pidfds for the thread to close: until it has, their numbers are not given out again
        self._closing = False
        self._thread: threading.Thread | None = None
        self._wake_reader, self._wake_writer = os.pipe()

    def watch(self, pid: int, use: Use) -> None:
        """Watch a process. Raises :class:`~thinpool.errors.LayerState` where there is none of that pid."""
        try:
            descriptor = os.pidfd_open(pid)
        except (OSError, OverflowError) as error:  # the latter: no pid is that large
            raise LayerState(f"no process {pid} to own it: {error}") from error
        with self._lock:
            self._watched[descriptor] = use
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="thinpool-owners", daemon=True)
                self._thread.start()
        os.write(self._wake_writer, b"w")

    def forget(self, use: Use) -> None:
        """Watch no more for a use."""
        if self._closing:
            return
        with self._lock:
            for descriptor in [one for one, watched in self._watched.items() if watched is use]:
                del self._watched[descriptor]
                self._dropped.append(descriptor)
        os.write(self._wake_writer, b"w")

    def close(self) -> None:
        """End the thread; nobody is watched any more."""
        self._closing = True
        os.write(self._wake_writer, b"w")
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for descriptor in (*self._watched, *self._dropped, self._wake_reader, self._wake_writer):
            os.close(descriptor)

    def _run(self) -> None:
        while not self._closing:
            poller = select.poll()
            poller.register(self._wake_reader, select.POLLIN)
            with self._lock:
                while self._dropped:
                    os.close(self._dropped.pop())
                for descriptor in self._watched:
                    poller.register(descriptor, select.POLLIN)
            for descriptor, _ in poller.poll():
                if descriptor == self._wake_reader:
                    os.read(descriptor, 4096)
                    continue
                with self._lock:
                    use = self._watched.pop(descriptor, None)
                    if use is not None:
                        self._dropped.append(descriptor)
                if use is not None:
                    self._ended(use)
