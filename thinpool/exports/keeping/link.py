"""This process's line to its keeper (``keeper``)."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ...errors import ToolFailed
from . import takedown
from .keeper import SOCKET_NAME, Message, receive, send

_LOG = logging.getLogger("thinpool.keeper")
_PATIENCE_SECONDS = 10.0
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from keeping.keeper import main; main()"


def kernel_can_resend() -> bool:
    """Whether the kernel asks a new server what it had asked a killed one (FUSE_NOTIFY_RESEND, Linux 6.9)."""
    major, minor = (int(number) for number in platform.release().split("-")[0].split(".")[:2])
    return (major, minor) >= (6, 9)


class KeeperLink:
    """The keeper of this process and one pool's run directory; what it keeps by name, here and there."""

    def __init__(self, run_directory: str) -> None:
        """Waits for an earlier keeper, clears what an earlier process left, and starts a keeper. Raises ToolFailed."""
        self._prepare(run_directory)
        self._start(clear=True)

    @classmethod
    def claim(cls, run_directory: str, *, takeover: bool = False) -> KeeperLink | None:
        """The keeper that a process before this one had, with all that it keeps; ``None``: there is none, or it keeps it for a process that is there.

        ``takeover``: that one is made to leave first, which is waited for.
        """
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            directory = os.open(run_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                channel.connect(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
            finally:
                os.close(directory)
        except OSError:
            channel.close()
            return None
        send(channel, {"claim": takeover})
        received = receive(channel)
        if received is None or "kept" not in received[0]:
            channel.close()
            return None
        link = cls.__new__(cls)
        link._prepare(run_directory)
        link._channel = channel
        message, descriptors = received
        for name, count in message["kept"].items():
            link._kept[name], descriptors = descriptors[:count], descriptors[count:]
        return link

    def _prepare(self, run_directory: str) -> None:
        self._run = run_directory
        self._lock = threading.Lock()  # of what is kept, and of the channel
        self._kept: dict[str, list[int]] = {}
        self._news: list[Message] = []  # what a keeper must know besides
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    def kept(self, name: str) -> list[int]:
        """The descriptors that are kept under that name; this process has them open, too."""
        return self._kept.get(name, [])

    def keep(self, name: str, descriptors: Sequence[int]) -> None:
        """Keeps these for a successor."""
        with self._lock:
            self._kept[name] = list(descriptors)
            send(self._channel, {"keep": name}, self._kept[name])

    def drop(self, name: str) -> None:
        """Keeps them no more; they stay open here."""
        with self._lock:
            if self._kept.pop(name, None) is not None:
                send(self._channel, {"drop": name})

    def names(self) -> list[str]:
        """What is kept."""
        with self._lock:
            return list(self._kept)

    def survive(self, restart: Sequence[str] | None, on_leave: Callable[[], None]) -> None:
        """This process serves now. Killed, it is to be started anew by that command (``None``: somebody else will); ``on_leave`` is called from
        another thread when a successor waits for it to leave. A keeper that was killed is replaced from now on."""
        with self._lock:
            self._news = [{"restart": None if restart is None else list(restart)}, {"up": True}]
            for message in self._news:
                send(self._channel, message)
        self._thread = threading.Thread(target=self._listen, args=(on_leave,), name="thinpool-keeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the keeper; there should be nothing left for it to do."""
        with self._lock:
            self._closing = True
            send(self._channel, {"end": True})
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
        else:
            self._channel.settimeout(_PATIENCE_SECONDS)
            receive(self._channel)  # nothing: it has closed its end
        self._channel.close()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE_SECONDS)

    def _listen(self, on_leave: Callable[[], None]) -> None:
        while True:
            received = receive(self._channel)
            with self._lock:
                if self._closing:
                    return
                if received is None:
                    try:
                        self._replace()
                    except Exception:
                        _LOG.exception("there is no keeper any more, and none can be started")
                        return
                    continue
            if "leave" in received[0]:
                on_leave()

    def _replace(self) -> None:
        self._channel.close()
        if self._process is not None:
            self._process.wait()
        self._start(clear=False)
        for message in self._news:
            send(self._channel, message)
        for name, descriptors in self._kept.items():
            send(self._channel, {"keep": name}, descriptors)

    def _start(self, *, clear: bool) -> None:
        os.makedirs(self._run, mode=0o700, exist_ok=True)
        lock = os.open(os.path.join(self._run, "keeper.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _take(lock, self._run)
            if clear:
                takedown.take_down(self._run)
            package = Path(__file__).parents[1]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, str(package), self._run, str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
                pass_fds=(lock,),
            )
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
            os.close(lock)  # the keeper has it now


def _take(lock: int, run_directory: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ToolFailed(f"an earlier process of this pool is still being cleared away (fuser {run_directory}/keeper.lock)") from None
        time.sleep(0.02)
