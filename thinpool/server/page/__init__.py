"""``/``: a page for people, one static file (``index.html``) that asks the HTTP interface for all it shows.

Whoever is let in may do what it shows, so nothing from elsewhere may run in it or frame it: the policy below allows this file's own
script and style, and requests to where it came from.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_PAGE = (Path(__file__).parent / "index.html").read_text()


def _hashes(tag: str) -> str:
    """What allows the page's own elements of that name, by their content (w3.org/TR/CSP3)."""
    found = re.findall(f"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)


_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """The page."""
    return HTMLResponse(_PAGE, headers=_HEADERS)
