"""Answers that are no success: one form for all of them (``schema.Failure``)."""

from __future__ import annotations

import json
from collections.abc import Mapping

from fastapi.responses import Response

from .wire import Json


def failure(status: int, error: Json, headers: Mapping[str, str] | None = None) -> Response:
    """With what ``wire.encode_error`` made; ASCII, as what is wrong with a text may be what it consists of."""
    return Response(json.dumps({"error": error}), status, headers, media_type="application/json")


def refusal(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """To a request that no route is asked about."""
    return failure(status, {"type": kind, "message": message, "fields": {}}, headers)
