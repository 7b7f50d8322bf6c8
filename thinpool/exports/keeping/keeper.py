"""The keeper: watches a pool's process, keeps what that gave it for a successor, and takes everything down if none comes.

::

                    ended in order, or killed and kept nothing
    WATCHING ------------------------------------------------------> take down, end
     |    ^                                                              ^
     |    +-- claimed --+                                                | nobody came
     |                  |                                                |
     +-- killed, or left, and kept something ----> ORPHANED -------------+

What it keeps are descriptors, by name: whatever they stand for (the connection of the FUSE tree, listening sockets, the pool's lock, the
notes of what is not committed) lives on while no process serves it. Who is killed is started anew by the command that it left, if any.

Messages are JSON objects over a Unix socket that keeps them apart (SOCK_SEQPACKET), with descriptors beside them. From the pool's process:
``{"keep": name}`` with descriptors (in place of older ones of that name), ``{"drop": name}``, ``{"restart": command}``, ``{"up": true}``:
it serves, ``{"end": true}``: it has taken everything down itself. A successor connects to ``keeper.sock`` in the run directory and says
``{"claim": takeover}``. It is answered ``{"kept": {name: count}}`` with all descriptors in that order, or ``{"refused": pid}`` where a process
is there that does not make room for it; with ``takeover`` true that is told ``{"leave": true}``, and the answer comes when it has left.

It holds the lock ``keeper.lock`` in the run directory while it lives, so that nobody meets its clean-up half way. It has a session of its own, so that
signals to the process group of the pool's process do not reach it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import takedown

SOCKET_NAME = "keeper.sock"
MESSAGE_BYTES = 64 << 10
DESCRIPTORS_MAX = 253  # in one message (SCM_MAX_FD, include/net/scm.h)
SUCCESSOR_SECONDS = 30.0  # how long a pool without a process is kept
_FAILED_STARTS_MAX = 5  # in a row
_QUICK_SECONDS = 1.0
_CHECK_MS = 1000
_CLAIM_SECONDS = 5.0

Message = dict[str, Any]


def send(channel: socket.socket, message: Message, descriptors: list[int] | None = None) -> bool:
    """Sends one message; false where nobody is there to get it."""
    try:
        socket.send_fds(channel, [json.dumps(message).encode()], descriptors or [])
    except OSError:
        return False
    return True


def receive(channel: socket.socket) -> tuple[Message, list[int]] | None:
    """The next message with its descriptors; ``None``: there will be none."""
    try:
        data, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    return (json.loads(data), descriptors) if data else None


class Keeper:
    """The process that is watched, what it gave, and who waits for it."""

    def __init__(self, run_directory: str, channel: socket.socket, pid: int) -> None:
        self._run = run_directory
        self._kept: dict[str, list[int]] = {}
        self._restart: list[str] | None = None
        self._listener: socket.socket | None = None
        self._waiting: socket.socket | None = None  # a successor, until the present process has left
        self._failed_starts = 0
        self._watch_process(channel, pid)

    def run(self) -> None:
        """Until there is nothing to keep any more."""
        while self._watch():
            if not self._find_successor():
                break
        takedown.take_down(self._run)
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._run, SOCKET_NAME))  # also a killed keeper's: nobody else is here while the lock is held

    # --- while a process is there ---

    def _watch_process(self, channel: socket.socket, pid: int) -> None:
        self._channel: socket.socket | None = channel
        self._pid = pid
        self._up_since = 0.0  # monotonic; 0: it does not serve yet
        self._process = -1  # what it said before it ended is still to be read
        with contextlib.suppress(ProcessLookupError):
            self._process = os.pidfd_open(pid)

    def process_has_ended(self) -> None:
        """There is nothing to watch."""
        if self._process >= 0:
            os.close(self._process)
            self._process = -1

    def _watch(self) -> bool:
        """Waits for the end of the process. True: it leaves something to a successor."""
        while True:
            poller = select.poll()
            for source in (self._channel, self._listener, self._waiting):
                if source is not None:
                    poller.register(source, select.POLLIN)
            if self._process >= 0:
                poller.register(self._process, select.POLLIN)
            ready = [descriptor for descriptor, _ in poller.poll(_CHECK_MS if self._process >= 0 else 0)]
            if self._channel is not None and self._channel.fileno() in ready:
                if not self._take_message():
                    return False
            elif self._listener is not None and self._listener.fileno() in ready:
                self._answer_claim(self._listener)
            elif self._waiting is not None and self._waiting.fileno() in ready:
                self._waiting.close()  # it has given up
                self._waiting = None
            # Killed while it waits for its own files, it cannot end until somebody answers.
            elif self._process < 0 or self._process in ready or _is_doomed(self._pid):
                break
        self.process_has_ended()
        if self._channel is not None:
            self._channel.close()
        return bool(self._kept)

    def _take_message(self) -> bool:
        """False: the process has ended in order."""
        assert self._channel is not None
        received = receive(self._channel)
        if received is None:  # closed; a child may live on with a copy of it, so that its end is what counts
            self._channel.close()
            self._channel = None
            return True
        message, descriptors = received
        if "keep" in message:
            self._forget(message["keep"])
            self._kept[message["keep"]] = descriptors
            if self._listener is None:
                self._listener = _listen(self._run)
        elif "drop" in message:
            self._forget(message["drop"])
        elif "restart" in message:
            self._restart = message["restart"]
        elif "up" in message:
            self._up_since = time.monotonic()
        return "end" not in message

    def _forget(self, name: str) -> None:
        for descriptor in self._kept.pop(name, []):
            os.close(descriptor)

    def _answer_claim(self, listener: socket.socket) -> None:
        claimant, takeover = _claim(listener)
        if claimant is None:
            return
        if not takeover or self._waiting is not None or self._channel is None or not send(self._channel, {"leave": True}):
            send(claimant, {"refused": self._pid})
            claimant.close()
            return
        self._waiting = claimant

    # --- while none is there ---

    def _find_successor(self) -> bool:
        """Hands all that is kept to the next process; false: none came in time."""
        if "fuse" not in self._kept:
            takedown.take_down_tree(self._run)  # nobody can serve that any more
        waiting, self._waiting = self._waiting, None
        if waiting is not None and self._hand_over(waiting):
            return True
        self._failed_starts = 0 if self._up_since else self._failed_starts + 1
        if self._failed_starts == _FAILED_STARTS_MAX:
            return False
        if self._restart is not None:
            if time.monotonic() - self._up_since < _QUICK_SECONDS:
                time.sleep(_QUICK_SECONDS / 2)  # one that always fails at once shall not fail all the time
            subprocess.Popen(self._restart, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True).wait()
        listener, deadline = self._listener, time.monotonic() + SUCCESSOR_SECONDS
        assert listener is not None
        while (left := deadline - time.monotonic()) > 0:
            if select.select([listener], [], [], left)[0]:
                claimant, _ = _claim(listener)
                if claimant is not None and self._hand_over(claimant):
                    return True
        return False

    def _hand_over(self, claimant: socket.socket) -> bool:
        claimant.setblocking(True)
        everything = [descriptor for descriptors in self._kept.values() for descriptor in descriptors]
        if not send(claimant, {"kept": {name: len(descriptors) for name, descriptors in self._kept.items()}}, everything):
            claimant.close()
            return False
        self._watch_process(claimant, _peer_pid(claimant))
        return True


def _listen(run_directory: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    directory = os.open(run_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    mask = os.umask(0o177)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET_NAME, dir_fd=directory)
        listener.bind(f"/proc/self/fd/{directory}/{SOCKET_NAME}")  # a socket's path may have 107 bytes at most
        listener.listen()
    finally:
        os.umask(mask)
        os.close(directory)
    return listener


def _claim(listener: socket.socket) -> tuple[socket.socket | None, bool]:
    """Somebody who wants to be the successor, and whether also of a process that is still there."""
    claimant, _ = listener.accept()
    claimant.settimeout(_CLAIM_SECONDS)
    received = receive(claimant)
    if received is None or "claim" not in received[0]:
        claimant.close()
        return None, False
    return claimant, bool(received[0]["claim"])


def _peer_pid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def _is_doomed(pid: int) -> bool:
    """True once SIGKILL is pending: the threads that serve the tree are gone, or about to be, and none runs a further instruction of its program."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    return any(int(mask, 16) & 1 << signal.SIGKILL - 1 for mask in re.findall(r"^(?:Sig|Shd)Pnd:\t(\w+)", status, re.MULTILINE))


def main() -> None:
    """Arguments: the run directory, and the process to watch, which started this one; standard input is the line to it."""
    run_directory, pid = sys.argv[-2], int(sys.argv[-1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which whoever is started would inherit
    keeper = Keeper(run_directory, socket.socket(fileno=os.dup(0)), pid)
    if os.getppid() != pid:  # it has ended already, and the pid may be somebody else's
        keeper.process_has_ended()
    keeper.run()
