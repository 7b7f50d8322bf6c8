"""What a service manager gives and wants to know (sd_listen_fds(3), sd_notify(3)); nothing where there is none."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

_FIRST_DESCRIPTOR = 3


def listener() -> socket.socket | None:
    """The socket that it listens on for this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):  # not for children
        os.environ.pop(name, None)
    os.set_inheritable(_FIRST_DESCRIPTOR, False)
    return socket.socket(fileno=_FIRST_DESCRIPTOR)


def say_ready() -> None:
    """It serves now."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, suppress(OSError):
            manager.sendto(b"READY=1\nMAINPID=%d" % os.getpid(), address.replace("@", "\0", 1) if address.startswith("@") else address)
