"""Who one is to a registry, as Docker's ``config.json`` has it (docs.docker.com, "docker login", "Credential stores")."""

from __future__ import annotations

import base64
import binascii
import json
import subprocess
from pathlib import Path
from typing import Any

from ..api import Credentials
from ..errors import ImportFailed, ToolFailed
from .reference import DOCKER_HUB

_HUB_KEY = "https://index.docker.io/v1/"
_TOKEN_USER = "<token>"
_HELPER_SECONDS = 30


def credentials_for(domain: str, config: Path | None = None) -> Credentials | None:
    """Those for a registry; ``None``: there are none. ``config``: the file, by default ``~/.docker/config.json``.

    Raises ImportFailed for a file that is damaged, ToolFailed where a credential helper fails.
    """
    path = config if config is not None else Path("~/.docker/config.json").expanduser()
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ImportFailed(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise ImportFailed(f"{path} is not a JSON object")
    keys = [_HUB_KEY, DOCKER_HUB] if domain == DOCKER_HUB else [domain, f"https://{domain}", f"http://{domain}"]
    helper = (data.get("credHelpers") or {}).get(keys[-1] if domain == DOCKER_HUB else domain) or data.get("credsStore")
    if helper:
        for key in keys:
            if (found := _ask(str(helper), key)) is not None:
                return found
    auths = data.get("auths") or {}
    for key, entry in auths.items():
        if (key in keys or key.rstrip("/") in keys) and isinstance(entry, dict):
            return _decode(entry, path, key)
    return None


def _decode(entry: dict[str, Any], path: Path, key: str) -> Credentials | None:
    if entry.get("identitytoken"):
        return Credentials(identity_token=str(entry["identitytoken"]))
    if not entry.get("auth"):
        return None
    try:
        user, colon, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
    except (binascii.Error, ValueError, TypeError):
        raise ImportFailed(f"{path} has an auth for {key} that is not base64: docker login writes it anew") from None
    if not colon:
        raise ImportFailed(f"{path} has an auth for {key} without a password: docker login writes it anew")
    return Credentials(user, password.rstrip("\0"))


def _ask(helper: str, key: str) -> Credentials | None:
    """docker-credential-helpers' protocol: the key on standard input of ``docker-credential-NAME get``, JSON on its output."""
    command = [f"docker-credential-{helper}", "get"]
    try:
        done = subprocess.run(command, input=key, capture_output=True, text=True, timeout=_HELPER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolFailed(f"the credential helper {command[0]} failed: {error}") from None
    if done.returncode != 0:
        return None  # it knows nothing of this registry
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError):
        raise ToolFailed(f"the credential helper {command[0]} answered what it should not") from None
    return Credentials(identity_token=secret) if user == _TOKEN_USER else Credentials(user, secret)
