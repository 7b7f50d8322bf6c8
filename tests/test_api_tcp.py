"""The HTTP interface over TCP: nobody without the token, nobody from another site, nothing readable on the way to another machine."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from asgi import Answer, ask
from commandline import Command
from conftest import needs_tool

import thinpool
from thinpool.server.client import RemotePool
from thinpool.server.connect import connect
from thinpool.server.tcp import Guard, token_of

TOKEN = "secret-and-long-enough"


async def inner(scope: object, receive: object, send: object) -> None:
    """What the guard lets through to."""
    for message in ({"type": "http.response.start", "status": 200, "headers": []}, {"type": "http.response.body", "body": b"inside"}):
        await send(message)  # type: ignore[operator]


def guarded(url: str = "/v1/pool", method: str = "GET", *, has_tls: bool = False, **headers: str) -> Answer:
    return ask(Guard(inner, TOKEN, has_tls=has_tls), method, url, headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_who_has_the_token_is_let_in() -> None:
    assert guarded(authorization=f"Bearer {TOKEN}").body == b"inside"
    assert guarded(authorization=f"bearer  {TOKEN}").body == b"inside"


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer x", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ü"])
def test_nobody_else_is(authorization: str | None) -> None:
    answer = guarded(**({} if authorization is None else {"authorization": authorization}))
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Bearer realm=")
    assert answer.json()["error"]["type"] == "PermissionError"


@pytest.mark.parametrize(("url", "method", "status"), [("/", "GET", 200), ("/", "HEAD", 200), ("/", "POST", 401), ("/metrics", "GET", 401), ("//", "GET", 401)])
def test_only_the_page_itself_is_for_everybody(url: str, method: str, status: int) -> None:
    assert guarded(url, method).status == status


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:80", 200), ("127.0.0.1:8080", 200), ("127.1.2.3", 200), ("[::1]:80", 200),
     ("evil.example", 403), ("127.evil.example", 403), ("", 403), ("[", 403)],
)  # fmt: skip
def test_a_name_that_was_made_to_lead_here_is_refused(host: str, status: int) -> None:
    assert guarded(host=host, authorization=f"Bearer {TOKEN}").status == status
    assert guarded("/", host=host).status == status


def test_with_tls_the_certificate_says_who_is_asked() -> None:
    assert guarded(host="pool.example:8443", authorization=f"Bearer {TOKEN}", has_tls=True).status == 200


@pytest.mark.parametrize(("origin", "status"), [("http://localhost:80", 200), ("https://localhost:80", 403), ("http://evil.example", 403), ("null", 403)])
def test_a_page_of_another_site_is_refused(origin: str, status: int) -> None:
    assert guarded(host="localhost:80", origin=origin, authorization=f"Bearer {TOKEN}").status == status


def test_a_token_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    token = token_of(tmp_path)
    assert len(token) >= 32 and token_of(tmp_path) == token
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["token"]


def test_a_token_that_others_may_read_or_guess_is_none(tmp_path: Path) -> None:
    token_of(tmp_path)
    (tmp_path / "token").chmod(0o640)
    with pytest.raises(PermissionError, match="chmod 600"):
        token_of(tmp_path)
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "token").write_text("short\n")
    with pytest.raises(thinpool.BadAddress):
        token_of(tmp_path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemotePool]:
    directory = tmp_path_factory.mktemp("served") / "pool"
    thinpool.Pool.create(directory).close()
    with connect(directory, server=True) as pool:
        assert isinstance(pool, RemotePool)
        yield pool
    # It stays as long as it is served over TCP: end it.
    with RemotePool(directory) as pool:
        os.kill(pool.server_pid, signal.SIGTERM)


def get(connection: http.client.HTTPConnection, path: str, token: str) -> tuple[int, bytes]:
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    response = connection.getresponse()
    return response.status, response.read()


def test_the_server_listens_where_it_is_asked_to(served: RemotePool) -> None:
    address = served.serve_http("127.0.0.1:0")
    assert address in served.http_addresses()
    connection = http.client.HTTPConnection(address)
    token = Command(served.path.parent)("serve", "--print-token").strip()
    status, body = get(connection, "/v1/pool", token)
    assert status == 200 and json.loads(body)["pid"] == served.server_pid
    assert get(connection, "/v1/pool", token + "x")[0] == 401
    connection.close()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "nowhere", "unix:/x", "127.0.0.1:99999", "/x:1"])
def test_addresses_that_cannot_be(served: RemotePool, address: str) -> None:
    before = served.http_addresses()
    with pytest.raises(thinpool.BadAddress):
        served.serve_http(address)
    assert served.http_addresses() == before


@needs_tool("openssl")
def test_beyond_this_machine_it_is_tls(served: RemotePool, certificates: Path) -> None:
    address = served.serve_http("0.0.0.0:0", certificates=certificates)
    port = int(address.rpartition(":")[2])
    secure = http.client.HTTPSConnection("localhost", port, context=ssl.create_default_context(cafile=certificates / "ca-cert.pem"))
    assert get(secure, "/v1/pool", token_of(served.path))[0] == 200
    secure.close()
    plain = http.client.HTTPConnection("localhost", port)
    with pytest.raises((OSError, http.client.HTTPException)):
        get(plain, "/v1/pool", token_of(served.path))
    plain.close()


def test_a_killed_server_listens_again(served: RemotePool) -> None:
    address = served.serve_http("127.0.0.1:0")
    os.kill(served.server_pid, signal.SIGKILL)
    connection = http.client.HTTPConnection(address, timeout=60)  # the socket is kept, so that the next server finds the request there
    status, body = get(connection, "/v1/pool", token_of(served.path))
    assert status == 200 and json.loads(body)["pid"] != served.server_pid
    connection.close()
