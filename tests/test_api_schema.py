"""The HTTP interface is what its OpenAPI schema says: schemathesis asks every route, well and badly, for answers that the schema does not have."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from asgi import application
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

import thinpool

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
SEED = 1 if "CI" in os.environ else random.randrange(1 << 32)  # a change is not to fail by what another one has missed


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def pool(directory: Path) -> Iterator[thinpool.Pool]:
    with thinpool.Pool.create(directory / "pool", capacity="1G") as pool:
        yield pool


@pytest.fixture(scope="module")
def schema(pool: thinpool.Pool, directory: Path) -> Any:
    schema = schemathesis.openapi.from_asgi("/openapi.json", application(pool))
    numbers = itertools.count()

    @schema.hook
    def map_path_parameters(context: Any, path_parameters: Any) -> Any:
        """Half of the requests are about a layer that there is."""
        layer_id = (path_parameters or {}).get("layer_id")
        if isinstance(layer_id, int) and layer_id % 2 == 0:
            layer = pool.create_layer(f"fuzz-{next(numbers)}", "1M")
            layer.pwrite(b"x" * 5000, 100_000)
            return {"layer_id": layer.id}
        return path_parameters

    @schema.hook
    def map_body(context: Any, body: Any) -> Any:
        """Nothing outside of the test's directory is written, and no host but this one asked."""
        if isinstance(body, dict):
            body = dict(body)
            for name in ("path", "directory", "destination", "source", "certificates", "keys"):
                if isinstance(body.get(name), str) and body[name].startswith("/"):
                    body[name] = f"{directory}/files/" + body[name].replace("/", "_")
            if isinstance(body.get("hook"), str):
                body["hook"] = "true"
            if isinstance(body.get("address"), str):
                body["address"] = f"unix:{directory}/files/" + body["address"].replace("/", "_")
            if isinstance(body.get("sources"), list):
                body["sources"] = [f"{directory}/files/" + one.replace("/", "_") if str(one).startswith("/") else one for one in body["sources"]]
            if isinstance(body.get("images"), list):
                body["images"] = ["127.0.0.1:1/" + one if isinstance(one, str) else one for one in body["images"]]
            if isinstance(body.get("reference"), str):
                body["reference"] = "127.0.0.1:1/" + body["reference"]
        return body

    (directory / "files").mkdir()
    return schema


def operations() -> list[tuple[str, str]]:
    paths = application(None).openapi()["paths"]  # no route is asked
    return [(path, method) for path, methods in paths.items() for method in methods if path != "/v1/events"]  # which does not end


@pytest.mark.parametrize(("path", "method"), operations())
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_every_answer_is_one_that_the_schema_has(schema: Any, path: str, method: str, mode: GenerationMode, api_examples: int) -> None:
    print("seed", SEED)
    operation = schema[path][method]
    strategy = operation.as_strategy(generation_mode=mode)

    @hypothesis.seed(SEED)
    @hypothesis.settings(max_examples=api_examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=strategy)
    def ask(case: Any) -> None:
        response = case.call()
        # That there is no registry is no failure of the server.
        case.validate_response(response, checks=CHECKS, excluded_checks=[not_a_server_error] if response.status_code == 502 else [])

    with contextlib.suppress(hypothesis.errors.Unsatisfiable) if mode is GenerationMode.NEGATIVE else contextlib.nullcontext():  # a route that takes nothing
        ask()
