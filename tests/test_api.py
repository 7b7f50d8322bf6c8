"""The HTTP interface where it says more than the library: statuses, limits of requests, durability, and its schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi import Answer, application
from asgi import ask as ask_as_is

import thinpool
from thinpool.server.wire import BODY_BYTES_MAX


@pytest.fixture
def quiet_pool(pool_path: Path) -> Iterator[thinpool.Pool]:
    """One that commits only when it is told to."""
    thinpool.Pool.create(pool_path).close()
    with thinpool.Pool.open(pool_path, background=False) as pool:
        pool.create_layer("a", "1M")
        pool.commit()
        yield pool


@pytest.fixture
def app(quiet_pool: thinpool.Pool) -> Any:
    return application(quiet_pool)


def ask(app: Any, method: str, url: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """One request; ``{a}`` in its URL stands for the id of the layer ``a``."""
    return ask_as_is(app, method, url.replace("{a}", str(app.state.pool.layer("a").id)), body, headers)


def error_of(response: Answer) -> str:
    """The kind of error that an answer tells, in the one form that all have."""
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert set(answer) == {"error"} and set(answer["error"]) == {"type", "message", "fields"}
    return str(answer["error"]["type"])


@pytest.mark.parametrize(
    ("method", "url", "body", "status", "kind"),
    [
        ("GET", "/v1/nonsense", None, 404, "NoSuchRoute"),
        ("PATCH", "/v1/layers", None, 405, "NoSuchRoute"),
        ("GET", "/v1/layer?name=nope", None, 404, "LayerNotFound"),
        ("GET", "/v1/layers/99", None, 404, "LayerDeleted"),
        ("POST", "/v1/layers", {"name": "a", "size": "1M"}, 409, "LayerExists"),
        ("POST", "/v1/layers", {"name": "-", "size": "1M"}, 400, "BadName"),
        ("POST", "/v1/layers", {"name": "b"}, 422, "TypeError"),
        ("GET", "/v1/layers/{a}/data?offset=0&length=2000000", None, 416, "OutOfRange"),
        ("GET", f"/v1/layers/{{a}}/data?offset=0&length={BODY_BYTES_MAX + 1}", None, 422, "TypeError"),
        ("POST", "/v1/import/raw", {"path": "relative", "name": "b"}, 422, "TypeError"),
        ("POST", "/v1/import/raw", {"path": "/nonexistent/image", "name": "b"}, 400, "ImportFailed"),
        ("POST", "/v1/diff", {"from_layer": "a", "to_layer": "nope"}, 404, "LayerNotFound"),
        ("POST", "/v1/images/get", {"reference": "nope"}, 404, "ImageNotFound"),
        ("POST", "/v1/images/get", {"reference": "nope", "more": 1}, 422, "TypeError"),
    ],
)
def test_a_mistake_gets_its_status_and_the_error_as_json(app: Any, method: str, url: str, body: Any, status: int, kind: str) -> None:
    response = ask(app, method, url, body)
    assert (response.status, error_of(response)) == (status, kind)


def test_a_body_that_is_too_long_is_not_read(app: Any) -> None:
    response = ask(app, "PUT", "/v1/layers/{a}/data?offset=0", headers={"Content-Length": str(BODY_BYTES_MAX + 1)})
    assert (response.status, error_of(response)) == (413, "BodyTooLarge")


def test_a_body_of_untold_length_is_refused(app: Any) -> None:
    response = ask(app, "PUT", "/v1/layers/{a}/data?offset=0", headers={"Transfer-Encoding": "chunked"})
    assert (response.status, error_of(response)) == (411, "LengthRequired")


@pytest.mark.parametrize("durable", ["true", "false"])
def test_what_is_asked_to_be_durable_is_committed_when_it_is_answered(app: Any, quiet_pool: thinpool.Pool, durable: str) -> None:
    response = ask(app, "POST", f"/v1/layers/{{a}}/clone?durable={durable}", {"name": "b"})
    assert response.status == 200
    assert bool(quiet_pool.engine.info().dirty) == (durable == "false")


def test_what_is_being_committed_is_not_durable_yet(app: Any, quiet_pool: thinpool.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state that an answer tells is what a client goes by after a kill."""

    def state() -> list[str]:
        return ask(app, "GET", "/v1/pool").headers["thinpool-state"].split(" ")[1:]

    _, before = state()
    ask(app, "POST", "/v1/layers/{a}/clone", {"name": "b"})
    seen, sync = [state()], quiet_pool.engine.sync
    monkeypatch.setattr(quiet_pool.engine, "sync", lambda: (seen.append(state()), sync()))
    quiet_pool.commit()
    needed, durable = state()
    assert needed == durable != before
    assert seen == [[needed, before]] * 2


def test_what_fails_is_not_committed(app: Any, quiet_pool: thinpool.Pool) -> None:
    before = quiet_pool.engine.info().durable_txn
    assert ask(app, "POST", "/v1/layers/{a}/clone?durable=true", {"name": "a"}).status == 409
    assert quiet_pool.engine.info().durable_txn == before


def test_long_work_tells_its_progress_and_then_its_result(app: Any, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"data" * 100_000)
    response = ask(app, "POST", "/v1/import/raw", {"path": str(tmp_path / "image"), "name": "disk"})
    assert response.headers["content-type"] == "application/jsonl"
    lines = response.lines()
    assert lines[-1]["result"]["name"] == "disk"
    assert all(set(line) == {"progress"} for line in lines[:-1])


def test_every_operation_has_a_name_of_its_own_and_a_description(app: Any) -> None:
    operations = [one for methods in ask(app, "GET", "/openapi.json").json()["paths"].values() for one in methods.values()]
    assert len({one["operationId"] for one in operations}) == len(operations) > 50
    assert all(one.get("description") for one in operations)


def test_every_method_of_images_and_containers_has_its_arguments_in_the_schema(app: Any) -> None:
    schema = ask(app, "GET", "/openapi.json").json()
    pull = schema["components"]["schemas"]["ImagesPull"]
    assert set(pull["properties"]) == {"reference", "platform", "credentials", "insecure", "size"}
    assert pull["required"] == ["reference"]
    assert {path.rpartition("/")[2] for path in schema["paths"] if "/containers/" in path} >= {"create", "copy_in", "configuration"}
