"""Requests to a registry: HTTP with its authentication, retries, and errors that say what the registry said.

Token authentication: distribution's "Token Authentication Specification" and "OAuth2 Token Authentication". Credentials go to the registry
and to the service that it names for tokens, never to where a blob's request is redirected.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

from ..api import Credentials
from ..errors import RegistryError

_CONNECT_SECONDS, _READ_SECONDS = 10.0, 60.0
_TRIES = 4
_RETRIED = (408, 429, 500, 502, 503, 504)
_WAIT_SECONDS_MAX = 30.0
_REDIRECTS_MAX = 5
_ANSWER_BYTES_MAX = 4 << 20
_CHALLENGE = re.compile(r'([a-zA-Z]+)="([^"]*)"')
_HUB_HOST = "registry-1.docker.io"


def is_loopback(domain: str) -> bool:
    """Whether a registry is on this machine, where plain HTTP is good enough."""
    host = domain.rsplit(":", 1)[0] if not domain.endswith("]") else domain
    return host in ("localhost", "[::1]") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


class Connection:
    """One registry. Threads may share it."""

    def __init__(self, domain: str, *, credentials: Credentials | None, insecure: bool) -> None:
        try:
            import urllib3  # here, as it takes longer to load than all of this package
        except ImportError:
            raise RegistryError("talking to registries needs urllib3: pip install 'thinpool[registry]'") from None
        scheme = "http" if insecure or is_loopback(domain) else "https"
        self.domain = domain
        self._base = f"{scheme}://{_HUB_HOST if domain == 'docker.io' else domain}"
        self._credentials = credentials
        self._pool: Any = urllib3.PoolManager(timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS), retries=False, maxsize=8)
        self._http_error = urllib3.exceptions.HTTPError
        self._authorizations: dict[str, str] = {}  # by scope

    def close(self) -> None:
        self._pool.clear()

    def url(self, path: str) -> str:
        """Of a path, or of what a Location header says."""
        return urljoin(self._base, path)

    def request(
        self,
        method: str,
        path: str,
        *,
        scope: str,
        what: str,
        accepted: tuple[int, ...] = (200,),
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        stream: bool = False,
        retry: bool = True,
    ) -> Any:
        """One request, authenticated for ``scope``, retried where that may help. Raises RegistryError, with ``what`` was to be done.

        ``stream``: the answer's body is left to be read; its :meth:`release_conn` is the caller's.
        """
        for attempt in range(_TRIES):
            last = attempt == _TRIES - 1 or not retry
            try:
                answer = self._authorized(method, self.url(path), scope, what, dict(headers or {}), body, stream)
            except (self._http_error, OSError) as error:
                if isinstance(error, RegistryError) or last:
                    raise _as_registry_error(error, f"{what}: {self.domain} cannot be reached ({_reason(error)})") from error
                time.sleep(0.2 * 2**attempt)
                continue
            if answer.status in accepted:
                return answer
            if answer.status not in _RETRIED or last:
                raise RegistryError(f"{what}: {self.domain} answered {answer.status}{_said(answer)}", answer.status)
            answer.drain_conn()  # a connection with an answer half read is of no use to the next request
            time.sleep(_wait_seconds(answer, attempt))
        raise AssertionError("the last attempt returns or raises")

    def _authorized(self, method: str, url: str, scope: str, what: str, headers: dict[str, str], body: Any, stream: bool) -> Any:
        answer = self._send(method, url, headers, self._authorizations.get(scope), body, stream)
        if answer.status == 401:
            challenge = answer.headers.get("WWW-Authenticate", "")
            answer.drain_conn()
            self._authorizations[scope] = self._authorize(challenge, scope, what)
            answer = self._send(method, url, headers, self._authorizations[scope], body, stream)
        return answer

    def _send(self, method: str, url: str, headers: dict[str, str], authorization: str | None, body: Any, stream: bool) -> Any:
        for _ in range(_REDIRECTS_MAX):
            own = urlsplit(url).netloc == urlsplit(self._base).netloc
            given = {**headers, **({"Authorization": authorization} if authorization and own else {})}
            answer = self._pool.request(method, url, headers=given, body=body, preload_content=not stream, redirect=False)
            location = answer.headers.get("Location")
            if method not in ("GET", "HEAD") or answer.status not in (301, 302, 303, 307, 308) or not location:
                return answer
            answer.drain_conn()
            url = urljoin(url, location)
        raise RegistryError(f"{self.domain} redirects in circles")

    # --- who one is ---

    def _authorize(self, challenge: str, scope: str, what: str) -> str:
        kind, fields = challenge.partition(" ")[0].lower(), dict(_CHALLENGE.findall(challenge))
        known = self._credentials
        if kind == "basic":
            if known is None or not known.username:
                raise RegistryError(f"{what}: {self.domain} wants a user and password: docker login {self.domain}", 401)
            return _basic(known)
        if kind != "bearer" or "realm" not in fields:
            raise RegistryError(f"{what}: {self.domain} wants a kind of authentication that is not known: {challenge[:100]!r}", 401)
        if self._base.startswith("https:") and not fields["realm"].startswith("https:"):
            raise RegistryError(f"{what}: {self.domain} names a token service without TLS: {fields['realm']}", 401)
        return f"Bearer {self._token(fields, scope, what)}"

    def _token(self, fields: Mapping[str, str], scope: str, what: str) -> str:
        known, query = self._credentials, {"scope": scope, **({"service": fields["service"]} if "service" in fields else {})}
        if known is not None and known.identity_token:
            form = {**query, "grant_type": "refresh_token", "client_id": "thinpool", "refresh_token": known.identity_token}
            answer = self._pool.request("POST", fields["realm"], fields=form, encode_multipart=False, redirect=False)
        else:
            headers = {"Authorization": _basic(known)} if known is not None and known.username else {}
            answer = self._pool.request("GET", f"{fields['realm']}?{urlencode(query)}", headers=headers, redirect=False)
        if answer.status != 200:
            raise RegistryError(f"{what}: the token service of {self.domain} answered {answer.status}{_said(answer)}", answer.status)
        try:
            data = json.loads(answer.data)
            return str(data.get("token") or data["access_token"])
        except (ValueError, KeyError, AttributeError):
            raise RegistryError(f"{what}: the token service of {self.domain} gave no token") from None


def _basic(credentials: Credentials) -> str:
    return "Basic " + base64.b64encode(f"{credentials.username}:{credentials.password}".encode()).decode()


def _as_registry_error(error: Exception, message: str) -> RegistryError:
    return error if isinstance(error, RegistryError) else RegistryError(message)


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error)


def _said(answer: Any) -> str:
    """The registry's own words (distribution-spec, "Error Codes")."""
    try:
        data = json.loads(answer.read(_ANSWER_BYTES_MAX) if not answer._body else answer.data)
        return ": " + "; ".join(f"{one.get('code', '')} {one.get('message', '')}".strip() for one in data["errors"])
    except Exception:  # whatever it is, it says nothing
        return ""


def _wait_seconds(answer: Any, attempt: int) -> float:
    given = answer.headers.get("Retry-After", "")
    return min(_WAIT_SECONDS_MAX, float(given) if given.isdigit() else 0.2 * 2**attempt)
