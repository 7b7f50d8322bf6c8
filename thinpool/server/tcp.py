"""The HTTP interface over TCP: with a token, with TLS beyond this machine, and not for other sites' pages in a browser here.

A page from anywhere can send requests to this machine, and have its own name resolve to it (DNS rebinding). So requests without TLS must name
this machine as their host, and requests that tell their origin must come from the very address they go to. The page at ``/`` is
for everybody: what it shows it asks for with the token.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import hmac
import ipaddress
import json
import logging
import os
import secrets
import socket
import ssl
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import uvicorn
from fastapi.concurrency import run_in_threadpool

from ..errors import BadAddress
from ..exports.keeping.link import KeeperLink
from ..exports.nbd.server import bind, resolved
from ..exports.nbd.tls import tls_context
from .answers import refusal
from .wire import TOKEN_NAME

_log = logging.getLogger("thinpool.server")
_KEEP_ALIVE_SECONDS = 75  # of a connection without a request: unlike a local client's, it keeps nothing alive
_TOKEN_CHARACTERS_MIN = 16
_KEPT_PREFIX = "tcp "


def token_of(directory: Path) -> str:
    """The token of the pool in ``directory``; made when there is none. Raises PermissionError where others may read it."""
    path = directory / TOKEN_NAME
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=directory, prefix=f"{TOKEN_NAME}-") as file:  # mode 0600
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileExistsError):  # of two who make one, one does
                os.link(file.name, path)
    if path.stat().st_mode & 0o077:
        raise PermissionError(f"others may read {path}: chmod 600 it, or remove it to have a new token made")
    token = path.read_text().strip()
    if len(token) < _TOKEN_CHARACTERS_MIN:
        raise BadAddress(f"{path} holds no token of {_TOKEN_CHARACTERS_MIN} characters or more: remove it to have one made")
    return token


@dataclass(frozen=True)
class Listener:
    """A socket that listens on TCP at ``address``, and with what TLS."""

    bound: socket.socket
    address: str
    certificates: str | None
    verify_peer: bool

    @property
    def name(self) -> str:
        """What the keeper knows it by: all that a successor needs besides the socket."""
        return _KEPT_PREFIX + json.dumps({"address": self.address, "certificates": self.certificates, "verify_peer": self.verify_peer})

    def context(self) -> ssl.SSLContext | None:
        """How to speak TLS on it. Raises BadAddress."""
        return tls_context(Path(self.certificates) if self.certificates else None, None, verify_peer=self.verify_peer)


def address_of(address: str, certificates: Path | None, *, verify_peer: bool) -> str:
    """``host:port`` as a listener's address. Raises BadAddress where none can be there, also without certificates beyond this machine."""
    if "/" in address or address.startswith("unix:"):
        raise BadAddress(f"HTTP is served on the pool's Unix socket anyway: give host:port, not {address!r}")
    tls_context(certificates, None, verify_peer=verify_peer)
    return resolved(address, has_tls=certificates is not None)[2]


def listener_at(address: str, certificates: Path | None, *, verify_peer: bool, keeper: KeeperLink) -> Listener:
    """Binds ``host:port`` (port 0: any that is free), or takes a duplicate of the socket that ``keeper`` has for it. Raises BadAddress."""
    name = address_of(address, certificates, verify_peer=verify_peer)
    files = os.path.abspath(certificates) if certificates else None
    for kept, its_address in _kept(keeper).items():
        if its_address == name:
            return Listener(_duplicate(keeper, kept), name, files, verify_peer)
    bound, name = bind(address, has_tls=certificates is not None)
    return Listener(bound, name, files, verify_peer)


def _kept(keeper: KeeperLink) -> dict[str, str]:
    """The names of the listeners that it has, and their addresses."""
    return {name: json.loads(name.removeprefix(_KEPT_PREFIX))["address"] for name in keeper.names() if name.startswith(_KEPT_PREFIX)}


def _duplicate(keeper: KeeperLink, kept: str) -> socket.socket:
    return socket.socket(fileno=os.dup(keeper.kept(kept)[0]))


