"""Requests to the HTTP application without a socket."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from thinpool.server.app import create_app
from thinpool.server.state import Gate
from thinpool.server.tcp import TcpListeners


def application(pool: Any) -> Any:
    """The application over an open pool, without a server around it."""
    return create_app(pool, Gate(), TcpListeners(pool.path if pool else Path(), uvicorn.Server(uvicorn.Config("nothing")), None))  # type: ignore[arg-type]  # nobody listens


@dataclass
class Answer:
    """What the application answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Its body's value."""
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        """The values of its lines."""
        return [json.loads(line) for line in self.body.splitlines()]


def ask(app: Any, method: str, url: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """One request; ``body``: bytes, or a value to be sent as JSON."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    told = {"host": "localhost", "content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    path, _, query = url.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path, "raw_path": path.encode(),
        "query_string": query.encode(), "root_path": "", "headers": [(name.lower().encode(), value.encode()) for name, value in told.items()],
        "client": None, "server": None, "state": {},
    }  # fmt: skip
    sent: list[dict[str, Any]] = []
    received = False

    async def receive() -> dict[str, Any]:
        nonlocal received
        if received:
            await asyncio.Event().wait()  # the client stays
        received = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start = sent[0]
    return Answer(
        start["status"],
        {name.decode(): value.decode() for name, value in start["headers"]},
        b"".join(message.get("body", b"") for message in sent[1:]),
    )