class Guard:
    """ASGI middleware of a TCP listener: lets pass who has the token."""

    def __init__(self, app: Any, token: str, *, has_tls: bool) -> None:
        self._app = app
        self._token = token.encode()
        self._scheme = "https" if has_tls else "http"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refused = self._refused(scope, dict(scope["headers"])) if scope["type"] == "http" else None
        await (refused or self._app)(scope, receive, send)

    def _refused(self, scope: Any, headers: Mapping[bytes, bytes]) -> Any:
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if self._scheme == "http" and not _is_here(host):
            return refusal(403, "PermissionError", f"a request without TLS names this machine as its host, not {host!r}")
        if origin and origin != f"{self._scheme}://{host}":
            return refusal(403, "PermissionError", f"pages of {origin!r} may not ask this server")
        if scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token):
            return None
        challenge = 'Bearer realm="thinpool"' + (', error="invalid_token"' if given else "")
        return refusal(401, "PermissionError", "over TCP a request needs the pool's token: Authorization: Bearer TOKEN", {"WWW-Authenticate": challenge})


def _is_here(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class TcpListeners:
    """Where a running server is reached over TCP. Belongs to the event loop's thread."""

    def __init__(self, directory: Path, server: uvicorn.Server, keeper: KeeperLink) -> None:
        self._directory = directory
        self._server, self._keeper = server, keeper
        self._accepting: dict[str, asyncio.Server] = {}
        self._told = asyncio.Lock()  # one address at a time

    def addresses(self) -> list[str]:
        """Where it listens."""
        return sorted(self._accepting)

    async def go_on(self) -> None:
        """Serves those of the server before this one that are not served yet, but for those whose files are gone or in disorder."""
        async with self._told:
            for kept, address in _kept(self._keeper).items():
                if address in self._accepting:
                    continue
                try:
                    await self._serve(Listener(_duplicate(self._keeper, kept), **json.loads(kept.removeprefix(_KEPT_PREFIX))))
                except (BadAddress, OSError) as error:
                    _log.error("HTTP is not served at %s any more: %s", address, error)
                    self._forget(kept)

    async def serve_at(self, address: str, certificates: Path | None, *, verify_peer: bool) -> str:
        """Serves at ``host:port``; where, as it is then (port 0: one that was free). Raises BadAddress, OSError."""
        async with self._told:
            listener = await run_in_threadpool(listener_at, address, certificates, verify_peer=verify_peer, keeper=self._keeper)
            await self._serve(listener)
            return listener.address

    async def serve(self, listener: Listener) -> None:
        """Serves it until the server stops, and with that the server stays. Raises BadAddress, OSError.

        Where it does already, new clients get TLS as this listener has it, with the files as they are now.
        """
        async with self._told:
            await self._serve(listener)

    async def _serve(self, listener: Listener) -> None:
        try:
            context = listener.context()
            config = copy.copy(self._server.config)
            config.timeout_keep_alive = _KEEP_ALIVE_SECONDS
            config.loaded_app = Guard(config.loaded_app, token_of(self._directory), has_tls=context is not None)
            state = {"server_state": self._server.server_state, "app_state": self._server.lifespan.state}
            protocol = functools.partial(cast(Any, config.http_protocol_class), config=config, **state)
            accepting = await asyncio.get_running_loop().create_server(protocol, sock=listener.bound, ssl=context)
        except BaseException:
            listener.bound.close()
            raise
        self._server.servers.append(accepting)
        before, self._accepting[listener.address] = self._accepting.get(listener.address), accepting
        if before is not None:
            self._server.servers.remove(before)
            before.close()  # connections that there are stay
        self._keep(listener)

    def _keep(self, listener: Listener) -> None:
        """For a successor, in place of what was kept for its address."""
        kept = [name for name, address in _kept(self._keeper).items() if address == listener.address]
        if listener.name not in kept:
            self._keeper.keep(listener.name, [os.dup(listener.bound.fileno())])
        for name in set(kept) - {listener.name}:
            self._forget(name)

    def _forget(self, name: str) -> None:
        descriptors = self._keeper.kept(name)
        self._keeper.drop(name)
        for descriptor in descriptors:
            os.close(descriptor)
